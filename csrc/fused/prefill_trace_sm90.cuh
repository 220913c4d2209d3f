// When each CTA of the prefill kernel was where, for benchmarks/prefill_trace.py. Only a library that was built with
// SGLANG_SYMM_TRACE=1 (setup.py) writes it down; in any other a stamp is nothing.
#pragma once

#include "fused/ptx_sm90.cuh"

namespace sglang_symm::device {

enum class Stamp {
  // of the call
  previous_ended,  // producer: griddepcontrol.wait is over
  close_begins,    // mover
  close_ends,
  end,
  // of a visit, the first math warp's
  begins,      // it may wait for the first stage
  filled,      // the first stage has come
  multiplied,  // the MMAs are done
  may_store,   // staging has been freed, or an owner's partials are there
  stored,      // and this warp's part handed over; each half of the last tile between two ranks
  summed,      // two ranks: y is stored; of the first half, and of tiles before the last, by storers
  // of a visit, the mover's
  partial_awaited,  // more ranks: own tiles
  partial_came,
  taken,    // all math warps have handed their parts over
  sent,     // the last piece is with the copy engine
  freed,    // and staging has been read
  arrived,  // more ranks, others' tiles: all pieces are there, and the flag says so
  count
};
constexpr const char* kStamps[] = {
    "previous_ended", "close_begins", "close_ends",      "end",          "begins", "filled", "multiplied", "may_store",
    "stored",         "summed",       "partial_awaited", "partial_came", "taken",  "sent",   "freed",      "arrived"};
static_assert(sizeof kStamps / sizeof kStamps[0] == static_cast<size_t>(Stamp::count));

#ifdef SGLANG_SYMM_TRACE
constexpr int kTracedVisits = 16;
// ns of %globaltimer, which GPUs do not share; 0: has not been there.
__device__ unsigned long long trace[kMaxCtas][kTracedVisits][static_cast<int>(Stamp::count)];
#endif

// Of the math warps, which are the first eight, the first alone.
__device__ __forceinline__ void stamp([[maybe_unused]] Stamp what, [[maybe_unused]] int visit = 0) {
#ifdef SGLANG_SYMM_TRACE
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool speaks = lane == 0 && (warp == 0 || warp >= 8) && visit < kTracedVisits;
  if (speaks) trace[blockIdx.x][visit][static_cast<int>(what)] = time_ns();
#endif
}

}  // namespace sglang_symm::device
