// What the models of the protocol share: a search through every state that a machine can reach, the trace of a
// counterexample, and the command.
//
// A model brings four types. Config is explore::Config, and what the model has beside it. State has no padding, and is
// hashed as bytes. Move says which of a state's moves is made. Machine is made from a Config, speaks through Narrator,
// and has
//
//   State initial()                       before any move
//   void each_move(const State&, visit)   calls visit(next State, Move, bool progress) for every move that is possible
//   apply(State&, Move, log)              makes one
//   string stuck(const State&)            empty when a state in which nobody can go on is a legal end
//   string where(const State&, int rank)  (may be missing) ends a trace, a line each rank
//
// A fault is no progress: a rank that can only be rescued by another's death is stuck.
//
// The search is breadth first, so the first violation that it meets has a shortest trace. A state is remembered by 64
// bits of hash: the chance that one of 10^7 states is taken for another is below 10^-5.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace explore {

// --- what is searched -----------------------------------------------------------------------------------------------

template <class Kind, class Fault, class Mutant>
struct Config {
  int ranks = 2;
  std::vector<Kind> calls;
  Fault fault;
  int odd_rank = -1;  // with fault.disagree: who makes another second call
  Mutant mutant = Mutant::none;
};

// --- what a machine says of its moves, and the first thing that is wrong --------------------------------------------

class Narrator {
 public:
  const std::string& violation() const { return violation_; }

 protected:
  // Before each move. Without a log nothing is said.
  void begin_move(std::vector<std::string>* log) {
    log_ = log;
    violation_.clear();
  }
  bool talks() const { return log_ != nullptr; }
  void say(int rank, int call, const std::string& what) {
    if (!talks()) return;
    log_->push_back("rank " + std::to_string(rank) + (call > 0 ? ", call " + std::to_string(call) : "") + ": " + what);
  }
  void violate(const std::string& what) {
    if (violation_.empty()) violation_ = what;
  }
  void violate(int rank, const std::string& what) { violate("rank " + std::to_string(rank) + " " + what); }

 private:
  std::vector<std::string>* log_ = nullptr;
  std::string violation_;
};

// --- the states that were seen --------------------------------------------------------------------------------------

// Never 0.
template <class State>
uint64_t hash_of(const State& state) {
  static_assert(std::has_unique_object_representations_v<State>, "states are hashed as bytes");
  constexpr size_t kBlocks = (sizeof(State) + 15) / 16 * 2;
  std::array<uint64_t, kBlocks> blocks{};
  std::memcpy(blocks.data(), &state, sizeof state);
  const auto fold = [](uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  };
  uint64_t hash = 0x9E3779B97F4A7C15u;
  for (size_t i = 0; i < kBlocks; i += 2) {
    hash = fold(hash ^ blocks[i], 0xD6E8FEB86659FD93u ^ blocks[i + 1]) + 0xA0761D6478BD642Fu;
  }
  return hash == 0 ? 1 : hash;
}

class Seen {  // a set of hashes
 public:
  bool insert(uint64_t hash) {
    if (2 * (size_ + 1) > slots_.size()) grow();
    if (!place(hash)) return false;
    size_++;
    return true;
  }
  size_t size() const { return size_; }

 private:
  bool place(uint64_t hash) {
    size_t i = hash & (slots_.size() - 1);
    while (slots_[i] != 0) {
      if (slots_[i] == hash) return false;
      i = (i + 1) & (slots_.size() - 1);
    }
    slots_[i] = hash;
    return true;
  }
  void grow() {
    std::vector<uint64_t> old(slots_.empty() ? 1024 : 2 * slots_.size());
    old.swap(slots_);
    for (const uint64_t hash : old) {
      if (hash != 0) place(hash);
    }
  }
  std::vector<uint64_t> slots_;
  size_t size_ = 0;
};

// --- the search -----------------------------------------------------------------------------------------------------

struct Result {
  size_t states = 0, steps = 0, ends = 0, depth = 0;
  std::string violation;
  std::vector<std::string> trace;
};

template <class Config, class State, class Move, class Machine>
class Search {
 public:
  explicit Search(const Config& config) : config_(config), machine_(config) {}

