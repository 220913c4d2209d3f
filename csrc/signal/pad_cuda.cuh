// The protocol of a call between GPUs, for kernels: the device twin of signal_cpu.h.
//
//   begin     waits for the previous kernel, reads this CTA's epoch (arrive, then enter)
//   headers   one warp of CTA 0: my header to every peer, every peer's header here, descriptors compared
//   wait      bounded: data first, then a broken group, then the deadline
//   flags     (direct algorithms) from a CTA to that of the same number: my contributions are there
//   finish    (direct algorithms) tells the peers that this CTA touches their memory no more, waits for the same
//   end       advances the epochs (or earlier, once the whole CTA has read its own)
//
// Nothing traps. A wait that fails writes the device's record in host memory once, sets `broken` and returns false;
// the caller stores NaN (all bits set) for what it could not have, and the kernel leaves. Epochs advance on every path.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

#include "base/ptx_cuda.cuh"
#include "signal/pad_cuda.h"

namespace sglang_symm::device {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kFastPolls = 256;  // about 0.1 ms, then broken, the hosts and the clock are looked at
constexpr uint64_t kHostPeriodNs = 1'000'000;

// ---- a call ----

// The next rank first: not everybody writes to rank 0 at once.
__device__ __forceinline__ int peer_of(const CallCuda& call, int step) {
  const int r = call.rank + step;
  return r < call.world_size ? r : r - call.world_size;
}

struct Session {
  const CallCuda& call;
  uint32_t epoch;
  bool alive;  // false: the group is broken or destroyed, touch nothing of a peer

  __device__ PadCuda* pad(int rank) const { return reinterpret_cast<PadCuda*>(call.window[rank]); }
  __device__ PadCuda* own() const { return pad(call.rank); }
  __device__ uint32_t parity() const { return epoch & 1; }
  __device__ int peer(int step) const { return peer_of(call, step); }
};

// For make_now().
__device__ __forceinline__ uint32_t bits_of(const void* p) {
  const auto bits = reinterpret_cast<uintptr_t>(p);
  return static_cast<uint32_t>(bits) ^ static_cast<uint32_t>(bits >> 32);
}

// Parameters come from memory when first used, a line of 64 bytes at a time.
template <class Args>
__device__ __forceinline__ void fetch(const Args& args) {
  uint32_t bits = 0;
#pragma unroll
  for (size_t i = 0; i < sizeof(Args); i += 64) {
    bits ^= *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(&args) + i);
  }
  make_now(bits);
}

// begin() in two halves, for loads of the caller's own that need not wait for the epoch's: `arrive` waits for the
// kernel before this one, `enter` reads the epoch.
struct Door {
  const uint32_t* epoch;
  const uint32_t* broken;
};

__device__ __forceinline__ Door arrive(const CallCuda& call) {
  PadCuda* pad = reinterpret_cast<PadCuda*>(call.window[call.rank]);
  const int cta = static_cast<int>(blockIdx.x);
  const Door door{&pad->epoch(cta), &pad->gate[cta % kGates].broken};
  make_now(bits_of(door.epoch) ^ bits_of(door.broken));
  fetch(call);
  // Nothing before this touches a slot or an epoch. Then the next kernel may be brought in: it waits at its own.
  wait_for_previous_kernel();
  let_next_kernel_in();
  return door;
}

__device__ __forceinline__ Session enter(const CallCuda& call, const Door& door) {
  const uint32_t last = load_sys(door.epoch);
  const uint32_t broken = load_sys(door.broken);
  return {call, last + 1, broken == 0};
}

__device__ __forceinline__ Session begin(const CallCuda& call) {
  return enter(call, arrive(call));
}

// By `threads` threads of the CTA, of which this is number `thread`, once all of the CTA have read its epoch.
__device__ __forceinline__ void advance_epochs(const Session& s, uint32_t thread, uint32_t threads) {
  PadCuda* pad = s.own();
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.x + thread * gridDim.x); i < kMaxCtas;
       i += static_cast<int>(threads * gridDim.x)) {
    pad->epoch(i) = s.epoch;
  }
}

// All threads of the CTA.
__device__ __forceinline__ void end(const Session& s) {
  __syncthreads();
  advance_epochs(s, threadIdx.x, blockDim.x);
}

// ---- failures ----

// For all kernels of this rank, those that run and those to come.
__device__ __forceinline__ void break_group(PadCuda* pad) {
#pragma unroll  // a loop takes registers from the kernels that wait
  for (int i = 0; i < kGates; i++) store_sys(&pad->gate[i].broken, 1u);
}

// The first failure of this device, for the hosts. `seconds`: how long it waited.
__device__ __forceinline__ void record_failure(const CallCuda& call, uint32_t epoch, AbortKind kind, uint32_t culprits,
                                               double seconds, const Descriptor& expected, const Descriptor& got) {
  PadCuda* pad = reinterpret_cast<PadCuda*>(call.window[call.rank]);
  if (atomicCAS(&pad->claimed, 0u, 1u) == 0) {
    AbortRecord* record = call.record;
    record->kind = kind;
    record->reporter = static_cast<uint32_t>(call.rank);
    record->culprits = culprits;
    record->epoch = epoch;
    record->pid = 0;
    record->seconds = seconds;
    record->expected = expected;
    record->got = got;
    __threadfence_system();
    store_release(reinterpret_cast<uint32_t*>(&record->state), AbortRecord::kComplete);
  }
  break_group(pad);
}

