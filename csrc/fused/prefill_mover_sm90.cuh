// The prefill kernel, two-shot: how math warps hand tiles over, and the warp that carries them to other ranks.
#pragma once

#include "fused/prefill_epilogue_sm90.cuh"

namespace sglang_symm::device {

// ---- two-shot: what math warps and the mover tell each other ----

struct Handover {
  uint32_t pushed[8];         // by math warp w: how many visits it has done
  uint32_t freed;             // by the mover
  uint32_t step;              // by the producer
  uint32_t abandoned;         // by the mover: what math warps wait for in the last visit will not come
  uint64_t arrived;           // a barrier, a phase a tile of the own
  uint64_t y[kMaxWorldSize];  // where the ranks' y lie in their arenas
};

__device__ __forceinline__ void wait_raised(const uint32_t* counter, uint32_t least) {
  while (raised(counter) < least) __nanosleep(32);
  __syncwarp();
}

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

// A warp's 16 rows of sums, in staging: every NaN becomes the one that sums have, and they go to this rank's y. A
// function of its own: inlined, it takes registers from the accumulators.
template <class T>
__device__ __noinline__ void store_own_rows(const PrefillCuda& a, int token, int column, uint32_t rows, bool has_nan,
                                            int lane) {
  static_assert(T::kTileN / 8 == kWarp);  // a row is 16 bytes a lane
  const int n = column + 8 * lane;
  auto* y = static_cast<uint16_t*>(a.y) + static_cast<size_t>(token) * a.n + n;
#pragma unroll 4
  for (int row = 0; row < 16; row++) {
    const uint32_t word = rows + row * T::kPitch + lane * 16;
    uint4 v = load_shared(word);
    if (has_nan) store_shared(word, v = PrefillEpilogue<T>::canonical(v));
    if (token + row < a.m && n < a.n) *reinterpret_cast<uint4*>(y + static_cast<size_t>(row) * a.n) = v;
  }
}

// A math warp: its part of tile `visit` goes to staging, as a partial for its owner or as summed rows of y. own: how
// many tiles of its rank's own this CTA has had before.
template <class T>
__device__ __forceinline__ void hand_over(const PrefillCuda& a, const Session& s, const PrefillPlace& at, int cta,
                                          int visit, int own, int warp, int lane, uint32_t staging, Handover* h,
                                          const float (&d)[T::kTileN / 2]) {
  const PrefillEpilogue<T> end{a, s, warp, lane};
  constexpr int kBatch = PrefillEpilogue<T>::kBatch;
  const uint32_t part = staging + warp * T::kStagingWarp;  // this warp's
  const auto fragment = [&](int c) { return part + c * T::kChunkBytes + lane * 16; };
  typename PrefillEpilogue<T>::Rounded rounded;
  end.round(at, d, rounded);
  if (at.owner != s.call.rank) {
    wait_raised(&h->freed, visit);
    stamp(Stamp::may_store, visit);
#pragma unroll
    for (int c = 0; c < T::kChunks; c++) store_shared(fragment(c), rounded[c]);
  } else if constexpr (T::kTwoRanks) {
    barrier_wait(&h->arrived, own & 1);
    stamp(Stamp::may_store, visit);
    // The partial lies where the sums will: read it whole first.
    using Type = typename T::Type;
    uint4 sums[T::kChunks];
    uint32_t nan = 0;
    const auto load = [&](int, int c, uint4(&v)[kBatch]) {
#pragma unroll
      for (int b = 0; b < kBatch; b++) v[b] = load_shared(fragment(c + b));
    };
    end.sum_of_two(at, rounded, load, [&](int c, uint4 v) {
      sums[c] = v;
      nan = larger_or_nan<Type>(nan, larger_or_nan<Type>(larger_or_nan<Type>(v.x, v.y), larger_or_nan<Type>(v.z, v.w)));
    });
    __syncwarp();
#pragma unroll
    for (int c = 0; c < T::kChunks; c++) {
      store_matrices(part + (8 * (c & 1) + (lane & 7)) * T::kPitch + 64 * (c >> 1) + 16 * (lane >> 3), sums[c]);
    }
    const bool has_nan = __any_sync(kAllLanes, Type::has_nan(nan)) != 0;
    __syncwarp();
    store_own_rows<T>(a, at.token + 16 * warp, at.column, part, has_nan, lane);
  } else {
    barrier_wait(&h->arrived, own & 1);
    stamp(Stamp::may_store, visit);
    // To this rank's y, and to staging for the others'.
    const auto store = [&](int c, uint4 v) {
      const int row = 16 * warp + 8 * (c & 1) + (lane >> 2), column = 32 * (c >> 1) + 8 * (lane & 3);
      store_shared(staging + row * T::kPitch + column * 2, v);
      const int token = at.token + row, n = at.column + column;
      auto* y = static_cast<uint16_t*>(a.y) + static_cast<size_t>(token) * a.n + n;
      if (token < a.m && n < a.n) *reinterpret_cast<uint4*>(y) = v;
    };
    const auto load = [&](int r, int c, uint4(&v)[kBatch]) {
      const std::byte* partial = partial_of<T>(a, s, at, cta, r);
#pragma unroll
      for (int b = 0; b < kBatch; b++) v[b] = load_sys(static_cast<const void*>(partial + end.within(c + b)));
    };
    end.sum_of_many(at, rounded, load, store);
  }
  fence_for_copies();
  __syncwarp();
  if (lane == 0) raise(&h->pushed[warp], visit + 1);
  stamp(Stamp::stored, visit);
}

// A math warp: its part of a tile that every rank sums. The mover keeps the time: a wait with a call in it takes more
// registers than math warps with 128 accumulators have.
template <class T>
__device__ __forceinline__ bool exchange_last(const PrefillCuda& a, const Session& s, const PrefillPlace& at, int cta,
                                              int visit, int warp, int lane, bool fine, Handover* h,
                                              const float (&d)[T::kTileN / 2]) {
  const auto wait = [&](const auto& ready, uint32_t) {
    while (!ready()) {
      if (__any_sync(kAllLanes, raised(&h->abandoned) != 0)) return ready();
    }
    return true;
  };
  fine = reduce_one_shot<T>(a, s, at, cta, visit, warp, lane, fine, wait, d);
  if (lane == 0) raise(&h->pushed[warp], visit + 1);
  return fine;
}

// The mover, all lanes: carries staging to where it belongs, raises and awaits flags. It alone waits for peers, but
// in the last wave.
template <class T>
struct PrefillMover {
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
      if (T::kTwoRanks && at.owner == kEveryRank) break;  // the last: nothing to carry
      const bool own = at.owner == s.call.rank;
      if (own) {
        stamp(Stamp::partial_awaited, visit);
        if (fine) fine = await_partials(at);
        stamp(Stamp::partial_came, visit);
        if (lane == 0) announce_partials(at, fine);
        __syncwarp();
      }
      if (lane < T::kMathWarps) {
        while (raised(&h->pushed[lane]) < static_cast<uint32_t>(visit + 1)) __nanosleep(32);
      }
      __syncwarp();
      stamp(Stamp::taken, visit);
      if (fine) {
#pragma unroll 1
        for (int piece = 0; piece < kPieces; piece++) {
          if (visit + 1 < visits) keep_pace(visit + 1, piece);
          if (own) {
            send_rows(at, piece);
          } else if (lane == 0) {
            constexpr int kPieceBytes = T::kBytes / kPieces, kWarpPieces = kPieces / T::kMathWarps;
            std::byte* to = partial_of<T>(a, s, at, schedule.cta, s.call.rank);
            const int warp = piece / kWarpPieces;
            const uint32_t from = staging + warp * T::kStagingWarp + piece % kWarpPieces * kPieceBytes;
            copy_out(to + piece * kPieceBytes, from, kPieceBytes);
          }
          copies_commit();
        }
      }
      stamp(Stamp::sent, visit);
      copies_read();
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
    __syncwarp();
    fine = fine && close();
    if constexpr (T::kTwoRanks) fine = attend(visits, fine);
    return fine;
  }