  Result run() {
    add(machine_.initial(), kNone, {});
    if (!machine_.violation().empty()) fail(machine_.violation(), 0, nullptr);
    for (uint32_t index = 0; !frontier_.empty() && result_.violation.empty(); index++) {
      const State state = frontier_.front();
      frontier_.pop_front();
      expand(state, index);
    }
    result_.states = seen_.size();
    for (size_t node = nodes_.size() - 1; node != 0; node = nodes_[node].parent) result_.depth++;
    return std::move(result_);
  }

 private:
  static constexpr uint32_t kNone = ~uint32_t{0};
  struct Node {
    uint32_t parent;
    Move move;
  };

  void add(const State& state, uint32_t parent, Move move) {
    if (!seen_.insert(hash_of(state))) return;
    nodes_.push_back({parent, move});
    frontier_.push_back(state);
  }

  void expand(const State& state, uint32_t index) {
    bool progress = false;
    machine_.each_move(state, [&](const State& next, Move move, bool is_progress) {
      if (!result_.violation.empty()) return;
      result_.steps++;
      progress = progress || is_progress;
      if (!machine_.violation().empty()) return fail(machine_.violation(), index, &move);
      add(next, index, move);
    });
    if (progress || !result_.violation.empty()) return;
    result_.ends++;
    const std::string stuck = machine_.stuck(state);
    if (!stuck.empty()) fail(stuck, index, nullptr);
  }

  // Makes the moves that led to state `index`, and the last one, once more, with a log.
  void fail(const std::string& violation, uint32_t index, const Move* last) {
    result_.violation = violation;
    std::vector<Move> moves;
    if (last != nullptr) moves.push_back(*last);
    for (uint32_t node = index; nodes_[node].parent != kNone; node = nodes_[node].parent) {
      moves.push_back(nodes_[node].move);
    }
    State state = machine_.initial();
    for (size_t i = moves.size(); i-- > 0;) {
      std::vector<std::string> lines;
      machine_.apply(state, moves[i], &lines);
      for (size_t l = 0; l < lines.size(); l++) {
        char number[16];
        std::snprintf(number, sizeof number, l == 0 ? "%4zu  " : "      ", moves.size() - i);
        result_.trace.push_back(number + lines[l]);
      }
    }
    if constexpr (requires { machine_.where(state, 0); }) {
      for (int r = 0; r < config_.ranks; r++) result_.trace.push_back("      then: " + machine_.where(state, r));
    }
  }

  Config config_;
  Machine machine_;
  Seen seen_;
  std::vector<Node> nodes_;
  std::deque<State> frontier_;
  Result result_;
};

// --- the command ----------------------------------------------------------------------------------------------------

// What a model is called, the names of what it knows, and its own options.
template <class Config, class State, class Move, class Machine>
struct Command {
  using Kind = typename decltype(Config::calls)::value_type;
  using Fault = decltype(Config::fault);
  using Mutant = decltype(Config::mutant);
  using Calls = std::vector<Kind>;

  const char* program;
  std::span<const char*const> kinds, mutants;  // in the order of their enums
  std::span<const Fault> faults;
  int max_ranks, max_calls;
  std::vector<std::pair<std::string, bool Config::*>> switches = {};
  std::vector<std::pair<std::string, int Config::*>> numbers = {};

  // Exit status: 0 all properties hold, 1 a counterexample, 2 bad arguments.
  int run(int argc, char** argv) const {
    const Options options = parse(argc, argv);
    const Config& asked = options.config;
    Result sum;
    size_t searches = 0;
    for (const Calls& calls : sequences(options)) {
      for (int odd = 0; odd < (asked.fault.disagree ? asked.ranks : 1); odd++) {
        Config config = asked;
        config.calls = calls;
        config.odd_rank = config.fault.disagree ? odd : -1;
        const Result result = Search<Config, State, Move, Machine>(config).run();
        searches++;
        sum.states += result.states;
        sum.steps += result.steps;
        sum.ends += result.ends;
        sum.depth = std::max(sum.depth, result.depth);
        if (result.violation.empty()) continue;
        std::printf("counterexample: %d ranks, calls %s, fault %s, mutant '%s', %zu states\n", config.ranks,
                    to_string(calls).c_str(), config.fault.name, mutants[static_cast<size_t>(config.mutant)],
                    result.states);
        for (const std::string& line : result.trace) std::puts(line.c_str());
        std::printf("violated: %s\n", result.violation.c_str());
        return 1;
      }
    }
    std::printf("holds: %d ranks, %zu searches, fault %s: %zu states, %zu steps, %zu ends, longest %zu steps\n",
                asked.ranks, searches, asked.fault.name, sum.states, sum.steps, sum.ends, sum.depth);
    return 0;
  }

