// The prefill kernel between two ranks: both visit the same tiles with the same CTAs, send their rounded partials to
// each other's slots, and sum all of them for themselves.
#pragma once

#include "fused/prefill_handover_sm90.cuh"

namespace sglang_symm::device {

// A CTA's half of a tile in staging: math warp w's part behind that of w - 1, the first half before the second.
template <class T>
__device__ __forceinline__ uint32_t half_in(uint32_t staging, int half) {
  return staging + half * HalfTile<T>::kBytes;
}
// Where it lies in the slots of `rank`.
template <class T>
__device__ __forceinline__ std::byte* half_in_slots(const PrefillCuda& a, const Session& s, int rank,
                                                    const PrefillPlace& at, int half, int cta) {
  const size_t part = (2 * static_cast<size_t>(at.index) + half) * T::kCluster + cta;
  return s.call.window[rank] + a.slots + s.parity() * a.slot_bytes + part * HalfTile<T>::kBytes;
}

// ---- sums ----

// Whether all ranks' headers have come and agree: nothing is read of what a rank sent that makes another call.
__device__ __forceinline__ bool await_agreement(const Handover* h) {
  wait_raised(&h->heard, Handover::kAgreed);
  return __all_sync(kAllLanes, raised(&h->heard) == Handover::kAgreed) != 0;
}

// Any warp: y of what math warp `warp` has of half of a tile. This rank's part is in staging; the other's is told by
// not being the sentinel, so all of it is sent, whatever m is. The mover keeps the time: a wait with a call in it takes
// more registers than math warps with accumulators have. False once something did not come: then the rest is NaN.
template <class T>
__device__ __forceinline__ bool sum_half(const PrefillCuda& a, const Session& s, const PrefillPlace& tile, int half,
                                         int cta, int warp, int lane, bool fine, uint32_t staging, const Handover* h) {
  using Half = HalfTile<T>;
  constexpr int kChunks = Half::kChunks;
  const PrefillPlace at = tile.half(half, Half::kTileN);
  const PrefillEpilogue<Half> end{a, s, warp, lane};
  std::byte* const from = half_in_slots<T>(a, s, s.call.rank, at, half, cta);
  uint4 other[kChunks] = {};
  const auto ready = [&] {
    // The last chunk that was sent tells when a look is worth while: a wait takes no bandwidth from what comes.
    bool all = load_sys(reinterpret_cast<const uint32_t*>(from + end.within(kChunks - 1))) != kSentinel;
    if (!__all_sync(kAllLanes, all)) return false;
#pragma unroll
    for (int c = 0; c < kChunks; c++) other[c] = load_slot(from + end.within(c));
#pragma unroll
    for (int c = 0; c < kChunks; c++) all &= is_data(other[c]);
    return __all_sync(kAllLanes, all) != 0;
  };
  while (fine && !ready()) {
    if (__any_sync(kAllLanes, raised(&h->abandoned) != 0)) {
      fine = ready();
      break;
    }
  }
  if (fine) {
#pragma unroll
    for (int c = 0; c < kChunks; c++) store_slot(from + end.within(c), all_bits_set());
  }
  const auto own = [&](int c) { return load_shared(half_in<T>(staging, half) + static_cast<uint32_t>(end.within(c))); };
  auto* y = static_cast<uint16_t*>(a.y);
  const auto store = [&](int c, uint4 v) {
    const int row = end.token(at, c), column = at.column + 32 * (c >> 1) + 8 * (lane & 3);
    v = fine ? end.rows(v) : all_bits_set();
    if (row < a.m && column < a.n) *reinterpret_cast<uint4*>(y + static_cast<size_t>(row) * a.n + column) = v;
  };
  end.sum_of_two(at, own, other, store);
  return fine;
}

// Halves of the last tile that storers sum: the first, if it comes under MMAs of the second.
__device__ __forceinline__ int halves_of_storers(const PrefillCuda& a) {
  return a.late_steps > 0 ? 1 : 0;
}

// ---- math warps ----

// A warp's rounded part of a half, chunk by chunk from `rounded` on, into staging.
template <class T>
__device__ __forceinline__ void store_half(const PrefillEpilogue<HalfTile<T>>& end, uint32_t staging, int half,
                                           const uint4* rounded) {
#pragma unroll
  for (int c = 0; c < HalfTile<T>::kChunks; c++) {
    store_shared(half_in<T>(staging, half) + static_cast<uint32_t>(end.within(c)), rounded[c]);
  }
}

// Its part of a tile with a visit still to come: the mover sends it under the MMAs of that, and storers sum it.
template <class T>
__device__ __forceinline__ void hand_halves_over(const PrefillCuda& a, const Session& s, const PrefillPlace& at,
                                                 int visit, int warp, int lane, uint32_t staging, Handover* h,
                                                 const float (&d)[T::kTileN / 2]) {
  using Half = HalfTile<T>;
  const PrefillEpilogue<T> end{a, s, warp, lane};
  const PrefillEpilogue<Half> of_half{a, s, warp, lane};
  typename PrefillEpilogue<T>::Rounded rounded;
  end.round(at, d, rounded);
  wait_raised(&h->freed, visit);
  stamp(Stamp::may_store, visit);
#pragma unroll
  for (int half = 0; half < 2; half++) store_half<T>(of_half, staging, half, rounded + half * Half::kChunks);
  tell_pushed(h, warp, lane, visit + 1);
  stamp(Stamp::stored, visit);
}

// Its part of the last tile. The last steps of k are those of half of the columns, then those of the others, so that
// the first half's way to the other rank hides under the MMAs of the second.
template <class T>
__device__ __forceinline__ void exchange_last(const PrefillCuda& a, const Session& s, const PrefillPlace& at, int cta,
                                              int visit, int warp, int lane, const Ring& ring, const Ring& half_ring,
                                              Position* stage, uint32_t staging, Handover* h) {
  using Half = HalfTile<T>;
  const PrefillEpilogue<Half> end{a, s, warp, lane};
  constexpr int kAll = T::kTileN / 2, kHalf = Half::kTileN / 2;
  float all[kAll], d[2][kHalf];
  multiply_tile<T>(ring, a.k_steps - a.late_steps, visit, warp / 4, lane, stage, all);
  // The compiler finds no registers for MMAs of different widths that add to the same ones.
#pragma unroll
  for (int i = 0; i < kAll; i++) d[i / kHalf][i % kHalf] = moved(all[i]);
  Position half_stage;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    multiply<Half>(half_ring, a.late_steps, visit + 1 + half, warp / 4, lane, &half_stage, d[half]);
    typename PrefillEpilogue<Half>::Rounded rounded;
    end.round(at.half(half, Half::kTileN), d[half], rounded);
    if (half == 0) wait_raised(&h->freed, visit);
    stamp(Stamp::may_store, visit + 1 + half);
    store_half<T>(end, staging, half, rounded);
    tell_pushed(h, warp, lane, visit + 1 + half);
    stamp(Stamp::stored, visit + 1 + half);
  }
  // One piece of code for both: what is run for the first time comes from L2.
  bool fine = s.alive && await_agreement(h);
#pragma unroll 1
  for (int half = halves_of_storers(a); half < 2; half++) {
    fine = sum_half<T>(a, s, at, half, cta, warp, lane, fine, staging, h);
    stamp(Stamp::summed, visit + 1 + half);
  }
  if (lane == 0) raise(&h->pushed[warp], visit + 3);
}

