// The protocol of docs/protocol.md as a machine of shared words, and a search through every order of its ranks' steps.
//
//   protocol_model --ranks 3 --calls two_shot,one_shot,zero --fault death [--mutant NAME] [--victim RANK] [--full]
//   protocol_model --ranks 3 --any one_shot,two_shot,broadcast --length 3      every sequence of 3 of these
//   protocol_model --mutants | --faults | --kinds                              the names
//
// A rank is a list of instructions, one shared word each (make_program), followed by what it does when a wait fails
// (Step). A state is all program counters and all words. The search and the command are explore.h's.
//
// Memory. Atomic words change at once. A plain store becomes visible to other threads at any time between its issue and
// the next release of its thread, in any order: until then a foreign reader gets the old value or the new one, and the
// search follows both. Loads are not reordered (a mutant does it by hand). This is weaker than x86, and for stores as
// weak as C++ allows. A correct protocol never reads such a word, so for it the search branches on scheduling alone.
//
// Fewer states. Without --full, some instructions are one step with the one before, and some differences are forgotten.
// A reduced step is a run of full ones, so nothing is invented; what is left out changes no verdict:
//   a store joins the step before it: a store that is issued earlier can be seen by others in every way in which it can
//     be seen when it is issued later, and is checked for overwriting at the stricter moment;
//   reads in a row are one step, at the time of the last: each is right or wrong by itself, and the one that would be
//     wrong at some moment is as wrong when the whole row is read at that moment, for reading changes nothing;
//   the end of a call joins the step before it: what is forbidden after it is forbidden earlier;
//   an abort record that is complete or abandoned stays so: to give up, wait for its end, read it and raise, in the
//   next
//     call again, is one step (what the caller then stores is pending: others can still find the old content);
//   a deadline passes at the moment at which the missing ranks are counted, or later in the same wait;
//   a report that finds the record taken does nothing and is left out;
//   a record names only the peer that was awaited: verdicts ask whether sentences are equal and not empty, no more;
//   a process that is gone reads nothing: its pad and its place are set to zero, stores to them are dropped.
// The last premises hold by compare-and-swap, which a mutant removes; test_model.py compares both searches.
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <string>
#include <vector>

#include "explore.h"

namespace {

constexpr int kMaxRanks = 4, kMaxCalls = 3;

// --- what is modelled -----------------------------------------------------------------------------------------------

// The calls. One word is a slot's content that everybody reads whole, or one rank's share of a tensor.
enum class Kind : uint8_t { one_shot, two_shot, in_place, mixed, broadcast, broadcast_in_place, zero };
constexpr const char* kKinds[] = {
    "one_shot",            // all_reduce through slots
    "two_shot",            // all_reduce, in and out in the slot
    "in_place",            // all_reduce, two_shot_direct: every rank's tensor lies in its arena
    "mixed",               // two_shot_direct, but the last rank's tensor lies outside and goes through its slot
    "broadcast",           // one_shot, the root is rank (call mod ranks)
    "broadcast_in_place",  // two_shot_direct: peers read the root's tensor
    "zero",                // 0 elements; also a rendezvous, and the announcement of a call of the process group
};

struct Fault {
  const char* name;
  int deaths = 0;            // processes that may end at any moment, even between two stores
  bool watched = false;      // a death is noticed by the watcher thread of each survivor; else only by a deadline
  bool deadline = false;     // any wait for something that is not there may run out of time
  bool leave = false;        // ranks say bye, before any call
  bool leave_last = false;   // ranks say bye, after their last call
  bool disagree = false;     // each rank in turn makes another second call than the others
  bool slow_report = false;  // a reader of an incomplete abort record may lose patience although its writer lives
  bool destroy = false;      // another thread of a rank destroys the group while a call waits
  bool raised_too = false;   // (a limit) no peer may write a tensor, even after the call has raised
};
constexpr Fault kFaults[] = {
    {.name = "none"},
    {.name = "death", .deaths = 1, .watched = true},
    {.name = "deaths", .deaths = 2, .watched = true},
    {.name = "late", .deadline = true},
    {.name = "stopped", .deaths = 1, .deadline = true},
    {.name = "bye", .leave_last = true},
    {.name = "leave", .leave = true, .leave_last = true},
    {.name = "disagree", .disagree = true},
    {.name = "destroy", .leave_last = true, .destroy = true},
    {.name = "slow_report", .deaths = 1, .deadline = true, .slow_report = true},
    {.name = "anything",
     .deaths = 1,
     .watched = true,
     .deadline = true,
     .leave = true,
     .leave_last = true,
     .slow_report = true,
     .destroy = true},
    // A known limit: the protocol does not hold here (README.md).
    {.name = "raised_too", .deadline = true, .raised_too = true},
};

enum class Mutant : uint8_t {
  none,
  one_parity_of_slots,
  one_header,
  header_before_fields,
  header_not_released,
  fields_not_acquired,
  any_header_counts,
  slot_after_header,
  last_peer_not_awaited,
  root_awaits_nobody,
  root_alone_awaited,
  root_alone_sends,
  zero_sends_nothing,
  no_done_wait,
  done_before_share,
  done_not_released,
  share_to_self,
  done_outranks_abort,
  no_compare_and_swap,
  complete_before_fields,
  incomplete_is_read,
  impatience_reads,
  own_sentence,
  nobody_named,
  abort_before_data,
  late_ignores_abort,
  waiting_ignores_abort,
  slot_before_abort,
  death_unnoticed,
  bye_unnoticed,
  deadline_ignored,
  descriptors_not_compared,
  destroyed_without_record,
};
constexpr const char* kMutants[] = {
    "none",
    "one parity for all slots",
    "one header for both parities",
    "the header goes before its fields",
    "the header is stored without release",
    "the fields are read before the header is there",
    "a header of an older call counts",
    "the slot is filled after the header is sent",
    "the last peer's header is not awaited",
    "the root of a broadcast awaits nobody",
    "a reader of a broadcast awaits the root alone",
    "only the root of a broadcast sends a header",
    "a call of 0 elements sends no header",
    "no done flag is awaited",
    "done is sent before the share is written",
    "done is stored without release",
    "the result is written to this rank alone",
    "done flags outrank the abort record",
    "the abort record is taken without compare-and-swap",
    "the abort record is complete before its fields",
    "an incomplete abort record is read",
    "a reader without patience reads an incomplete record",
    "a rank raises its own sentence, not the record's",
    "a record may name nobody",
    "the abort record and bye are looked at before the data",
    "a late rank ignores the abort record",
    "a waiting rank ignores the abort record",
    "the slot is filled before the abort record is looked at",
    "a death is not noticed",
    "a rank that left is not noticed",
    "the deadline is never looked at",
    "descriptors are not compared",
    "a group that is destroyed in a call leaves no record",
};
static_assert(std::size(kMutants) == static_cast<size_t>(Mutant::destroyed_without_record) + 1);

struct Config : explore::Config<Kind, Fault, Mutant> {
  bool full = false;
  int victim = -1;  // the only rank that may die; -1: any
};

// --- words ----------------------------------------------------------------------------------------------------------

// Plain words come first: they have a pending store. Rank d's pad has fields, epochs and done flags from each s.
class Layout {
 public:
  explicit Layout(int ranks) : ranks_(ranks) {}
  int fields(int d, int s, int parity) const { return (d * ranks_ + s) * 2 + parity; }
  int slot(int r, int parity, int share) const { return kSlots + (r * 2 + parity) * kMaxRanks + share; }
  int tensor(int r, int share) const { return kTensors + r * kMaxRanks + share; }
  int epoch(int d, int s, int parity) const { return kEpochs + (d * ranks_ + s) * 2 + parity; }
  int done(int d, int s) const { return kDone + d * ranks_ + s; }
  // Whose pad or arena a word lies in; the abort record is nobody's (rank 0's pad, which outlives rank 0).
  int owner(int word) const {
    if (word >= kDone) return (word - kDone) / ranks_;
    if (word >= kEpochs) return (word - kEpochs) / 2 / ranks_;
    if (word >= kRecord) return -1;
    if (word >= kTensors) return tensor_owner(word);
    return word >= kSlots ? (word - kSlots) / kMaxRanks / 2 : word / 2 / ranks_;
  }
  bool in_pad(int word) const { return word < kSlots || word >= kEpochs; }
  int tensor_owner(int word) const { return word >= kTensors && word < kRecord ? (word - kTensors) / kMaxRanks : -1; }