 private:
  struct Options {
    Config config;
    Calls any;
    int length = 3;
  };

  [[noreturn]] void usage(const std::string& what) const {
    std::fprintf(stderr, "%s: %s\n", program, what.c_str());
    std::exit(2);
  }

  size_t index_of(std::span<const char* const> names, const std::string& name, const char* what) const {
    std::string known;
    for (size_t i = 0; i < names.size(); i++) {
      if (name == names[i]) return i;
      known += (known.empty() ? "" : ", ") + std::string(names[i]);
    }
    usage(std::string("unknown ") + what + " '" + name + "', expected one of: " + known);
  }

  Calls parse_kinds(const std::string& list) const {
    Calls calls;
    for (size_t begin = 0; begin <= list.size();) {
      const size_t comma = std::min(list.find(',', begin), list.size());
      calls.push_back(static_cast<Kind>(index_of(kinds, list.substr(begin, comma - begin), "kind of call")));
      begin = comma + 1;
    }
    return calls;
  }

  std::string to_string(const Calls& calls) const {
    std::string text;
    for (const Kind kind : calls) text += (text.empty() ? "" : ", ") + std::string(kinds[static_cast<size_t>(kind)]);
    return text;
  }

  Options parse(int argc, char** argv) const {
    std::vector<const char*> fault_names;
    for (const Fault& fault : faults) fault_names.push_back(fault.name);
    const auto print_and_end = [](std::span<const char* const> names) {
      for (const char* name : names) std::puts(name);
      std::exit(0);
    };
    const auto own = [](const auto& options, const std::string& key) {
      return std::find_if(options.begin(), options.end(), [&](const auto& option) { return option.first == key; });
    };
    Options options;
    Config& config = options.config;
    config.fault = faults[0];
    for (int i = 1; i < argc; i++) {
      const std::string key = argv[i];
      if (key == "--mutants") print_and_end(mutants);
      if (key == "--kinds") print_and_end(kinds);
      if (key == "--faults") print_and_end(fault_names);
      if (const auto option = own(switches, key); option != switches.end()) {
        config.*option->second = true;
        continue;
      }
      if (i + 1 == argc) usage(key + " needs a value, or is unknown");
      const std::string value = argv[++i];
      if (key == "--ranks") {
        config.ranks = std::atoi(value.c_str());
      } else if (key == "--length") {
        options.length = std::atoi(value.c_str());
      } else if (key == "--calls") {
        config.calls = parse_kinds(value);
      } else if (key == "--any") {
        options.any = parse_kinds(value);
      } else if (key == "--mutant") {
        config.mutant = static_cast<Mutant>(index_of(mutants, value, "mutant"));
      } else if (key == "--fault") {
        config.fault = faults[index_of(fault_names, value, "fault")];
      } else if (const auto option = own(numbers, key); option != numbers.end()) {
        config.*option->second = std::atoi(value.c_str());
      } else {
        usage("unknown option " + key);
      }
    }
    if (config.ranks < 2 || config.ranks > max_ranks) usage("--ranks: expected 2 to " + std::to_string(max_ranks));
    if (options.any.empty() == config.calls.empty()) usage("expected --calls or --any");
    const int calls = options.any.empty() ? static_cast<int>(config.calls.size()) : options.length;
    if (calls < 1 || calls > max_calls) usage("expected 1 to " + std::to_string(max_calls) + " calls");
    return options;
  }

  // All sequences of `length` kinds, or the one that was given.
  std::vector<Calls> sequences(const Options& options) const {
    if (options.any.empty()) return {options.config.calls};
    std::vector<Calls> all{{}};
    for (int i = 0; i < options.length; i++) {
      std::vector<Calls> longer;
      for (const Calls& begin : all) {
        for (const Kind kind : options.any) {
          longer.push_back(begin);
          longer.back().push_back(kind);
        }
      }
      all.swap(longer);
    }
    return all;
  }
};

}  // namespace explore
