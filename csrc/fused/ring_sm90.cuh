// What the fused kernels share: the ring of stages between the producer and the math warps, and a warp's wait for
// peers.
#pragma once

#include "fused/ptx_sm90.cuh"

namespace sglang_symm::device {

struct Ring {
  uint32_t memory;  // aligned to 1024 bytes, the period of the swizzle
  uint64_t* full;
  uint64_t* empty;
  int stages;
};

// Where a walk over a ring is: the stage, and the parity of the barriers' current round.
struct Position {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// An operand in shared memory: rows of 128 bytes, swizzled by TMA, the reduced dimension along the row.
__device__ __forceinline__ uint64_t operand(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32, kUnused = 1ull << 16;
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | kUnused | kEightRows | kSwizzle128;
}

// begin() for a whole warp: one answer for all lanes. `broken` may rise while they read it, by another CTA of this
// call; lanes that differ would wait for each other for ever.
__device__ __forceinline__ Session begin_together(const CallCuda& call) {
  const Session s = begin(call);
  return {s.call, s.epoch, __all_sync(kAllLanes, s.alive) != 0};
}

// wait() for a whole warp: `ready` is called by all lanes and gives them one answer. Who has not even sent a header is
// to blame before those who wait for him.
template <class Ready>
__device__ __forceinline__ bool wait_together(const Session& s, const Ready& ready, const uint32_t& missing) {
  Clock clock;
  for (bool last = false;;) {
#pragma unroll 1
    for (int i = 0; i < kFastPolls; i++) {
      if (ready()) return true;
    }
    if (last) return false;
    const uint32_t silent = missing_headers(s.call, s.epoch);
    const uint32_t peers = silent != 0 ? silent : missing & ~(1u << s.call.rank);
    last = __any_sync(kAllLanes, give_up(s.call, s.epoch, peers, &clock)) != 0;
  }
}

}  // namespace sglang_symm::device
