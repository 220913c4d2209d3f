// The protocol between GPUs (csrc/signal/pad_cuda.h, csrc/collective, csrc/fused) as a partial order of accesses to
// shared words, and a search through every order in which 2 to 4 ranks can make them.
//
//   gpu_model --ranks 3 --calls one_shot,fused_two_shot,zero --fault late [--mutant NAME] [--in-order] [--two-tiles]
//   gpu_model --ranks 2 --any one_shot,copy,direct --length 3            every sequence of 3 of these
//   gpu_model --mutants | --faults | --kinds                             the names
//
// A call is a kernel: some threads (one for headers, one a chunk of a sum, or math and reducer) and a list of accesses.
// What comes before what is said explicitly (Op::needs), because a GPU orders little by itself: a load that is awaited
// comes before what follows from it, everything comes before the end of its kernel, and the next kernel's accesses come
// after that (griddepcontrol.wait). Two stores of a thread are in no order, unless a fence and a release say so. With
// --in-order a thread's accesses are made one after the other: fewer states, for four ranks. The fused kernels have two
// tiles between two ranks, and one between more without --two-tiles.
//
// A state is the set of accesses that each rank has made, and all words. The search and the command are explore.h's.
//
// Two accesses are made as soon as they can be, which hides nothing. A look at a sentinel slot: that it is late shows
// in the store of the sentinel, which is an access of its own. The end of a kernel: the next one's accesses are not
// forced. What is overwritten too early is found at the store that does it.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "explore.h"

namespace {

constexpr int kMaxRanks = 4, kMaxCalls = 4, kTiles = 2;
using Mask = unsigned __int128;

// --- what is modelled -----------------------------------------------------------------------------------------------

enum class Kind : uint8_t {
  one_shot,
  two_shot,
  direct,
  copy,
  zero,
  fused,
  fused_two_shot,
  prefill,
  exchange,
  direct_read
};
constexpr const char* kKinds[] = {
    "one_shot",  // sentinel slots; between two ranks two chunks, of one CTA each
    "two_shot",  // partials to their owner, sums to everybody: sentinel slots, too
    "direct",  // contributions to the owners' staging memory, arrived flags, headers; sums to everybody in place, done
               // flags
    "copy",    // broadcast through small slots, whose words carry their epoch; the root is rank 0, in the fourth call
               // rank 1
    "zero",    // headers alone: a barrier, 0 elements, what the process group will do. One CTA
    "fused",   // the decode kernel, one-shot: two tiles between two ranks, else one
    "fused_two_shot",  // the decode kernel, two-shot: results are collected one tile late
    "prefill",         // the prefill kernel: partials and their flags to the owner, sums to everybody, done flags
    "exchange",        // the same between two ranks, which both sum all tiles
    "direct_read",  // direct between ranks that share a GPU: owners read everybody's tensor instead, behind the headers
};

constexpr bool is_direct(Kind kind) {
  return kind == Kind::direct || kind == Kind::direct_read;
}

struct Fault {
  const char* name;
  bool deadline = false;  // any wait for something that is not there may run out of time
  bool death = false;     // one rank stops for ever; the hosts tell the devices
  bool stop = false;      // one rank stops for ever, and nobody tells
  bool disagree = false;  // each rank in turn makes another second call than the others
};
constexpr Fault kFaults[] = {
    {.name = "none"},
    {.name = "late", .deadline = true},
    {.name = "death", .death = true},
    {.name = "stopped", .deadline = true, .stop = true},
    {.name = "disagree", .disagree = true},
};

enum class Mutant : uint8_t {
  none,
  one_parity_of_slots,
  one_header,
  no_re_arm,
  re_arms_other_parity,
  results_not_re_armed,
  last_tile_not_re_armed,
  headers_not_awaited,
  last_peer_not_awaited,
  old_header_counts,
  header_before_kernel_end,
  root_awaits_nobody,
  zero_sends_nothing,
  counters_of_own_ctas,
  sentinel_sent,
  old_copy_counts,
  one_parity_of_copies,
  done_without_fence,
  no_done_wait,
  results_before_sum,
  no_status,
  broken_goes_on,
  deadline_ignored,
  death_unnoticed,
  descriptors_not_compared,
  flag_before_partial,
  no_arrived_wait,
  one_buffer_of_results,  // (a variant that holds)
};
constexpr const char* kMutants[] = {
    "none",
    "one parity for all slots",
    "one header for both parities",
    "slots are not re-armed",
    "the other parity is re-armed",
    "slots of results are not re-armed",
    "the last tile is not re-armed",
    "headers are not awaited",
    "the last peer's header is not awaited",
    "a header of an older call counts",
    "headers are sent before the previous kernel has ended",
    "the root of a broadcast awaits nobody",
    "a call of 0 elements sends no header",
    "a kernel advances the epochs of its own CTAs alone",
    "data that equal the sentinel are sent as they are",
    "an older copy counts",
    "one parity for all copies",
    "done flags are sent without a fence",
    "no done flag is awaited",
    "results of a tile are awaited before its sum is pushed",
    "a kernel that gives up writes no status",
    "a broken group goes on",
    "the deadline is never looked at",
    "a death is not told to the devices",
    "descriptors are not compared",
    "the flag of a partial is raised before it has arrived",
    "no arrived flag is awaited",
    "(holds) one buffer for the results of both parities",
};
static_assert(std::size(kMutants) == static_cast<size_t>(Mutant::one_buffer_of_results) + 1);

struct Config : explore::Config<Kind, Fault, Mutant> {
  bool in_order = false;
  bool two_tiles = false;  // of the fused kernels, between any ranks
};

// --- words ----------------------------------------------------------------------------------------------------------

// Headers, done flags and copies hold the number of a call; so do slots, and 0 is the sentinel. Tensors: see input_of.
struct Layout {
  explicit Layout(int ranks) : ranks(ranks) {}
  int header(int d, int s, int parity) const { return (d * kMaxRanks + s) * 2 + parity; }
  int copy(int d, int s, int parity) const { return kCopies + (d * kMaxRanks + s) * 2 + parity; }
  int done(int d, int s, int parity) const { return kDone + (d * kMaxRanks + s) * 2 + parity; }
  int arrived(int d, int s, int parity) const { return kArrived + (d * kMaxRanks + s) * 2 + parity; }
  // Staging memory has one for both parities.
  int partial(int d, int s) const { return kPartials + (d * kMaxRanks + s) * 2; }
  int tensor(int r, int share) const { return kTensors + r * kMaxRanks + share; }
  // The slots of all kinds of calls lie at the same place, cut in their own ways.
  int slot(int d, int parity, int i) const { return kSlots + (d * 2 + parity) * kSlotWords + i; }