  std::string name(int word) const {
    const auto text = [](const char* format, int a, int b, int c = 0) {
      char buffer[96];
      std::snprintf(buffer, sizeof buffer, format, a, b, c);
      return std::string(buffer);
    };
    if (word >= kDone) return text("done[from %d] of rank %d", (word - kDone) % ranks_, (word - kDone) / ranks_);
    if (word >= kEpochs) return header("epoch", word - kEpochs);
    if (word >= kRecord) return word == kRecord ? "kind" : word == kRecord + 1 ? "reporter" : "culprits";
    if (word >= kTensors)
      return text("tensor of rank %d, share %d", (word - kTensors) / kMaxRanks, (word - kTensors) % kMaxRanks);
    if (word >= kSlots) {
      const int i = word - kSlots;
      return text("slot[%d] of rank %d, word %d", i / kMaxRanks % 2, i / kMaxRanks / 2, i % kMaxRanks);
    }
    return header("fields", word);
  }

  static constexpr int kSlots = 2 * kMaxRanks * kMaxRanks;  // after the fields
  static constexpr int kTensors = kSlots + 2 * kMaxRanks * kMaxRanks;
  static constexpr int kRecord = kTensors + kMaxRanks * kMaxRanks;  // kind, reporter, culprits
  static constexpr int kPlain = kRecord + 3;
  static constexpr int kEpochs = kPlain;
  static constexpr int kDone = kEpochs + 2 * kMaxRanks * kMaxRanks;
  static constexpr int kWords = kDone + kMaxRanks * kMaxRanks;