 private:
  // Copies that the link cannot take at once stand in the way of the producer's: 64 KB from all SMs together stopped
  // the MMAs for 19 us a tile. So they go piece by piece while three quarters of the next tile are fetched.
  static constexpr int kPieces = 16;
  __device__ __forceinline__ void keep_pace(int next, int piece) const {
    const uint32_t least = next * a.k_steps + piece * a.k_steps * 3 / (4 * kPieces);
    while (*const_cast<volatile uint32_t*>(&h->step) < least) __nanosleep(64);
    __syncwarp();
  }

  // Between two ranks the only partial is fetched into staging, which is free by then: math warps then wait no more
  // than once, instead of once a batch (7 us a tile).
  __device__ __forceinline__ void announce_partials(const PrefillPlace& at, bool fine) const {
    if (!fine || s.call.world_size > 2) return barrier_arrive(&h->arrived);
    fence_for_copies();
    barrier_expect(&h->arrived, T::kBytes);
    const std::byte* partial = partial_of<T>(a, s, at, schedule.cta, 1 - s.call.rank);
    for (int warp = 0; warp < T::kMathWarps; warp++) {
      copy_in(staging + warp * T::kStagingWarp, partial + warp * T::kWarpBytes, T::kWarpBytes, &h->arrived);
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

  // Until the math warps have done all visits; `fine` is whether they may wait for the other rank in the last one.
  __device__ __forceinline__ bool attend(int visits, bool fine) const {
    const uint32_t missing = 1u << (1 - s.call.rank);
    const auto ready = [&] {
      const bool done = lane >= T::kMathWarps || raised(&h->pushed[lane]) >= static_cast<uint32_t>(visits);
      if (__all_sync(kAllLanes, done)) return true;
      __nanosleep(64);
      return false;
    };
    if (fine && wait_together(s, ready, missing)) return true;
    if (lane == 0) raise(&h->abandoned, 1);
    return false;
  }

  __device__ __forceinline__ bool await_partials(const PrefillPlace& at) const {
    const bool waits = lane < s.call.world_size && lane != s.call.rank;
    uint32_t* flag = flag_of<T>(a, s, at, schedule.cta, waits ? lane : s.call.rank);
    uint32_t missing = 0;
    const auto ready = [&] {
      missing = __ballot_sync(kAllLanes, waits && load_sys(flag) == kSentinel);
      return missing == 0;
    };
    if (!wait_together(s, ready, missing)) return false;
    if (waits) store_sys(flag, kSentinel);
    __threadfence_system();
    __syncwarp();
    return true;
  }

  // A piece of the rows of y, to every other rank. A lane a row: 70 ns of the copy engine each, so this rank's own
  // rows are not its work.
  __device__ __forceinline__ void send_rows(const PrefillPlace& at, int piece) const {
    constexpr int kRows = T::kTileM / kPieces;
    const int bytes = 2 * min(T::kTileN, a.n - at.column);
    const int peers = T::kTwoRanks ? 1 : s.call.world_size - 1;
    for (int i = lane; i < kRows * peers; i += kWarp) {
      const int peer = s.peer(1 + i / kRows), row = piece * kRows + i % kRows;
      if (at.token + row >= a.m) continue;
      const size_t place = static_cast<size_t>(at.token + row) * a.n + at.column;
      copy_out(s.call.window[peer] + h->y[peer] + place * 2, staging + row * T::kPitch, bytes);
    }
  }
};

}  // namespace sglang_symm::device