  std::string name(int word) const {
    const auto pair = [&](const char* what, int i) {
      return std::string(what) + "[" + std::to_string(i % 2) + "] from " + std::to_string(i / 2 % kMaxRanks) +
             " of rank " + std::to_string(i / 2 / kMaxRanks);
    };
    if (word < kCopies) return pair("header", word);
    if (word < kDone) return pair("copy", word - kCopies);
    if (word < kArrived) return pair("done", word - kDone);
    if (word < kPartials) return pair("arrived", word - kArrived);
    if (word < kTensors) return pair("partial", word - kPartials);
    if (word < kSlots) {
      return "tensor of rank " + std::to_string((word - kTensors) / kMaxRanks) + ", share " +
             std::to_string((word - kTensors) % kMaxRanks);
    }
    const int i = word - kSlots;
    return "slot[" + std::to_string(i / kSlotWords % 2) + "] of rank " + std::to_string(i / kSlotWords / 2) +
           ", word " + std::to_string(i % kSlotWords);
  }

  static constexpr int kPairs = 2 * kMaxRanks * kMaxRanks, kSlotWords = 2 * kMaxRanks * kTiles;
  static constexpr int kCopies = kPairs, kDone = 2 * kPairs, kArrived = 3 * kPairs, kPartials = 4 * kPairs;
  static constexpr int kTensors = 5 * kPairs;
  static constexpr int kSlots = kTensors + kMaxRanks * kMaxRanks;
  static constexpr int kWords = kSlots + 2 * kMaxRanks * kSlotWords;
  int ranks;
};

constexpr int input_of(int call) {
  return 2 * call;
}
constexpr int result_of(int call) {
  return 2 * call + 1;
}
constexpr int kSpoiled = 15;  // NaN, or what the caller of a call that has failed writes
constexpr int kOddDescriptor = 8;

// --- programs -------------------------------------------------------------------------------------------------------

enum class Act : uint8_t {
  send,    // a header, a flag, a partial or a copy: over one of an older call, which its reader must have seen
  await,   // until all words hold this call's number
  push,    // into a slot, which must be at rest
  take,    // until no word is at rest; then all must be this call's
  re_arm,  // words of this call go to rest
  fill,    // the caller writes its tensor, before the call
  read,    // tensors or partials: all must hold this call's
  write,   // a share of a tensor
  end,     // of the kernel
};

struct Op {
  Act act;
  uint8_t call, thread, value;
  bool compares;  // awaits headers
  Mask needs;
  std::vector<int> words;
};

constexpr uint8_t kSignal = 0, kWorker = 1, kReducer = 3;

struct Program {
  std::vector<Op> ops;
  std::array<Mask, kMaxCalls + 1> of_call{};
  std::array<size_t, kMaxCalls + 2> begin{};  // of each call, counted from 1; then the end
};

Mask bit(int i) {
  return Mask{1} << i;
}

class Writer {
 public:
  Writer(const Config& config, const Layout& at, int me) : config_(config), at_(at), me_(me) {}