 private:
  std::string header(const char* what, int i) const {
    char buffer[96];
    std::snprintf(buffer, sizeof buffer, "%s in header[%d] from %d of rank %d", what, i % 2, i / 2 % ranks_,
                  i / 2 / ranks_);
    return buffer;
  }
  int ranks_;
};

// Contents of slots and tensors; headers and done flags hold the number of the call.
constexpr uint8_t input_of(int call) {
  return static_cast<uint8_t>(2 * call);
}
constexpr uint8_t result_of(int call) {
  return static_cast<uint8_t>(2 * call + 1);
}
constexpr uint8_t kSpoiled = 14;  // a sum over kReused
constexpr uint8_t kReused = 15;   // whatever a caller puts into its tensor after its call has raised
constexpr uint8_t kOddDescriptor = 8;

// --- programs -------------------------------------------------------------------------------------------------------

enum class Op : uint8_t {
  fill,         // plain store by the caller, before the call
  begin,        // the op begins: looks at the abort record (group_for())
  check,        // looks at the abort record
  store,        // plain
  release,      // store to an atomic word, after everything before
  relaxed,      // store to an atomic word (mutants)
  wait_header,  // until the epoch is this call's
  wait_done,    // until it is this call's or a later one's
  read,         // plain
  compare,      // descriptors, all of which have been read
  end,          // the call returns
};

struct Instruction {
  Op op;
  uint8_t call;
  uint8_t peer;  // of a wait
  uint8_t value;
  int word;
};

struct Program {
  std::vector<Instruction> code;
  std::array<int, kMaxCalls + 2> begin{};  // of each call, counted from 1; then the end
  std::array<int, kMaxCalls + 2> end{};
  struct Use {
    int pc;
    uint8_t value;
  };
  std::array<std::vector<Use>, Layout::kWords> uses;  // who reads a word, and which value it needs
};

bool is_broadcast(Kind kind) {
  return kind == Kind::broadcast || kind == Kind::broadcast_in_place;
}

Program make_program(const Config& config, const Layout& at, int me) {
  const int ranks = config.ranks;
  const auto mutant = [&](Mutant m) { return config.mutant == m; };
  Program program;
  for (int call = 1; call <= static_cast<int>(config.calls.size()); call++) {
    Kind kind = config.calls[call - 1];
    const bool odd = config.odd_rank >= 0 && call == 2;
    if (odd && me == config.odd_rank) kind = kind == Kind::one_shot ? Kind::two_shot : Kind::one_shot;
    const int slot_parity = mutant(Mutant::one_parity_of_slots) ? 0 : call & 1;
    const int parity = mutant(Mutant::one_header) ? 0 : call & 1;
    const int root = call % ranks;
    const bool broadcast = is_broadcast(kind);
    const bool two_shot = kind == Kind::two_shot || kind == Kind::in_place || kind == Kind::mixed;
    const bool finishes = two_shot || kind == Kind::broadcast_in_place;
    const auto inside = [&](int r) {  // its tensor lies in the arena and is used where it lies
      return kind == Kind::in_place || (kind == Kind::mixed && r != ranks - 1) || kind == Kind::broadcast_in_place;
    };
    const auto data = [&](int r, int share) {
      return inside(r) ? at.tensor(r, share) : at.slot(r, slot_parity, share);
    };
    const auto add = [&](Op op, int word, int value, int peer = 0) {
      program.code.push_back(
          {op, static_cast<uint8_t>(call), static_cast<uint8_t>(peer), static_cast<uint8_t>(value), word});
    };
    const auto each_peer = [&](const auto& body) {  // the next rank first, as the code does
      for (int step = 1; step < ranks; step++) body((me + step) % ranks);
    };
    const bool silent = mutant(Mutant::zero_sends_nothing) && kind == Kind::zero;
    const auto sends = [&] { return !silent && !(mutant(Mutant::root_alone_sends) && broadcast && me != root); };
    const auto awaits = [&](int peer) {
      if (silent) return false;
      if (mutant(Mutant::root_awaits_nobody) && broadcast && me == root) return false;
      if ((mutant(Mutant::root_alone_awaited) || mutant(Mutant::root_alone_sends)) && broadcast) return peer == root;
      return true;
    };
    const int shares = two_shot ? ranks : broadcast && me != root ? 0 : kind == Kind::zero ? 0 : 1;
    const auto stage = [&] {
      for (int i = 0; i < shares; i++) {
        if (!inside(me)) add(Op::store, at.slot(me, slot_parity, i), input_of(call));
      }
    };
    const auto send_done = [&] {
      each_peer([&](int peer) {
        add(mutant(Mutant::done_not_released) ? Op::relaxed : Op::release, at.done(peer, me), call);
      });
    };

    program.begin[call] = static_cast<int>(program.code.size());
    for (int i = 0; i < shares; i++) {
      if (inside(me)) add(Op::fill, at.tensor(me, i), input_of(call));
    }
    if (mutant(Mutant::slot_before_abort)) stage();
    add(Op::begin, -1, 0);
    if (!mutant(Mutant::slot_before_abort) && !mutant(Mutant::slot_after_header)) stage();
    if (!mutant(Mutant::late_ignores_abort)) add(Op::check, -1, 0);  // start()
    each_peer([&](int peer) {
      if (!sends()) return;
      const int fields = call + (odd && me == config.odd_rank ? kOddDescriptor : 0);
      const Op store = mutant(Mutant::header_not_released) ? Op::relaxed : Op::release;
      if (mutant(Mutant::header_before_fields)) add(store, at.epoch(peer, me, parity), call);
      add(Op::store, at.fields(peer, me, parity), fields);
      if (!mutant(Mutant::header_before_fields)) add(store, at.epoch(peer, me, parity), call);
    });
    if (mutant(Mutant::slot_after_header)) stage();

    const auto wait_headers = [&] {  // arrive()
      each_peer([&](int peer) {
        if (mutant(Mutant::last_peer_not_awaited) && peer == (me + ranks - 1) % ranks) return;
        if (awaits(peer)) add(Op::wait_header, at.epoch(me, peer, parity), call, peer);
      });
    };
    const auto read_fields = [&] {
      each_peer([&](int peer) {
        const int fields = call + (odd && peer == config.odd_rank ? kOddDescriptor : 0);
        if (awaits(peer)) add(Op::read, at.fields(me, peer, parity), fields, peer);
      });
    };
    if (mutant(Mutant::fields_not_acquired)) read_fields();
    wait_headers();
    if (!mutant(Mutant::fields_not_acquired)) read_fields();
    if (odd && !mutant(Mutant::descriptors_not_compared)) add(Op::compare, -1, 0);

    if (kind == Kind::one_shot) each_peer([&](int peer) { add(Op::read, data(peer, 0), input_of(call), peer); });
    if (broadcast && me != root) add(Op::read, data(root, 0), input_of(call), root);
    if (mutant(Mutant::done_before_share) && finishes) send_done();
    if (two_shot) {
      for (int r = 0; r < ranks; r++) add(Op::read, data(r, me), input_of(call), r);
      for (int r = 0; r < ranks; r++) {
        if (r == me || !mutant(Mutant::share_to_self)) add(Op::store, data(r, me), result_of(call), r);
      }
    }
    if (finishes) {
      if (!mutant(Mutant::done_before_share)) send_done();
      each_peer([&](int peer) {
        if (!mutant(Mutant::no_done_wait)) add(Op::wait_done, at.done(me, peer), call, peer);
      });
      // A peer that had sent its done may have raised since, and its caller may have reused the tensor that this rank
      // has read. Whoever raises does so after the record is written.
      if (!mutant(Mutant::done_outranks_abort)) add(Op::check, -1, 0);
    }
    if (two_shot) {  // copied out of the slot, or used by the caller where it lies
      for (int i = 0; i < ranks; i++) add(Op::read, data(me, i), result_of(call), me);
    }
    program.end[call] = static_cast<int>(program.code.size());
    add(Op::end, -1, 0);
  }
  program.begin[config.calls.size() + 1] = static_cast<int>(program.code.size());
  for (int pc = 0; pc < static_cast<int>(program.code.size()); pc++) {
    const Instruction& in = program.code[pc];
    if (in.op == Op::read || in.op == Op::wait_header) program.uses[in.word].push_back({pc, in.value});
  }
  return program;
}

// --- states ---------------------------------------------------------------------------------------------------------

enum Step : uint8_t {  // of a rank; the last but one to `complete` also of a watcher
  kRun,
  kFindCulprits,  // a wait has been given up
  kTake,          // the abort record, by compare-and-swap
  kTakeBlindly,   // (mutant)
  kWriteKind,
  kWriteReporter,
  kWriteCulprits,
  kComplete,
  kAwaitComplete,
  kReadRecord,
  kDead,
  kLeft,
};
enum AbortKind : uint8_t { kMissing = 1, kDied, kLeftGroup, kDisagree };
constexpr const char* kAbortKinds[] = {"no reason,", "missing", "died", "left", "disagree"};
enum RecordState : uint8_t { kEmpty, kBeingWritten, kRecordComplete, kAbandoned };  // the last two are for ever

struct Process {
  uint8_t pc, step;
  uint8_t kind, culprits;             // what it reports
  uint8_t spoiled;                    // has read memory in this call that its owner reuses
  uint8_t late;                       // its call began after the group was broken
  uint8_t raised;                     // how often
  uint8_t odd;                        // whose descriptor is another (bits)
  uint8_t watcher, subject, handled;  // step of the watcher thread, whose death it reports, deaths it has seen (bits)
  uint8_t left;                       // who said bye, as far as the watcher has told (bits)
  uint8_t closing;                    // its group is being destroyed by another thread
};

struct State {
  std::array<Process, kMaxRanks> process;
  uint8_t record, record_writer;  // RecordState; the rank that took it
  uint8_t said;                   // a rank has raised `sentence`
  std::array<uint8_t, 3> sentence;
  uint8_t faults, deaths, gone;  // whether there was any; how many died; died or left
  std::array<uint8_t, Layout::kWords> now;
  std::array<uint8_t, Layout::kPlain> pending;  // 0, or (thread + 1) << 4 | value before
};

enum class Action : uint8_t { step, give_up_at_deadline, lose_patience, watch, leave, destroy, die };

struct Move {
  uint8_t rank;
  Action action;
  uint16_t choice;  // bits: which value each racy read gets
};

// --- the machine ----------------------------------------------------------------------------------------------------

class Machine : public explore::Narrator {
 public:
  explicit Machine(const Config& config) : config_(config), at_(config.ranks) {
    for (int r = 0; r < config.ranks; r++) programs_.push_back(make_program(config, at_, r));
  }