// ---- storers ----

// All lanes: sums of what half of the math warps have, whose tensor cores would idle meanwhile.
template <class T>
struct ExchangeStorer {
  const PrefillCuda& a;
  const Session& s;
  const PrefillSchedule<T>& schedule;
  int storer, lane;
  uint32_t staging;
  Handover* h;

  __device__ __forceinline__ void store() const {
    constexpr int kParts = T::kMathWarps / T::kStorers;
    const int visits = schedule.visits();
    bool fine = s.alive && await_agreement(h);
#pragma unroll 1
    for (int visit = 0; visit < visits; visit++) {
      const PrefillPlace at = schedule.place(visit);
      const bool is_last = schedule.ends_by_halves(visit);
      const int halves = is_last ? halves_of_storers(a) : 2;
#pragma unroll 1
      for (int i = 0; i < halves * kParts; i++) {
        const int warp = storer * kParts + i % kParts, half = i / kParts;
        wait_raised(&h->pushed[warp], visit + 1);
        fine = sum_half<T>(a, s, at, half, schedule.cta, warp, lane, fine, staging, h);
      }
      if (halves > 0) stamp(Stamp::summed, visit + (is_last ? 1 : 0));
      __syncwarp();
      if (lane == 0) raise(&h->stored[storer], visit + 1);
    }
  }
};