struct Clock {
  uint64_t start = 0;
  uint32_t left = 0;
};

// The hosts' words are read over PCIe, one thread after the other (0.6 us each): looked at by every warp that waits
// they delay this rank by hundreds of us, then its peers wait as long and look as well, and so on from call to call. So
// one thread of the device looks once a period, for all.
__device__ __forceinline__ void look_at_hosts(const CallCuda& call, PadCuda* pad, uint64_t now) {
  const auto looked = *const_cast<const volatile unsigned long long*>(&pad->looked);
  if (static_cast<int64_t>(now - looked) < static_cast<int64_t>(kHostPeriodNs)) return;
  if (atomicCAS(&pad->looked, looked, static_cast<unsigned long long>(now)) != looked) return;
  if (load_sys(call.abort_state) != AbortRecord::kEmpty) break_group(pad);
  store_sys(&pad->left, load_sys(call.left));
}

// Asked now and then by a thread that waits for `missing`: true when it need not wait any longer, because the group is
// broken (here, or so the hosts say), a missing rank has left, or the deadline has passed. A function of its own, not
// inlined: many places wait, and kernels must fit the instruction cache.
inline __device__ __noinline__ bool give_up(const CallCuda& call, uint32_t epoch, uint32_t missing, Clock* clock) {
  PadCuda* pad = reinterpret_cast<PadCuda*>(call.window[call.rank]);
  const uint64_t now = time_ns();
  if (clock->start == 0) clock->start = now;
  look_at_hosts(call, pad, now);
  if (load_sys(&pad->gate[0].broken) != 0) return true;
  // As seen the last time, before `missing` was made: who had left by then had sent all that it ever would.
  const uint32_t left = clock->left & missing;
  clock->left = load_sys(&pad->left);
  if (left != 0) {
    record_failure(call, epoch, AbortKind::left, left, 0, call.descriptor, call.descriptor);
    return true;
  }
  const double seconds = epoch == 1 ? call.first_seconds : call.seconds;
  if (now - clock->start < static_cast<uint64_t>(seconds * 1e9)) return false;
  record_failure(call, epoch, AbortKind::missing, missing, seconds, call.descriptor, call.descriptor);
  return true;
}

// ready(): whether what is waited for has come; asked first, and again after there was a reason to give up.
// missing(): the ranks that it has not come from.
template <class Ready, class Missing>
__device__ __forceinline__ bool wait(const Session& s, const Ready& ready, const Missing& missing) {
  Clock clock;
  for (bool last = false;; last = give_up(s.call, s.epoch, missing(), &clock)) {
#pragma unroll 1
    for (int i = 0; i < kFastPolls; i++) {
      if (ready()) return true;
    }
    if (last) return false;
  }
}

// ---- headers ----

__device__ __forceinline__ uint32_t descriptor_word(const Descriptor& d, int i) {
  const uint32_t small = static_cast<uint32_t>(d.op) | static_cast<uint32_t>(d.dtype) << 8 |
                         static_cast<uint32_t>(d.algorithm) << 16 | static_cast<uint32_t>(d.flags) << 24;
  return i == 0   ? small
         : i == 1 ? d.aux
         : i == 2 ? static_cast<uint32_t>(d.count)
                  : static_cast<uint32_t>(d.count >> 32);
}

__device__ __forceinline__ Descriptor descriptor_of(const HeaderCuda& h) {
  const uint32_t small = load_sys(&h.word[0]);
  Descriptor d;
  d.op = static_cast<OpCode>(small & 0xFF);
  d.dtype = static_cast<DType>(small >> 8 & 0xFF);
  d.algorithm = static_cast<Algorithm>(small >> 16 & 0xFF);
  d.flags = static_cast<uint8_t>(small >> 24);
  d.aux = load_sys(&h.word[2]);
  d.count = static_cast<uint64_t>(load_sys(&h.word[6])) << 32 | load_sys(&h.word[4]);
  return d;
}

__device__ __forceinline__ uint64_t offset_out(const HeaderCuda& h) {
  return static_cast<uint64_t>(load_sys(&h.word[14])) << 32 | load_sys(&h.word[12]);
}

// Every rank sees the same headers, hence reports the same.
inline __device__ __noinline__ void report_disagreement(const CallCuda& call, uint32_t epoch) {
  const PadCuda* pad = reinterpret_cast<const PadCuda*>(call.window[call.rank]);
  const auto of_rank = [&](int r) {
    return r == call.rank ? call.descriptor : descriptor_of(pad->header[epoch & 1][r]);
  };
  const Descriptor reference = of_rank(0);
  for (int r = 1; r < call.world_size; r++) {
    const Descriptor other = of_rank(r);
    bool same = true;
    for (int i = 0; i < 4; i++) same &= descriptor_word(other, i) == descriptor_word(reference, i);
    if (same) continue;
    record_failure(call, epoch, AbortKind::disagree, 1u << r, 0, reference, other);
    return;
  }
}