  Program write() {
    std::array<int, 2> counter{};  // epochs of two CTAs
    for (call_ = 1; call_ <= static_cast<int>(config_.calls.size()); call_++) {
      Kind kind = config_.calls[call_ - 1];
      odd_ = config_.odd_rank == me_ && call_ == 2;
      if (odd_) kind = kind == Kind::zero ? Kind::copy : Kind::zero;
      last_.fill(-1);
      program_.begin[call_] = program_.ops.size();
      for (int i = 0; i < 2; i++) parity_of_[i] = (counter[i] + 1) & 1;
      // Grids of a call may differ between ranks: here rank 0 has one CTA less for a call without data.
      const int ctas = me_ == 0 && kind == Kind::zero && mutant(Mutant::counters_of_own_ctas) ? 1 : 2;
      for (int i = 0; i < ctas; i++) counter[i]++;
      signal(kind);
      if (kind == Kind::one_shot) one_shot();
      if (kind == Kind::two_shot) two_shot();
      if (is_direct(kind)) direct(kind);
      if (kind == Kind::copy) copy();
      if (kind == Kind::fused) fused();
      if (kind == Kind::fused_two_shot) fused_two_shot();
      if (kind == Kind::prefill) prefill();
      if (kind == Kind::exchange) exchange();
      base_ = begin_ = bit(add(Act::end, 0, 0, program_.of_call[call_] | base_, {}));
    }
    program_.begin[call_] = program_.ops.size();
    return std::move(program_);
  }

 private:
  bool mutant(Mutant m) const { return config_.mutant == m; }
  int root_of(int call) const { return call / kMaxCalls; }
  int slot_parity(int cta = 0) const { return mutant(Mutant::one_parity_of_slots) ? 0 : parity_of_[cta]; }
  template <class F>
  void each_peer(const F& f) const {  // the next rank first, as the code does
    for (int step = 1; step < config_.ranks; step++) f((me_ + step) % config_.ranks);
  }

  // `needs`: what comes before, beside the end of the last kernel. Returns the index.
  int add(Act act, uint8_t thread, int value, Mask needs, std::vector<int> words) {
    const int index = static_cast<int>(program_.ops.size());
    needs |= base_;
    if (config_.in_order && act != Act::end && last_[thread] >= 0) needs |= bit(last_[thread]);
    last_[thread] = index;
    program_.ops.push_back(
        {act, static_cast<uint8_t>(call_), thread, static_cast<uint8_t>(value), false, needs, words});
    program_.of_call[call_] |= bit(index);
    return index;
  }

  void signal(Kind kind) {
    const int parity = mutant(Mutant::one_header) ? 0 : parity_of_[0];
    const bool root = root_of(call_) == me_;
    filled_ = 0;
    if (is_direct(kind)) {
      std::vector<int> words;
      for (int i = 0; i < config_.ranks; i++) words.push_back(at_.tensor(me_, i));
      filled_ = bit(add(Act::fill, kSignal, input_of(call_), 0, words));
    }
    if (kind == Kind::zero && mutant(Mutant::zero_sends_nothing)) return;
    if (mutant(Mutant::header_before_kernel_end)) base_ = before_;
    each_peer([&](int d) {
      add(Act::send, kSignal, call_ + (odd_ ? kOddDescriptor : 0), filled_, {at_.header(d, me_, parity)});
    });
    base_ = begin_;
    before_ = base_;
    headers_ = 0;
    if (mutant(Mutant::headers_not_awaited)) return;
    if (mutant(Mutant::root_awaits_nobody) && kind == Kind::copy && root) return;
    std::vector<int> words;
    each_peer([&](int s) { words.push_back(at_.header(me_, s, parity)); });
    if (mutant(Mutant::last_peer_not_awaited)) words.pop_back();
    // Direct algorithms, prefill: every CTA awaits them as a whole.
    const bool whole = is_direct(kind) || kind == Kind::prefill || kind == Kind::exchange;
    const int index = add(Act::await, whole ? kWorker : kSignal, call_, 0, words);
    program_.ops[index].compares = true;
    headers_ = bit(index);
  }