  State initial() const {
    State state;
    std::memset(static_cast<void*>(&state), 0, sizeof state);
    for (int r = config_.ranks; r < kMaxRanks; r++) state.process[r].step = kLeft;
    return state;
  }

  template <class Visit>
  void each_move(const State& state, const Visit& visit) {
    for (int rank = 0; rank < config_.ranks; rank++) {
      for (const Action action : {Action::step, Action::give_up_at_deadline, Action::lose_patience, Action::watch,
                                  Action::leave, Action::destroy, Action::die}) {
        if (impossible(state, rank, action)) continue;
        const bool fault =
            action == Action::die || action == Action::destroy || (action == Action::leave && !over(state, rank));
        for (int choice = 0, bits = 0; choice < 1 << bits; choice++) {
          const Move move{static_cast<uint8_t>(rank), action, static_cast<uint16_t>(choice)};
          State next = state;
          if (!apply(next, move)) break;
          bits = choices_;
          visit(next, move, !fault);
        }
      }
    }
  }

  // False when the move is not possible now. Afterwards choices_ says how many bits of `choice` were used.
  bool apply(State& state, Move move, std::vector<std::string>* log = nullptr) {
    begin_move(log);
    choice_ = move.choice;
    choices_ = 0;
    const int r = move.rank;
    switch (move.action) {
      case Action::step:
        return step(state, r);
      case Action::give_up_at_deadline:
        return config_.fault.deadline && config_.mutant != Mutant::deadline_ignored && give_up(state, r, true);
      case Action::lose_patience:
        return lose_patience(state, r);
      case Action::watch:
        return watch(state, r);
      case Action::leave:
        return leave(state, r);
      case Action::destroy:
        return destroy(state, r);
      default:
        return die(state, r);
    }
  }

  // Empty when a state in which nobody can go on is a legal end: everybody has ended, died or left.
  std::string stuck(const State& state) const {
    std::string who;
    for (int r = 0; r < config_.ranks; r++) {
      if (!over(state, r)) who += (who.empty() ? "" : "; ") + where(state, r);
    }
    return who.empty() ? "" : "deadlock: nobody can go on. " + who;
  }

  std::string where(const State& state, int r) const {
    const Process& p = state.process[r];
    const std::string me = "rank " + std::to_string(r);
    if (p.step == kDead) return me + " is dead";
    if (p.step == kLeft) return me + " has left";
    if (over(state, r)) return me + (p.raised != 0 ? " has raised" : " has made all calls");
    const Instruction& in = instruction(p, r);
    const std::string call = me + " in call " + std::to_string(in.call);
    if (p.step == kAwaitComplete) return call + " waits for the end of the abort record";
    if (p.step != kRun) return call + " writes or reads the abort record";
    if (in.op == Op::wait_header) return call + " waits for the header of rank " + std::to_string(in.peer);
    if (in.op == Op::wait_done) return call + " waits for done of rank " + std::to_string(in.peer);
    return call;
  }

