// The prefill kernel between more than two ranks: a tile's owner sums it, and sends the sums to all.
#pragma once

#include "fused/prefill_handover_sm90.cuh"

namespace sglang_symm::device {

template <class T>
__device__ __forceinline__ std::byte* partial_of(const PrefillCuda& a, const Session& s, const PrefillPlace& at,
                                                 int cta, int source) {
  const int from = source < at.owner ? source : source - 1;
  const size_t tile = (static_cast<size_t>(from) * a.share + (at.index - at.owner * a.share)) * T::kCluster + cta;
  return s.call.window[at.owner] + a.partials + tile * T::kBytes;
}
template <class T>
__device__ __forceinline__ uint32_t* flag_of(const PrefillCuda& a, const Session& s, const PrefillPlace& at, int cta,
                                             int source) {
  const size_t flag = (static_cast<size_t>(source) * a.share + (at.index - at.owner * a.share)) * T::kCluster + cta;
  return reinterpret_cast<uint32_t*>(s.call.window[at.owner] + a.slots + s.parity() * a.slot_bytes) + flag;
}

// A math warp: its part of tile `visit` goes to staging, as a partial for its owner or as summed rows of y. own: how
// many tiles of its rank's own this CTA has had before.
template <class T>
__device__ __forceinline__ void hand_over(const PrefillCuda& a, const Session& s, const PrefillPlace& at, int cta,
                                          int visit, int own, int warp, int lane, uint32_t staging, Handover* h,
                                          const float (&d)[T::kTileN / 2]) {
  const PrefillEpilogue<T> end{a, s, warp, lane};
  constexpr int kBatch = PrefillEpilogue<T>::kBatch;
  const uint32_t part = staging + warp * T::kWarpBytes;  // this warp's
  typename PrefillEpilogue<T>::Rounded rounded;
  end.round(at, d, rounded);
  if (at.owner != s.call.rank) {
    wait_raised(&h->freed, visit);
    stamp(Stamp::may_store, visit);
#pragma unroll
    for (int c = 0; c < T::kChunks; c++) store_shared(part + c * T::kChunkBytes + lane * 16, rounded[c]);
  } else {
    barrier_wait(&h->arrived, own & 1);
    stamp(Stamp::may_store, visit);
    const auto store = [&](int c, uint4 v) {
      const int row = 8 * (c & 1) + (lane >> 2), column = 32 * (c >> 1) + 8 * (lane & 3);
      store_shared(part + row * T::kTileN * 2 + column * 2, v);
    };
    const auto load = [&](int r, int c, uint4(&v)[kBatch]) {
      const std::byte* partial = partial_of<T>(a, s, at, cta, r);
#pragma unroll
      for (int b = 0; b < kBatch; b++) v[b] = load_sys(static_cast<const void*>(partial + end.within(c + b)));
    };
    end.sum_of_many(at, rounded, load, store);
  }
  tell_pushed(h, warp, lane, visit + 1);
  stamp(Stamp::stored, visit);
}

// A storer, all lanes, for half of the math warps: the own tiles' sums, from staging to every rank's y. The math warps'
// tensor cores would idle meanwhile, and the mover would need 70 ns a row and rank.
template <class T>
struct OwnerStorer {
  const PrefillCuda& a;
  const Session& s;
  const PrefillSchedule<T>& schedule;
  int storer, lane;
  uint32_t staging;
  Handover* h;

  __device__ __forceinline__ void store() const {
    const int visits = schedule.visits();
#pragma unroll 1
    for (int visit = 0; visit < visits; visit++) {
      const PrefillPlace at = schedule.place(visit);
      if (at.owner == s.call.rank) store_tile(at, visit, visit + 1 == visits);
      __syncwarp();
      if (lane == 0) raise(&h->stored[storer], visit + 1);
    }
    __threadfence_system();  // before the closing barrier
    __syncwarp();
    if (lane == 0) raise(&h->stored[storer], visits + 1);
  }