  int take(uint8_t thread, Mask needs, const std::vector<int>& words) {
    return add(Act::take, thread, call_, needs, words);
  }
  void push(uint8_t thread, Mask needs, int word) {
    add(Act::push, thread, mutant(Mutant::sentinel_sent) ? 0 : call_, needs, {word});
  }
  void re_arm(uint8_t thread, int taken, std::vector<int> words) {
    if (mutant(Mutant::no_re_arm)) return;
    if (mutant(Mutant::re_arms_other_parity)) {
      for (int& word : words) {
        const int i = word - Layout::kSlots;
        word += (i / Layout::kSlotWords & 1) != 0 ? -Layout::kSlotWords : Layout::kSlotWords;
      }
    }
    add(Act::re_arm, thread, call_, bit(taken), std::move(words));
  }

  void one_shot() {
    const int chunks = config_.ranks == 2 ? 2 : 1;
    for (int c = 0; c < chunks; c++) {
      const auto thread = static_cast<uint8_t>(kWorker + c);
      const auto slot = [&](int d, int s) { return at_.slot(d, slot_parity(c), s * chunks + c); };
      each_peer([&](int d) { push(thread, 0, slot(d, me_)); });
      std::vector<int> words;
      each_peer([&](int s) { words.push_back(slot(me_, s)); });
      re_arm(thread, take(thread, 0, words), words);
    }
  }

  int result_slot(int d, int i) const {
    const int parity = mutant(Mutant::one_buffer_of_results) ? 0 : slot_parity();
    return at_.slot(d, parity, i);
  }

  void two_shot() {
    each_peer([&](int d) { push(kWorker, 0, at_.slot(d, slot_parity(), me_)); });
    std::vector<int> words, results;
    each_peer([&](int s) { words.push_back(at_.slot(me_, slot_parity(), s)); });
    const int taken = take(kWorker, 0, words);
    re_arm(kWorker, taken, words);
    const int first = kMaxRanks * kTiles;
    each_peer([&](int d) { push(kWorker, bit(taken), result_slot(d, first + me_)); });
    each_peer([&](int s) { results.push_back(result_slot(me_, first + s)); });
    const int collected = take(kWorker, bit(taken), results);
    if (!mutant(Mutant::results_not_re_armed)) re_arm(kWorker, collected, results);
  }

  void direct(Kind kind) {
    std::vector<int> inputs;
    if (kind == Kind::direct_read) {
      for (int r = 0; r < config_.ranks; r++) inputs.push_back(at_.tensor(r, me_));
      write_share_and_close(bit(add(Act::read, kWorker, input_of(call_), headers_ | filled_, inputs)));
      return;
    }
    // Contributions wait for no header. They are sent from a tensor that the peers' sums then overwrite.
    std::vector<int> arrived, partials;
    each_peer([&](int d) {
      const Mask loaded = bit(add(Act::read, kWorker, input_of(call_), filled_, {at_.tensor(me_, d)}));
      const Mask sent = bit(add(Act::send, kWorker, call_, loaded, {at_.partial(d, me_)}));
      const Mask before = mutant(Mutant::flag_before_partial) ? loaded : sent;
      add(Act::send, kWorker, call_, before, {at_.arrived(d, me_, parity_of_[0])});
    });
    each_peer([&](int s) { arrived.push_back(at_.arrived(me_, s, parity_of_[0])); });
    each_peer([&](int s) { partials.push_back(at_.partial(me_, s)); });
    Mask came = headers_;
    if (!mutant(Mutant::no_arrived_wait)) came |= bit(add(Act::await, kWorker, call_, headers_, arrived));
    const Mask own = bit(add(Act::read, kWorker, input_of(call_), filled_, {at_.tensor(me_, me_)}));
    write_share_and_close(own | bit(add(Act::read, kWorker, call_, came, partials)));
  }

  // This rank's share of everybody's tensor, then the closing barrier.
  void write_share_and_close(Mask read) {
    std::vector<int> dones;
    Mask written = 0;
    for (int r = 0; r < config_.ranks; r++) {
      written |= bit(add(Act::write, kWorker, result_of(call_), read, {at_.tensor(r, me_)}));
    }
    const int parity = parity_of_[0];
    each_peer([&](int d) {
      const Mask fence = mutant(Mutant::done_without_fence) ? read : written;
      add(Act::send, kWorker, call_, fence, {at_.done(d, me_, parity)});
    });
    each_peer([&](int s) { dones.push_back(at_.done(me_, s, parity)); });
    if (!mutant(Mutant::no_done_wait)) add(Act::await, kWorker, call_, written, dones);
  }