  // Whether it will do nothing more by itself.
  bool over(const State& state, int r) const {
    const Process& p = state.process[r];
    return p.step >= kDead || (p.step == kRun && p.pc == programs_[r].code.size());
  }

 private:
  // A quick answer to most of the moves that apply() would refuse.
  bool impossible(const State& state, int rank, Action action) const {
    const Process& p = state.process[rank];
    switch (action) {
      case Action::step:
        return p.step >= kDead;
      case Action::give_up_at_deadline:
        return !config_.fault.deadline || p.step != kRun;
      case Action::lose_patience:
        return p.step != kAwaitComplete || state.record != kBeingWritten;
      case Action::watch:
        return state.gone == 0;
      case Action::leave:
        return !config_.fault.leave_last || p.step != kRun;
      case Action::destroy:
        return !config_.fault.destroy || p.step != kRun;
      default:
        return state.deaths == config_.fault.deaths || p.step >= kDead ||
               (config_.victim >= 0 && rank != config_.victim);
    }
  }

  const Instruction& instruction(const Process& p, int r) const { return programs_[r].code[p.pc]; }
  bool mutant(Mutant m) const { return config_.mutant == m; }

  std::string value_name(int word, int value) const {
    if (value == kReused) return "what its caller wrote there after the call had raised";
    if (value == kSpoiled) return "a sum over reused memory";
    if (word >= Layout::kRecord && word < Layout::kPlain) return std::to_string(value);
    if (value == 0) return "nothing yet";
    if (word < Layout::kSlots || word >= Layout::kPlain) return "call " + std::to_string(value & 7);
    return (value % 2 == 0 ? "input of call " : "result of call ") + std::to_string(value / 2);
  }

  // --- memory. A thread is a rank r, or its watcher, kMaxRanks + r.

  uint8_t load(const State& state, int thread, int word) {
    const uint8_t pending = word < Layout::kPlain ? state.pending[word] : 0;
    if (pending == 0 || (pending >> 4) - 1 == thread) return state.now[word];
    return (choice_ >> choices_++ & 1) == 0 ? state.now[word] : pending & 15;
  }

  void store_plain(State& state, int thread, int word, uint8_t value) {
    uint8_t& pending = state.pending[word];
    const uint8_t before = pending == 0 ? state.now[word] : pending & 15;
    pending = static_cast<uint8_t>((thread + 1) << 4 | before);
    state.now[word] = value;
  }

  void commit(State& state, int thread, int call) {
    for (int word = 0; word < Layout::kPlain; word++) {
      if ((state.pending[word] >> 4) - 1 != thread) continue;
      state.pending[word] = 0;
      check_not_returned(state, thread % kMaxRanks, word, call);
    }
  }

  // Nobody may write what another rank still has to read.
  void check_unread(const State& state, int r, int word, uint8_t value) {
    const uint8_t old = state.now[word];
    if (old == value) return;
    for (int q = 0; q < config_.ranks; q++) {
      const Process& p = state.process[q];
      if (q == r || p.step != kRun) continue;
      for (const Program::Use& use : programs_[q].uses[word]) {
        if (use.pc >= p.pc && use.value == old) {
          violate(r, "overwrites " + at_.name(word) + " while rank " + std::to_string(q) + " still has to read " +
                         value_name(word, old) + " there");
        }
      }
    }
  }

  // A tensor belongs to its caller again once the call has returned. (After a call that raised, a peer that has not
  // noticed may still touch it, a known limit. It must not return what it computed from it: `spoiled`.)
  void check_not_returned(const State& state, int r, int word, int call) {
    const int owner = at_.tensor_owner(word);
    if (owner < 0 || owner == r) return;
    const Process& p = state.process[owner];
    if (p.step >= kDead || p.raised != 0) return;
    const int value = state.now[word];
    const int of_call = value < kSpoiled ? value / 2 : call;
    if (p.pc > programs_[owner].end[of_call]) {
      violate(r, "writes " + at_.name(word) + ", " + value_name(word, value) + ", after that call of rank " +
                     std::to_string(owner) + " has returned");
    }
  }

  // --- a rank's own thread

  bool step(State& state, int r) {
    Process& p = state.process[r];
    switch (p.step) {
      case kRun:
        return run(state, r, false);
      case kFindCulprits:
        find_culprits(state, r);
        return true;
      case kAwaitComplete:
        if (state.record < kRecordComplete && !mutant(Mutant::incomplete_is_read)) return false;
        if (talks()) say(r, instruction(p, r).call, "no longer waits for the end of the abort record");
        p.step = kReadRecord;
        if (config_.full) return true;
        [[fallthrough]];
      case kReadRecord:
        raise(state, r);
        return run(state, r, true);
      case kDead:
      case kLeft:
        return false;
      default:
        p.step = report(state, r, r, p.step, p.kind, p.culprits);
        if (p.closing != 0 && p.step == kAwaitComplete) close(state, r);
        return true;
    }
  }

  // The next instruction, and those that belong to the same step. `begun`: the step has done something already.
  bool run(State& state, int r, bool begun) {
    Process& p = state.process[r];
    const Program& program = programs_[r];
    for (Op before = Op::end; p.pc < program.code.size(); begun = true) {
      const Instruction& in = program.code[p.pc];
      const auto reads = [](Op op) { return op == Op::read || op == Op::compare; };
      const bool local = in.op == Op::end || in.op == Op::compare;
      const bool again = in.op == Op::begin && p.raised != 0 && state.record >= kRecordComplete;
      const bool joins =
          local ||
          (!config_.full && (in.op == Op::store || in.op == Op::fill || (reads(in.op) && reads(before)) || again));
      if (begun && !joins) return true;
      if (!execute(state, r, in)) return begun;
      before = in.op;
      if (p.step != kRun || !violation().empty()) return true;
    }
    return begun;
  }