// ---- the mover ----

// All lanes: carries staging to the other rank's slots, and keeps the time of all who wait for what that one sends.
template <class T>
struct ExchangeMover {
  const PrefillCuda& a;
  const Session& s;
  const PrefillSchedule<T>& schedule;
  uint32_t staging;
  Handover* h;
  int lane;

  // Whether all that was waited for came.
  __device__ __forceinline__ bool move(bool fine) const {
    static_assert(kPieces == 2 * T::kMathWarps);
    if (lane == 0) raise(&h->heard, fine ? Handover::kAgreed : Handover::kFailed);
    const int last = schedule.visits() - 1;
#pragma unroll 1
    for (int visit = 0; visit < last; visit++) {
      const PrefillPlace at = schedule.place(visit);
      await_math<T>(h, lane, visit + 1);
      stamp(Stamp::taken, visit);
#pragma unroll 1
      for (int piece = 0; fine && piece < kPieces; piece++) {
        keep_pace(a, h, visit, piece, kPieces, visit + 1 == last);
        send(at, piece / T::kMathWarps, piece % T::kMathWarps, 1);
      }
      stamp(Stamp::sent, visit);
      copies_read();
      fine = attend(visit + 1, visit + 1, fine);
      __syncwarp();
      stamp(Stamp::freed, visit);
      if (lane == 0) raise(&h->freed, visit + 1);
    }
    const PrefillPlace at = schedule.place(last);
    // The first half at the pace of the second one's steps, if that has any; the rest at once.
    const int base = 2 * a.k_steps * (last + 1) - a.late_steps;
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      await_math<T>(h, lane, last + 1 + half);
      stamp(Stamp::taken, last + 1 + half);
      const int parts = half < halves_of_storers(a) ? 1 : T::kMathWarps;
#pragma unroll 1
      for (int warp = 0; fine && warp < T::kMathWarps; warp += parts) {
        if (parts == 1) await_step(h, base + warp * (a.late_steps * 15 / 16) / T::kMathWarps);
        send(at, half, warp, parts);
      }
      stamp(Stamp::sent, last + 1 + half);
    }
    fine = attend(last + 3, last + 1, fine);
    copies_arrived();
    return fine;
  }

 private:
  // What so many math warps have of a half, a lane each.
  __device__ __forceinline__ void send(const PrefillPlace& at, int half, int first, int parts) const {
    constexpr int kBytes = HalfTile<T>::kWarpBytes;
    const int begin = (first + lane) * kBytes;
    std::byte* const to = half_in_slots<T>(a, s, 1 - s.call.rank, at, half, schedule.cta) + begin;
    if (lane < parts) copy_out(to, half_in<T>(staging, half) + begin, kBytes);
    copies_commit();
  }

  // Until math warps and storers have done so much; `fine` is whether they may wait for the other rank.
  __device__ __forceinline__ bool attend(int pushed, int stored, bool fine) const {
    const uint32_t missing = 1u << (1 - s.call.rank);
    const auto ready = [&] {
      bool is_done = true;
      if (lane < T::kMathWarps) is_done = raised(&h->pushed[lane]) >= static_cast<uint32_t>(pushed);
      if (lane < T::kStorers) is_done &= raised(&h->stored[lane]) >= static_cast<uint32_t>(stored);
      if (__all_sync(kAllLanes, is_done)) return true;
      __nanosleep(64);
      return false;
    };
    if (fine && wait_together(s, ready, missing)) return true;
    if (lane == 0) raise(&h->abandoned, 1);
    while (!ready()) continue;
    return false;
  }
};

}  // namespace sglang_symm::device