  // The words of a share are a tile. Its owner waits for flags in the slots and reads the partials, which have no
  // parity.
  void prefill() {
    each_peer([&](int d) {
      const Mask sent = bit(add(Act::send, kWorker, call_, headers_, {at_.partial(d, me_)}));
      push(kWorker, mutant(Mutant::flag_before_partial) ? headers_ : sent, at_.slot(d, slot_parity(), me_));
    });
    std::vector<int> flags, partials;
    each_peer([&](int s) { flags.push_back(at_.slot(me_, slot_parity(), s)); });
    each_peer([&](int s) { partials.push_back(at_.partial(me_, s)); });
    const int taken = take(kWorker, headers_, flags);
    re_arm(kWorker, taken, flags);
    write_share_and_close(bit(add(Act::read, kWorker, call_, bit(taken), partials)));
  }

  // The mover pushes tile after tile, storers take what comes.
  void exchange() {
    for (int tile = 0; tile < tiles(); tile++) {
      const auto slot = [&](int d, int s) { return at_.slot(d, slot_parity(), s * tiles() + tile); };
      each_peer([&](int d) { push(kWorker, headers_, slot(d, me_)); });
      std::vector<int> words;
      each_peer([&](int s) { words.push_back(slot(me_, s)); });
      re_arm(kReducer, take(kReducer, 0, words), words);
    }
  }

  void copy() {
    const int root = root_of(call_);
    const int parity = mutant(Mutant::one_parity_of_copies) ? 0 : parity_of_[0];
    if (root == me_) {
      each_peer([&](int d) { add(Act::send, kWorker, call_, 0, {at_.copy(d, me_, parity)}); });
    } else {
      add(Act::await, kWorker, call_, 0, {at_.copy(me_, root, parity)});
    }
  }

  int tiles() const { return config_.ranks == 2 || config_.two_tiles ? kTiles : 1; }
  bool re_arms(int tile) const { return tile != tiles() - 1 || !mutant(Mutant::last_tile_not_re_armed); }

  void fused() {
    const auto slot = [&](int d, int s, int tile) { return at_.slot(d, slot_parity(), s * tiles() + tile); };
    for (int tile = 0; tile < tiles(); tile++) {
      each_peer([&](int d) { push(kWorker, 0, slot(d, me_, tile)); });
      push(kWorker, 0, slot(me_, me_, tile));
    }
    Mask before = 0;
    for (int tile = 0; tile < tiles(); tile++) {
      std::vector<int> words;
      for (int s = 0; s < config_.ranks; s++) words.push_back(slot(me_, s, tile));
      const int taken = take(kReducer, before, words);
      before = bit(taken);
      if (re_arms(tile)) re_arm(kReducer, taken, words);
    }
  }

  // The chunk of a tile that rank o owns is word (source, tile) of its slots.
  void fused_two_shot() {
    const auto slot = [&](int d, int s, int tile) { return at_.slot(d, slot_parity(), s * tiles() + tile); };
    const auto result = [&](int d, int owner, int tile) {
      return result_slot(d, kMaxRanks * kTiles + owner * tiles() + tile);
    };
    for (int tile = 0; tile < tiles(); tile++) {
      for (int o = 0; o < config_.ranks; o++) push(kWorker, 0, slot(o, me_, tile));
    }
    Mask before = 0;
    const auto collect = [&](int tile) {
      std::vector<int> words;
      each_peer([&](int o) { words.push_back(result(me_, o, tile)); });
      const int taken = take(kReducer, before, words);
      before = bit(taken);
      if (!mutant(Mutant::results_not_re_armed) && re_arms(tile)) re_arm(kReducer, taken, words);
    };
    for (int tile = 0; tile < tiles(); tile++) {
      if (mutant(Mutant::results_before_sum)) collect(tile);
      std::vector<int> words;
      for (int s = 0; s < config_.ranks; s++) words.push_back(slot(me_, s, tile));
      const int taken = take(kReducer, before, words);
      before = bit(taken);
      if (re_arms(tile)) re_arm(kReducer, taken, words);
      each_peer([&](int d) { push(kReducer, bit(taken), result(d, me_, tile)); });
      if (tile > 0 && !mutant(Mutant::results_before_sum)) collect(tile - 1);
    }
    if (!mutant(Mutant::results_before_sum)) collect(tiles() - 1);
  }