  // One instruction; false when it has to wait.
  bool execute(State& state, int r, const Instruction& in) {
    Process& p = state.process[r];
    switch (in.op) {
      case Op::begin:
        p.late = state.record >= kRecordComplete || p.raised != 0;
        if (!mutant(Mutant::late_ignores_abort)) return look_at_abort(state, r, "begins the call");
        if (talks()) say(r, in.call, "begins the call");
        break;
      case Op::check:
        return look_at_abort(state, r, "looks at the abort record: empty");
      case Op::fill:
      case Op::store:
        plain_store(state, r, in);
        break;
      case Op::release:
      case Op::relaxed:
        if (in.op == Op::release) commit(state, r, in.call);
        if (at_.done(0, 0) > in.word) check_unread(state, r, in.word, in.value);
        if (!is_lost(state, in.word)) state.now[in.word] = in.value;
        if (talks()) {
          say(r, in.call,
              std::string(in.op == Op::release ? "releases " : "stores, without release, ") + at_.name(in.word) +
                  " = call " + std::to_string(in.value));
        }
        break;
      case Op::wait_header:
      case Op::wait_done:
        if (mutant(Mutant::abort_before_data) && (state.record != kEmpty || (p.left >> in.peer & 1) != 0)) {
          return give_up(state, r, false);
        }
        if (!present(state, in, in.word)) return give_up(state, r, false);
        if (talks()) say(r, in.call, "finds " + at_.name(in.word) + " = call " + std::to_string(state.now[in.word]));
        break;
      case Op::read:
        read(state, r, in);
        break;
      case Op::compare: {
        const int reference = p.odd & 1;
        for (int q = 1; q < config_.ranks; q++) {
          if ((p.odd >> q & 1) == reference) continue;
          p.kind = kDisagree;
          p.culprits = 1 << q;
          p.step = kTake;
          if (talks()) say(r, in.call, "sees that the descriptors of ranks 0 and " + std::to_string(q) + " differ");
          return true;
        }
        break;
      }
      case Op::end:
        if (talks()) say(r, in.call, "returns");
        if (p.spoiled != 0) {
          violate(r, "returns wrong data from call " + std::to_string(in.call) +
                         ": it was computed from memory that a peer's caller had reused after that peer's call raised");
        }
        if (p.late != 0) {
          violate(r, "returns from call " + std::to_string(in.call) + ", which began after the group was broken");
        }
        p.spoiled = p.late = p.odd = 0;
    }
    p.pc++;
    return true;
  }

  bool look_at_abort(State& state, int r, const char* what) {
    Process& p = state.process[r];
    if (state.record == kEmpty) {
      if (talks()) say(r, instruction(p, r).call, what);
      p.pc++;
    } else {
      if (talks()) say(r, instruction(p, r).call, "finds an abort record");
      meet_record(state, r);
    }
    return true;
  }

  void plain_store(State& state, int r, const Instruction& in) {
    const Process& p = state.process[r];
    const int owner = at_.tensor_owner(in.word);
    // After an error a tensor holds what its caller likes, which is wrong for everybody else: nothing changes that.
    if (owner >= 0 && state.process[owner].raised != 0) {
      if (config_.fault.raised_too && owner != r) {
        violate(r, "writes " + at_.name(in.word) + " after the call of rank " + std::to_string(owner) + " has raised");
      }
      if (talks()) say(r, in.call, "stores " + at_.name(in.word) + ", which its caller uses for something else");
      return;
    }
    if (is_lost(state, in.word)) {
      if (talks()) say(r, in.call, "stores " + at_.name(in.word) + ", where nobody reads it any more");
      return;
    }
    const uint8_t value = p.spoiled != 0 && in.op == Op::store ? kSpoiled : in.value;
    check_unread(state, r, in.word, value);
    const int pending = state.pending[in.word] >> 4;
    if (pending != 0 && pending - 1 != r) {
      violate("ranks " + std::to_string(r) + " and " + std::to_string(pending - 1) + " both store to " +
              at_.name(in.word) + ", in no order");
    }
    store_plain(state, r, in.word, value);
    check_not_returned(state, r, in.word, in.call);
    if (talks())
      say(r, in.call,
          (in.op == Op::fill ? "(its caller) stores " : "stores ") + at_.name(in.word) + " = " +
              value_name(in.word, value));
  }

  void read(State& state, int r, const Instruction& in) {
    Process& p = state.process[r];
    const int before = choices_;
    const uint8_t value = load(state, r, in.word);
    if (talks()) {
      say(r, in.call,
          "reads " + at_.name(in.word) + ": " + value_name(in.word, value) +
              (choices_ != before ? " (its writer has not released it)" : ""));
    }
    if (value >= kSpoiled) {
      p.spoiled = 1;
    } else if (value != in.value) {
      violate(r, "reads " + value_name(in.word, value) + " in " + at_.name(in.word) + ", expected " +
                     value_name(in.word, in.value));
    }
    if (in.word < Layout::kSlots && (value & kOddDescriptor) != 0) p.odd |= 1 << in.peer;
    if (r == config_.odd_rank) p.odd |= 1 << r;
  }

  bool present(const State& state, const Instruction& in, int word) const {
    const uint8_t value = state.now[word];
    if (in.op == Op::wait_done) return value >= in.call;
    return mutant(Mutant::any_header_counts) ? value != 0 : value == in.call;
  }

  // --- failure