 private:
  __device__ __forceinline__ void store_tile(const PrefillPlace& at, int visit, bool is_last) const {
    constexpr int kParts = T::kMathWarps / T::kStorers, kRowBytes = T::kTileN * 2;
    constexpr int kRowLanes = kRowBytes / 16, kRows = kWarp / kRowLanes;
#pragma unroll 1
    for (int warp = storer * kParts; warp < (storer + 1) * kParts; warp++) {
      wait_raised(&h->pushed[warp], visit + 1);
      const int token = at.token + 16 * warp + lane / kRowLanes, n = at.column + 8 * (lane % kRowLanes);
      const size_t place = (static_cast<size_t>(token) * a.n + n) * 2;
      const uint32_t rows = staging + warp * T::kWarpBytes + lane * 16;
      const auto store = [&](std::byte* y) {
#pragma unroll
        for (int row = 0; row < 16; row += kRows) {
          const uint4 v = load_shared(rows + row * kRowBytes);
          const size_t there = place + static_cast<size_t>(row) * a.n * 2;
          if (token + row < a.m && n < a.n) *reinterpret_cast<uint4*>(y + there) = v;
        }
      };
      store(static_cast<std::byte*>(a.y));
      // A sum of what has not come is nobody's: a rank that fills its y with NaN must not get it afterwards.
      if (__any_sync(kAllLanes, raised(&h->abandoned) != 0)) continue;
      const int peers = s.call.world_size - 1;
#pragma unroll 1
      for (int i = 0; i < peers; i++) {
        const int piece = (warp - storer * kParts) * peers + i, peer = s.peer(i + 1);
        if (!is_last) keep_pace(a, h, visit, piece, kParts * peers, false);
        store(s.call.window[peer] + h->y[peer]);
      }
    }
  }
};

// The mover, all lanes: carries partials to their owners, raises and awaits flags. It alone waits for peers.
template <class T>
struct OwnerMover {
  const PrefillCuda& a;
  const Session& s;
  const PrefillSchedule<T>& schedule;
  uint32_t staging;
  Handover* h;
  int lane;

  // Whether all that was waited for came.
  __device__ __forceinline__ bool move(bool fine) const {
    const int visits = schedule.visits();
    if (lane < s.call.world_size) h->y[lane] = offset_out(s.own()->header[s.parity()][lane]);
    __syncwarp();
#pragma unroll 1
    for (int visit = 0; visit < visits; visit++) {
      const PrefillPlace at = schedule.place(visit);
      const bool own = at.owner == s.call.rank;
      if (own) {
        stamp(Stamp::partial_awaited, visit);
        if (fine) fine = await_partials(at);
        stamp(Stamp::partial_came, visit);
        if (lane == 0) {
          if (!fine) raise(&h->abandoned, 1);
          barrier_arrive(&h->arrived);
        }
        __syncwarp();
      }
      await_math<T>(h, lane, visit + 1);
      stamp(Stamp::taken, visit);
      if (fine && !own) send(at, visit, visit + 1 == visits);
      stamp(Stamp::sent, visit);
      copies_read();
      if (own && lane < T::kStorers) wait_raised_alone(&h->stored[lane], visit + 1);
      __syncwarp();
      stamp(Stamp::freed, visit);
      if (lane == 0) raise(&h->freed, visit + 1);
      if (fine && !own && lane == 0) {
        copies_arrived();
        __threadfence_system();
        store_sys(flag_of<T>(a, s, at, schedule.cta, s.call.rank), 1u);
        stamp(Stamp::arrived, visit);
      }
      __syncwarp();
    }
    copies_arrived();
    if (lane < T::kStorers) wait_raised_alone(&h->stored[lane], visits + 1);
    __syncwarp();
    return fine && close();
  }

 private:
  __device__ __forceinline__ void send(const PrefillPlace& at, int visit, bool is_last) const {
    constexpr int kPieceBytes = T::kBytes / kPieces;
    std::byte* const to = partial_of<T>(a, s, at, schedule.cta, s.call.rank);
#pragma unroll 1
    for (int piece = 0; piece < kPieces; piece++) {
      if (!is_last) keep_pace(a, h, visit, piece, kPieces, false);
      if (lane == 0) copy_out(to + piece * kPieceBytes, staging + piece * kPieceBytes, kPieceBytes);
      copies_commit();
    }
  }

  // The closing barrier, CTA c with CTA c of the peers: nobody's sums come any more, nobody reads partials.
  __device__ __forceinline__ bool close() const {
    stamp(Stamp::close_begins);
    const bool waits = lane + 1 < s.call.world_size;
    const int peer = s.peer(waits ? lane + 1 : 0);
    if (waits) store_release(&s.pad(peer)->done[s.parity()][s.call.rank][blockIdx.x], s.epoch);
    const uint32_t* flag = &s.own()->done[s.parity()][peer][blockIdx.x];
    uint32_t missing = 0;
    const auto ready = [&] {
      missing = __reduce_or_sync(kAllLanes, waits && load_acquire(flag) != s.epoch ? 1u << peer : 0);
      return missing == 0;
    };
    const bool came = wait_together(s, ready, missing);
    stamp(Stamp::close_ends);
    return came;
  }

  __device__ __forceinline__ bool await_partials(const PrefillPlace& at) const {
    const bool waits = lane < s.call.world_size && lane != s.call.rank;
    uint32_t* flag = flag_of<T>(a, s, at, schedule.cta, waits ? lane : s.call.rank);
    uint32_t missing = 0;
    const auto ready = [&] {
      missing = __ballot_sync(kAllLanes, waits && load_acquire(flag) == kSentinel);
      return missing == 0;
    };
    if (!wait_together(s, ready, missing)) return false;
    if (waits) store_sys(flag, kSentinel);
    __syncwarp();
    return true;
  }
};

}  // namespace sglang_symm::device