  const Config& config_;
  const Layout& at_;
  int me_;
  int call_ = 0;
  bool odd_ = false;
  Mask base_ = 0, begin_ = 0, before_ = 0;  // the end of the last kernel; of the one before (a mutant)
  Mask filled_ = 0, headers_ = 0;
  std::array<int, 2> parity_of_{};
  std::array<int, 8> last_{};
  Program program_;
};

// --- the machine ----------------------------------------------------------------------------------------------------

struct State {
  std::array<Mask, kMaxRanks> made;       // accesses
  std::array<uint8_t, kMaxRanks> call;    // the kernel that runs, from 1
  std::array<uint8_t, kMaxRanks> failed;  // threads of it that have given up (bits)
  uint8_t broken, record, gone, over;     // ranks (bits): `broken` is set; a status is written; stopped; no call more
  uint8_t spoiled;                        // has read a tensor whose call has failed
  std::array<uint8_t, 3> padding;
  std::array<uint8_t, Layout::kWords> now;
};

enum class Action : uint8_t { access, give_up, stop };
struct Move {
  uint8_t rank;
  Action action;
  uint8_t op;
};

class Machine : public explore::Narrator {
 public:
  explicit Machine(const Config& config) : config_(config), at_(config.ranks) {
    for (int r = 0; r < config.ranks; r++) programs_.push_back(Writer(config_, at_, r).write());
  }

  State initial() {
    State state;
    std::memset(static_cast<void*>(&state), 0, sizeof state);
    for (int r = 0; r < config_.ranks; r++) state.call[r] = 1;
    settle(state);
    return state;
  }

  template <class Visit>
  void each_move(const State& state, const Visit& visit) {
    const auto make = [&](int r, Action action, size_t op) {
      const Move move{static_cast<uint8_t>(r), action, static_cast<uint8_t>(op)};
      State next = state;
      apply(next, move);
      visit(next, move, action != Action::stop);
    };
    for (int r = 0; r < config_.ranks; r++) {
      if (((state.gone | state.over) >> r & 1) != 0) continue;
      const auto& ops = programs_[r].ops;
      for (size_t i = first(state, r); i < last(state, r); i++) {
        if (!enabled(state, r, static_cast<int>(i))) continue;
        const bool waits = ops[i].act == Act::await || ops[i].act == Act::take;
        if (!waits || present(state, ops[i])) {
          make(r, Action::access, i);
        } else if (may_give_up(state, r)) {
          make(r, Action::give_up, i);
        }
      }
      const bool may_stop = (config_.fault.death || config_.fault.stop) && state.gone == 0;
      if (may_stop) make(r, Action::stop, 0);
    }
  }

  void apply(State& state, Move move, std::vector<std::string>* log = nullptr) {
    begin_move(log);
    if (move.action == Action::stop) {
      if (talks()) say(move.rank, 0, "stops for ever");
      state.gone |= static_cast<uint8_t>(1 << move.rank);
    } else if (move.action == Action::give_up) {
      give_up(state, move.rank, programs_[move.rank].ops[move.op], move.op);
    } else {
      access(state, move.rank, move.op);
    }
    settle(state);
  }

  std::string stuck(const State& state) const {
    for (int r = 0; r < config_.ranks; r++) {
      if (((state.gone | state.over) >> r & 1) == 0) {
        return "deadlock: rank " + std::to_string(r) + " waits for ever in call " + std::to_string(state.call[r]);
      }
    }
    return "";
  }

 private:
  bool mutant(Mutant m) const { return config_.mutant == m; }
  std::string names(const Op& op) const {
    std::string text = at_.name(op.words[0]);
    if (op.words.size() > 1) text += " and " + std::to_string(op.words.size() - 1) + " more";
    return text;
  }

  bool made(const State& state, int r, int i) const { return (state.made[r] >> i & 1) != 0; }
  bool enabled(const State& state, int r, int i) const {
    return !made(state, r, i) && (programs_[r].ops[i].needs & ~state.made[r]) == 0;
  }
  // The accesses that a rank may make: of the kernel that runs (a mutant makes some of the next one's too early).
  size_t first(const State& state, int r) const { return programs_[r].begin[state.call[r]]; }
  size_t last(const State& state, int r) const {
    const size_t next = state.call[r] + (mutant(Mutant::header_before_kernel_end) ? 2u : 1u);
    return programs_[r].begin[std::min(next, config_.calls.size() + 1)];
  }