  // wait_until() looks for the data, then for a reason to give up, then for the data again. All reasons are for ever,
  // so the last look, at which the data is absent, decides: one step.
  bool give_up(State& state, int r, bool deadline) {
    Process& p = state.process[r];
    if (p.step != kRun || over(state, r)) return false;
    const Instruction& in = instruction(p, r);
    if (in.op != Op::wait_header && in.op != Op::wait_done) return false;
    if (present(state, in, in.word) && !(mutant(Mutant::abort_before_data) && !deadline)) return false;
    const bool record = state.record != kEmpty && !mutant(Mutant::waiting_ignores_abort);
    const bool left = (p.left >> in.peer & 1) != 0;
    if (!deadline && !record && !left) return false;
    if (deadline && (record || left) && !config_.full) return false;  // needs no deadline
    if (talks()) {
      say(r, in.call,
          "gives up waiting for " + at_.name(in.word) +
              (deadline ? ": the deadline has passed"
               : record ? ": there is an abort record"
                        : ": that rank left"));
    }
    if (deadline) state.faults = 1;
    p.step = kFindCulprits;
    if (config_.full) return true;
    if (record) {
      meet_record(state, r);  // it will not be empty again: the own report would come to nothing
    } else if (!mutant(Mutant::nobody_named)) {
      find_culprits(state, r);
    }
    return true;
  }

  // There is an abort record: wait for its end and raise it.
  void meet_record(State& state, int r) {
    Process& p = state.process[r];
    p.step = kAwaitComplete;
    if (!config_.full && state.record >= kRecordComplete) raise(state, r);
  }

  void find_culprits(State& state, int r) {
    Process& p = state.process[r];
    const Instruction& in = instruction(p, r);
    const bool left = (p.left >> in.peer & 1) != 0;
    const int stride = in.op == Op::wait_header ? 2 : 1;  // from one peer's word to the next one's
    p.kind = left ? kLeftGroup : kMissing;
    p.culprits = 0;
    for (int q = 0; q < config_.ranks; q++) {
      const bool counts = q != r && (!left || (p.left >> q & 1) != 0);
      if (counts && !present(state, in, in.word + (q - in.peer) * stride)) p.culprits |= 1 << q;
    }
    if (!config_.full && p.culprits != 0) p.culprits = 1 << in.peer;
    if (mutant(Mutant::abort_before_data) && p.culprits == 0) p.culprits = 1 << in.peer;
    const bool all_came = p.culprits == 0 && state.record == kEmpty && !mutant(Mutant::nobody_named);
    p.step = all_came ? kRun : kTake;
    if (talks())
      say(r, in.call,
          all_came ? "looks who is missing: nobody any more"
                   : std::string("wants to report ") + sentence(p.kind, r, p.culprits));
  }

  // A step of report(), by a rank or its watcher. Returns the next step.
  uint8_t report(State& state, int r, int thread, uint8_t step, uint8_t kind, uint8_t culprits) {
    const bool watcher = thread >= kMaxRanks;
    const char* who = watcher ? "its watcher " : "";
    const auto after = static_cast<uint8_t>(watcher ? kRun : kAwaitComplete);
    const auto field = [&](int i, uint8_t value) {
      store_plain(state, thread, Layout::kRecord + i, value);
      if (talks())
        say(r, 0,
            std::string(who) + "stores " + at_.name(Layout::kRecord + i) + " = " + std::to_string(value) +
                " in the abort record");
    };
    switch (step) {
      case kTake:
        if (state.record != kEmpty) {
          if (talks()) say(r, 0, std::string(who) + "finds the abort record taken");
          return after;
        }
        if (mutant(Mutant::no_compare_and_swap)) {
          if (talks()) say(r, 0, std::string(who) + "finds the abort record empty");
          return kTakeBlindly;
        }
        [[fallthrough]];
      case kTakeBlindly:
        commit(state, thread, 0);
        state.record = mutant(Mutant::complete_before_fields) ? kRecordComplete : kBeingWritten;
        state.record_writer = static_cast<uint8_t>(r);
        if (talks()) say(r, 0, std::string(who) + "takes the abort record");
        if (config_.full) return kWriteKind;
        field(0, kind);
        field(1, static_cast<uint8_t>(r));
        field(2, culprits);
        return kComplete;
      case kWriteKind:
        field(0, kind);
        return kWriteReporter;
      case kWriteReporter:
        field(1, static_cast<uint8_t>(r));
        return kWriteCulprits;
      case kWriteCulprits:
        field(2, culprits);
        return kComplete;
      default:  // kComplete
        commit(state, thread, 0);
        if (state.record == kAbandoned) {
          if (talks()) say(r, 0, std::string(who) + "finds that its report was abandoned");
          return after;
        }
        state.record = kRecordComplete;
        if (talks()) say(r, 0, std::string(who) + "releases the abort record: " + sentence(kind, r, culprits));
        if (culprits == 0) violate("the abort record of rank " + std::to_string(r) + " names nobody");
        return after;
    }
  }

  bool lose_patience(State& state, int r) {
    Process& p = state.process[r];
    if (p.step != kAwaitComplete || state.record != kBeingWritten) return false;
    const bool dead = state.process[state.record_writer].step == kDead;
    if (!dead && !config_.fault.slow_report) return false;
    if (mutant(Mutant::impatience_reads)) {
      p.step = kReadRecord;
    } else {
      state.record = kAbandoned;
    }
    if (talks()) say(r, instruction(p, r).call, "has waited for the end of the abort record long enough");
    return true;
  }

