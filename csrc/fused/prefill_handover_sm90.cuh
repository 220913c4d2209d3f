// The prefill kernel: what its math warps, the mover and the storers tell each other, and the pace of what leaves.
#pragma once

#include "fused/prefill_epilogue_sm90.cuh"

namespace sglang_symm::device {

struct Handover {
  static constexpr uint32_t kAgreed = 1, kFailed = 2;
  // By math warp w: how many visits it has done; in one that ends by halves 1 more for the second, and 1 for the sums.
  uint32_t pushed[8];
  // By a storer: how many visits it has done with; between more than two ranks 1 more when all of it has arrived.
  uint32_t stored[2];
  uint32_t freed;             // by the mover
  uint32_t step;              // by the producer
  uint32_t abandoned;         // what a peer was to send will not come
  uint32_t heard;             // two ranks: what the headers say, 0 until they have come
  uint64_t arrived;           // more than two ranks: a barrier, a phase a tile of the own
  uint64_t y[kMaxWorldSize];  // there: where the ranks' y lie in their arenas
};

__device__ __forceinline__ void wait_raised_alone(const uint32_t* counter, uint32_t least) {
  while (raised(counter) < least) __nanosleep(32);
}
__device__ __forceinline__ void wait_raised(const uint32_t* counter, uint32_t least) {
  wait_raised_alone(counter, least);
  __syncwarp();
}

// A math warp has filled its part of staging: for copies, and for storers.
__device__ __forceinline__ void tell_pushed(Handover* h, int warp, int lane, int count) {
  fence_for_copies();
  __syncwarp();
  if (lane == 0) raise(&h->pushed[warp], count);
}

// Copies that the link cannot take at once stand in the way of the producer's: 64 KB from all SMs together stopped the
// MMAs for 19 us a tile. So a tile goes piece by piece while the next one is fetched: in three quarters of it, or
// before a half of that tile is to be carried too.
constexpr int kPieces = 16;
__device__ __forceinline__ void await_step(const Handover* h, int least) {
  while (*const_cast<const volatile uint32_t*>(&h->step) < static_cast<uint32_t>(least)) __nanosleep(64);
  __syncwarp();
}
__device__ __forceinline__ void keep_pace(const PrefillCuda& a, const Handover* h, int visit, int piece, int pieces,
                                          bool halves_follow) {
  const int within = min(a.k_steps * 3 / 2, 2 * a.k_steps - (halves_follow ? a.late_steps : 0));
  await_step(h, 2 * a.k_steps * (visit + 1) + piece * within / pieces);
}

// All lanes of the mover.
template <class T>
__device__ __forceinline__ void await_math(const Handover* h, int lane, int least) {
  if (lane < T::kMathWarps) wait_raised_alone(&h->pushed[lane], least);
  __syncwarp();
}

}  // namespace sglang_symm::device