  bool present(const State& state, const Op& op) const {
    for (const int word : op.words) {
      const int value = state.now[word] & 7;
      if (op.act == Act::take) {
        if (value == 0) return false;
      } else {
        const bool old =
            (op.compares && mutant(Mutant::old_header_counts)) || (!op.compares && mutant(Mutant::old_copy_counts));
        if (old ? value == 0 : value != op.value) return false;
      }
    }
    return true;
  }

  bool may_give_up(const State& state, int r) const {
    if ((state.broken >> r & 1) != 0) return true;
    if (config_.fault.deadline && !mutant(Mutant::deadline_ignored)) return true;
    if (config_.fault.death && state.gone != 0 && !mutant(Mutant::death_unnoticed)) return true;
    return state.record != 0;  // the hosts say so to all devices
  }

  void fail(State& state, int r, const Op& op) {
    state.failed[r] |= static_cast<uint8_t>(1 << op.thread);
    state.broken |= static_cast<uint8_t>(1 << r);
    if (!mutant(Mutant::no_status)) state.record |= static_cast<uint8_t>(1 << r);
  }

  void give_up(State& state, int r, const Op& op, int index) {
    if (talks()) say(r, op.call, "gives up waiting for " + names(op));
    fail(state, r, op);
    state.made[r] |= bit(index);
  }

  // Whether rank r has seen (awaited or read) `word` in call `call`.
  bool has_seen(const State& state, int r, int word, int call) const {
    const auto& ops = programs_[r].ops;
    for (size_t i = programs_[r].begin[call]; i < programs_[r].begin[call + 1]; i++) {
      if (ops[i].act != Act::await && ops[i].act != Act::read) continue;
      if (std::find(ops[i].words.begin(), ops[i].words.end(), word) == ops[i].words.end()) continue;
      if (!made(state, r, static_cast<int>(i))) return false;
    }
    return true;
  }

  void access(State& state, int r, int index) {
    const Op& op = programs_[r].ops[index];
    state.made[r] |= bit(index);
    const bool skipped = (state.failed[r] >> op.thread & 1) != 0;
    if (skipped && op.act != Act::end) return;
    switch (op.act) {
      case Act::send: {
        const int word = op.words[0], old = state.now[word] & 7;
        const int reader = reader_of(word);
        if (old != 0 && old != op.call && !has_seen(state, reader, word, old)) {
          violate(r, "overwrites " + at_.name(word) + " of call " + std::to_string(old) + ", which rank " +
                         std::to_string(reader) + " has not seen");
        }
        if (talks()) say(r, op.call, "sends " + at_.name(word));
        state.now[word] = op.value;
        return;
      }
      case Act::await:
        if (talks()) say(r, op.call, "finds " + names(op));
        for (const int word : op.words) {
          const int value = state.now[word];
          if ((value & 7) != op.call) {
            violate(r, "takes " + at_.name(word) + " of call " + std::to_string(value & 7) + " for one of call " +
                           std::to_string(op.call));
          }
          const bool mine = config_.odd_rank == r && op.call == 2;
          const bool differs = ((value & kOddDescriptor) != 0) != mine;
          if (op.compares && differs && !mutant(Mutant::descriptors_not_compared)) {
            if (talks()) say(r, op.call, "sees that the descriptors differ");
            fail(state, r, op);
          }
        }
        return;
      case Act::push: {
        const int word = op.words[0], old = state.now[word];
        if (old != 0) {
          violate(r, "overwrites " + at_.name(word) + ", which holds data of call " + std::to_string(old));
        }
        if (talks()) say(r, op.call, "pushes into " + at_.name(word));
        state.now[word] = op.value;
        return;
      }
      case Act::take:
        if (talks()) say(r, op.call, "takes " + names(op));
        for (const int word : op.words) {
          if (state.now[word] == op.call) continue;
          violate(r, "takes data of call " + std::to_string(state.now[word]) + " in " + at_.name(word) +
                         " for those of call " + std::to_string(op.call));
        }
        return;
      case Act::re_arm:
        if (talks()) say(r, op.call, "re-arms " + names(op));
        for (const int word : op.words) {
          const int old = state.now[word];
          if (old != op.call && old != 0)
            violate(r, "erases data of call " + std::to_string(old) + " in " + at_.name(word));
          state.now[word] = 0;
        }
        return;
      case Act::fill:
        if (talks()) say(r, op.call, "(its caller) fills its tensor");
        for (size_t i = 0; i < op.words.size(); i++) {
          const int word = op.words[i], old = state.now[word];
          const bool peers_read = old != 0 && old % 2 == 0 && config_.calls[old / 2 - 1] == Kind::direct_read;
          if (peers_read && !has_seen(state, static_cast<int>(i), word, old / 2)) {
            violate(r, "overwrites " + at_.name(word) + ", which rank " + std::to_string(i) + " has not read");
          }
          state.now[word] = op.value;
        }
        return;
      case Act::read:
        if (talks()) say(r, op.call, "reads " + names(op));
        for (const int word : op.words) {
          if (state.now[word] == kSpoiled) {
            state.spoiled |= static_cast<uint8_t>(1 << r);
          } else if (state.now[word] != op.value) {
            violate(r, "reads " + at_.name(word) + " that is not the input of call " + std::to_string(op.call));
          }
        }
        return;
      case Act::write: {
        const int word = op.words[0], owner = (word - Layout::kTensors) / kMaxRanks;
        if (talks()) say(r, op.call, "writes " + at_.name(word));
        if (state.call[owner] > op.call || (state.over >> owner & 1) != 0) {
          if ((state.broken >> owner & 1) == 0) {
            violate(r, "writes " + at_.name(word) + " after that call of rank " + std::to_string(owner) + " has ended");
          }
          return;  // (a limit) a tensor whose call has failed may still be written
        }
        state.now[word] = (state.spoiled >> r & 1) != 0 ? kSpoiled : op.value;
        return;
      }
      default:
        end(state, r, op);
    }
  }