  void raise(State& state, int r) {
    Process& p = state.process[r];
    const int call = instruction(p, r).call;
    std::array<uint8_t, 3> read;
    for (int i = 0; i < 3; i++) read[i] = state.record == kAbandoned ? 0 : load(state, r, Layout::kRecord + i);
    if (mutant(Mutant::own_sentence) && p.kind != 0) read = {p.kind, static_cast<uint8_t>(r), p.culprits};
    const auto text = [&](const std::array<uint8_t, 3>& s) { return sentence(s[0], s[1], s[2]); };
    if (talks()) say(r, call, "raises: " + text(read));
    if (state.said != 0 && state.sentence != read) {
      violate(r, "raises '" + text(read) + "', another sentence than '" + text(state.sentence) + "'");
    }
    const bool cause = state.faults != 0 || config_.fault.disagree;
    if (!cause) violate(r, "raises, and nothing is wrong");
    state.said = 1;
    state.sentence = read;
    p.spoiled = p.late = p.odd = p.kind = p.culprits = 0;
    p.step = kRun;
    // The caller reuses its tensor, and tries once more.
    const Program& program = programs_[r];
    reuse_tensor(state, r);
    p.pc = static_cast<uint8_t>(p.raised == 0 ? program.begin[call + 1] : program.code.size());
    p.raised = 1;
  }

  void reuse_tensor(State& state, int r) {
    for (int i = 0; i < config_.ranks; i++) {
      const int word = at_.tensor(r, i);
      if (state.now[word] != 0) store_plain(state, r, word, kReused);
    }
  }

  std::string sentence(int kind, int reporter, int culprits) const {
    std::string who;
    for (int r = 0; r < config_.ranks; r++) {
      if ((culprits >> r & 1) != 0) who += (who.empty() ? "" : "+") + std::to_string(r);
    }
    return std::string(kAbortKinds[kind]) + " " + (who.empty() ? "nobody" : who) + " (seen by " +
           std::to_string(reporter) + ")";
  }

  // --- the watcher thread, and faults

  bool watch(State& state, int r) {
    Process& p = state.process[r];
    if (p.step >= kDead) return false;
    if (p.watcher != kRun) {
      p.watcher = report(state, r, kMaxRanks + r, p.watcher, kDied, static_cast<uint8_t>(1 << p.subject));
      return true;
    }
    for (int q = 0; q < config_.ranks; q++) {
      const uint8_t bit = 1 << q;
      const uint8_t end = state.process[q].step;
      if (end == kLeft && (p.left & bit) == 0 && !mutant(Mutant::bye_unnoticed)) {
        if (talks()) say(r, 0, "its watcher hears bye from rank " + std::to_string(q));
        p.left |= bit;
        return true;
      }
      if (end == kDead && config_.fault.watched && (p.handled & bit) == 0 && !mutant(Mutant::death_unnoticed)) {
        if (state.record != kEmpty && !config_.full) return false;  // its report would come to nothing
        if (talks()) say(r, 0, "its watcher notices the death of rank " + std::to_string(q));
        p.handled |= bit;
        p.subject = static_cast<uint8_t>(q);
        p.watcher = config_.full ? static_cast<uint8_t>(kTake) : report(state, r, kMaxRanks + r, kTake, kDied, bit);
        return true;
      }
    }
    return false;
  }

  bool leave(State& state, int r) {
    Process& p = state.process[r];
    const bool early = !over(state, r);
    if (p.step != kRun || (early && (!config_.fault.leave || instruction(p, r).op != Op::begin))) return false;
    if (p.watcher != kRun) return false;  // destroy() joins the watcher thread, which ends its report first
    if (talks()) say(r, 0, early ? "says bye before its next call" : "says bye after its last call");
    if (early) state.faults = 1;
    forget(state, r, kLeft);
    return true;
  }

  // The call that waits raises a sentence of its own, after it has told the others.
  bool destroy(State& state, int r) {
    Process& p = state.process[r];
    if (p.step != kRun || over(state, r) || p.watcher != kRun) return false;
    const Instruction& in = instruction(p, r);
    if ((in.op != Op::wait_header && in.op != Op::wait_done) || present(state, in, in.word)) return false;
    if (talks()) say(r, in.call, "is told, while it waits, that its group is being destroyed");
    state.faults = 1;
    p.closing = 1;
    p.kind = kLeftGroup;
    p.culprits = 1 << r;
    p.step = kTake;
    if (mutant(Mutant::destroyed_without_record)) close(state, r);
    return true;
  }

  void close(State& state, int r) {
    if (talks()) say(r, 0, "raises that its group was destroyed, and says bye");
    reuse_tensor(state, r);
    state.process[r].raised = 1;
    forget(state, r, kLeft);
  }

  bool die(State& state, int r) {
    Process& p = state.process[r];
    if (state.deaths == config_.fault.deaths || p.step >= kDead) return false;
    state.deaths++;
    state.faults = 1;
    // What it has not released stays pending for ever: whoever reads it gets either value each time, which is more than
    // can happen.
    if (talks()) say(r, 0, config_.fault.watched ? "dies" : "stops for ever");
    forget(state, r, kDead);
    return true;
  }

  // A process that is gone reads nothing any more: what it had in mind, and its pad, make no difference.
  void forget(State& state, int r, Step end) {
    state.gone++;
    Process& p = state.process[r];
    const Process gone{0, end, 0, 0, 0, 0, p.raised, 0, 0, 0, 0, 0, 0};
    p = gone;
    for (int word = 0; word < Layout::kWords; word++) {
      if (at_.owner(word) != r || !at_.in_pad(word)) continue;
      state.now[word] = 0;
      if (word < Layout::kPlain) state.pending[word] = 0;
    }
  }
  // A store to a process that is gone: its pad is read by nobody, and of its arena each peer reads only what nobody
  // else writes.
  bool is_lost(const State& state, int word) const { return state.process[at_.owner(word)].step >= kDead; }

  Config config_;
  Layout at_;
  std::vector<Program> programs_;
  int choice_ = 0;
  int choices_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  const explore::Command<Config, State, Move, Machine> command{.program = "protocol_model",
                                                               .kinds = kKinds,
                                                               .mutants = kMutants,
                                                               .faults = kFaults,
                                                               .max_ranks = kMaxRanks,
                                                               .max_calls = kMaxCalls,
                                                               .switches = {{"--full", &Config::full}},
                                                               .numbers = {{"--victim", &Config::victim}}};
  return command.run(argc, argv);
}