// One whole warp. Four lanes a peer, 16 bytes a lane: {data, epoch, data, epoch}.
__device__ __forceinline__ void send_headers(const Session& s) {
  const int lane = threadIdx.x & (kWarp - 1);
  const int quad = lane & 3;
  const uint64_t offset = quad == 2 ? s.call.offset_in : s.call.offset_out;
  const uint32_t low = quad < 2 ? descriptor_word(s.call.descriptor, 2 * quad) : static_cast<uint32_t>(offset);
  const uint32_t high =
      quad < 2 ? descriptor_word(s.call.descriptor, 2 * quad + 1) : static_cast<uint32_t>(offset >> 32);
#pragma unroll 1
  for (int step = 1 + (lane >> 2); step < s.call.world_size; step += kWarp / 4) {
    uint32_t* word = &s.pad(s.peer(step))->header[s.parity()][s.call.rank].word[4 * quad];
    store_sys(static_cast<void*>(word), make_uint4(low, s.epoch, high, s.epoch));
  }
}

inline __device__ __noinline__ uint32_t missing_headers(const CallCuda& call, uint32_t epoch) {
  const PadCuda* pad = reinterpret_cast<const PadCuda*>(call.window[call.rank]);
  uint32_t mask = 0;
  for (int r = 0; r < call.world_size; r++) {
    if (r != call.rank && load_sys(&pad->header[epoch & 1][r].word[1]) != epoch) mask |= 1u << r;
  }
  return mask;
}

struct Offsets {
  uint64_t in[kMaxWorldSize];
  uint64_t out[kMaxWorldSize];
};

// One whole warp. True when every peer's header has come and all descriptors are equal. CTA 0, which waits for headers
// in every kernel, reports what differs: another one could break the group before CTA 0 has begun, hence sends its
// header. With `offsets`, an Offsets*, the peers' are left there, and what a peer wrote before its fence and header is
// seen.
template <class To = std::nullptr_t>
__device__ __forceinline__ bool await_headers(const Session& s, [[maybe_unused]] To offsets = nullptr) {
  constexpr bool kKeeps = std::is_same_v<To, Offsets*>;
  const int lane = threadIdx.x & (kWarp - 1);
  const int quad = lane & 3;
  bool all_came = true, same = true;
#pragma unroll 1
  for (int step = 1 + (lane >> 2); step < s.call.world_size && all_came; step += kWarp / 4) {
    const int peer = s.peer(step);
    const void* word = &s.own()->header[s.parity()][peer].word[4 * quad];
    uint4 got;
    const auto came = [&] {
      got = kKeeps ? load_acquire(word) : load_sys(word);
      return got.y == s.epoch && got.w == s.epoch;
    };
    const auto missing = [&] { return missing_headers(s.call, s.epoch) | 1u << peer; };
    all_came = wait(s, came, missing);
    if (all_came && quad < 2) {
      same &= got.x == descriptor_word(s.call.descriptor, 2 * quad) &&
              got.z == descriptor_word(s.call.descriptor, 2 * quad + 1);
    }
    if constexpr (kKeeps) {
      if (all_came && quad >= 2) {
        (quad == 2 ? offsets->in : offsets->out)[peer] = static_cast<uint64_t>(got.z) << 32 | got.x;
      }
    }
  }
  all_came = __all_sync(kAllLanes, all_came) != 0;
  same = __all_sync(kAllLanes, same) != 0;
  if (all_came && !same && lane == 0 && blockIdx.x == 0) report_disagreement(s.call, s.epoch);
  __syncwarp();
  return all_came && same;
}

// ---- direct algorithms: this CTA and those of the same number ----

// A thread a peer. The flag covers what the whole CTA wrote and read before a __syncthreads().
__device__ __forceinline__ void raise_flag(const Session& s, int peer, FlagsCuda PadCuda::*flags) {
  store_release(&(s.pad(peer)->*flags)[s.parity()][s.call.rank][blockIdx.x], s.epoch);
}
__device__ __forceinline__ bool await_flag(const Session& s, int peer, FlagsCuda PadCuda::*flags) {
  const uint32_t* flag = &(s.own()->*flags)[s.parity()][peer][blockIdx.x];
  return wait(
      s, [&] { return load_acquire(flag) == s.epoch; }, [&] { return 1u << peer; });
}

// The closing barrier, all threads of the CTA.
__device__ __forceinline__ bool finish(const Session& s) {
  __syncthreads();  // the release below covers what the whole CTA wrote and read before this
  bool fine = true;
  const int step = 1 + static_cast<int>(threadIdx.x);
  if (step < s.call.world_size) {
    raise_flag(s, s.peer(step), &PadCuda::done);
    fine = await_flag(s, s.peer(step), &PadCuda::done);
  }
  return __syncthreads_and(fine) != 0;
}

}  // namespace sglang_symm::device