  int reader_of(int word) const { return word % Layout::kPairs / 2 / kMaxRanks; }

  void end(State& state, int r, const Op& op) {
    if (talks()) say(r, op.call, "ends");
    const auto mine = static_cast<uint8_t>(1 << r);
    const bool broken = (state.broken & mine) != 0;
    if (state.failed[r] != 0 && (state.record & mine) == 0) violate(r, "gave up, and nobody is told");
    const bool odd_call = config_.odd_rank >= 0 && op.call == 2;
    if (odd_call && !broken) violate(r, "returns from call 2, in which ranks disagree");
    const Kind kind = config_.calls[op.call - 1];
    const bool has_tensor = is_direct(kind) || kind == Kind::prefill;
    if (broken && has_tensor) {
      for (int i = 0; i < config_.ranks; i++) state.now[at_.tensor(r, i)] = kSpoiled;
    } else if (has_tensor && !odd_call) {
      for (int i = 0; i < config_.ranks; i++) {
        // A peer gave up after it had sent its done flag. Then there is a status, which every host reads before it
        // believes what a kernel has left.
        if (state.now[at_.tensor(r, i)] == kSpoiled && state.record != 0) continue;
        if (state.now[at_.tensor(r, i)] != result_of(op.call)) {
          violate(r, "returns from call " + std::to_string(op.call) + " without the result in " +
                         at_.name(at_.tensor(r, i)));
        }
      }
    }
    state.failed[r] = 0;
    state.call[r]++;
    const bool last = state.call[r] > config_.calls.size();
    // A call of a broken group sends nothing, stores NaN, and leaves.
    if (last || (broken && !mutant(Mutant::broken_goes_on))) state.over |= mine;
  }

  // What is done as soon as it can be.
  void settle(State& state) {
    for (bool again = true; again && violation().empty();) {
      again = false;
      for (int r = 0; r < config_.ranks; r++) {
        if (((state.gone | state.over) >> r & 1) != 0) continue;
        const auto& ops = programs_[r].ops;
        for (size_t i = first(state, r); i < last(state, r); i++) {
          const Op& op = ops[i];
          const bool skipped = (state.failed[r] >> op.thread & 1) != 0 && op.call == state.call[r];
          if (!skipped && op.act != Act::end && op.act != Act::take) continue;
          if (!enabled(state, r, static_cast<int>(i))) continue;
          if (!skipped && op.act == Act::take && !present(state, op)) continue;
          access(state, r, static_cast<int>(i));
          again = true;
          break;
        }
      }
    }
  }

  Config config_;
  Layout at_;
  std::vector<Program> programs_;
};

}  // namespace

int main(int argc, char** argv) {
  const explore::Command<Config, State, Move, Machine> command{
      .program = "gpu_model",
      .kinds = kKinds,
      .mutants = kMutants,
      .faults = kFaults,
      .max_ranks = kMaxRanks,
      .max_calls = kMaxCalls,
      .switches = {{"--in-order", &Config::in_order}, {"--two-tiles", &Config::two_tiles}}};
  return command.run(argc, argv);
}
