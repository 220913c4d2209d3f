// The prefill kernel, two-shot: how math warps hand tiles over, and the warps that carry them to other ranks and to y.
#pragma once

#include "fused/prefill_epilogue_sm90.cuh"

namespace sglang_symm::device {

// ---- two-shot: what math warps and the mover tell each other ----

struct Handover {
  // By math warp w: how many visits it has done; in one of a tile that every rank sums 1 more for each half in staging,
  // and 1 for the sums.
  uint32_t pushed[8];
  // By a storer: how many visits it has done; between more than two ranks 1 more when all of it has arrived.
  uint32_t stored[2];
  uint32_t freed;             // by the mover
  uint32_t step;              // by the producer
  uint32_t abandoned;         // what a peer was to send will not come
  uint64_t arrived;           // a barrier, a phase a tile of the own
  uint64_t y[kMaxWorldSize];  // where the ranks' y lie in their arenas
};

__device__ __forceinline__ void wait_raised_alone(const uint32_t* counter, uint32_t least) {
  while (raised(counter) < least) __nanosleep(32);
}
__device__ __forceinline__ void wait_raised(const uint32_t* counter, uint32_t least) {
  wait_raised_alone(counter, least);
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

// A warp's 16 rows of sums, in staging: every NaN becomes the one that sums have. A function of its own: inlined, it
// takes registers from the accumulators.
template <class T>
__device__ __noinline__ void make_canonical(uint32_t rows, int lane) {
  static_assert(T::kTileN / 8 == kWarp);  // a row is 16 bytes a lane
  for (int row = 0; row < 16; row++) {
    const uint32_t word = rows + row * T::kPitch + lane * 16;
    store_shared(word, PrefillEpilogue<T>::canonical(load_shared(word)));
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
    const auto mine = [&](int c) { return rounded[c]; };
    end.template sum_of_two<kBatch>(at, mine, load, [&](int c, uint4 v) {
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
    if (has_nan) make_canonical<T>(part, lane);
  } else {
    barrier_wait(&h->arrived, own & 1);
    stamp(Stamp::may_store, visit);
    const auto store = [&](int c, uint4 v) {
      const int row = 8 * (c & 1) + (lane >> 2), column = 32 * (c >> 1) + 8 * (lane & 3);
      store_shared(part + row * T::kPitch + column * 2, v);
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

// A CTA's half of a tile that every rank sums, in staging: math warp w's part behind that of w - 1, the first half
// before the second.
template <class T>
__device__ __forceinline__ uint32_t half_in(uint32_t staging, int half) {
  return staging + half * HalfTile<T>::kBytes;
}
template <class T>
__device__ __forceinline__ PrefillExchange<HalfTile<T>, true> exchange_of(const PrefillEpilogue<HalfTile<T>>& end,
                                                                          const PrefillPlace& at, int half, int cta) {
  const PrefillCuda& a = end.a;
  const int first = a.tiles_m * a.tiles_n - a.last;
  return {end, at, 2 * (at.index - first) + half, 2 * a.last, cta};
}

// A math warp: its part of a tile that every rank sums. The last steps of k are those of half of the columns, then
// those of the others, so that the first half's way to the other rank hides under the MMAs of the second. The mover
// carries both, and keeps the time: a wait with a call in it takes more registers than math warps with accumulators
// have.
template <class T>
__device__ __forceinline__ bool exchange_last(const PrefillCuda& a, const Session& s, const PrefillPlace& at, int cta,
                                              int visit, int warp, int lane, bool fine, const Ring& ring,
                                              const Ring& half_ring, Position* stage, uint32_t staging, Handover* h) {
  using Half = HalfTile<T>;
  using Rounded = typename PrefillEpilogue<Half>::Rounded;
  const PrefillEpilogue<Half> end{a, s, warp, lane};
  const auto fragment = [&](int half, int c) {
    return half_in<T>(staging, half) + static_cast<uint32_t>(end.within(c));
  };
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
    Rounded own;
    end.round(at.half(half, Half::kTileN), d[half], own);
    if (half == 0) wait_raised(&h->freed, visit);
    stamp(Stamp::may_store, visit + 1 + half);
#pragma unroll
    for (int c = 0; c < Half::kChunks; c++) store_shared(fragment(half, c), own[c]);
    fence_for_copies();
    __syncwarp();
    if (lane == 0) raise(&h->pushed[warp], visit + 1 + half);
    stamp(Stamp::stored, visit + 1 + half);
  }
  const auto wait = [&](const auto& ready, uint32_t) {
    while (!ready()) {
      if (__any_sync(kAllLanes, raised(&h->abandoned) != 0)) return ready();
    }
    return true;
  };
  // One piece of code for both: what is run for the first time comes from L2.
#pragma unroll 1
  for (int half = 0; half < 2; half++) {
    const auto own = [&](int c) { return load_shared(fragment(half, c)); };
    const PrefillPlace place = at.half(half, Half::kTileN);
    fine = exchange_of<T>(end, place, half, cta).template sum<Half::kChunks>(own, fine, wait);
    stamp(Stamp::summed, visit + 1 + half);
  }
  if (lane == 0) raise(&h->pushed[warp], visit + 3);
  return fine;
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

// A storer, all lanes: the own tiles' sums of half of the math warps, from staging to this rank's y; between more than
// two ranks also to the others', for which the mover would need 70 ns a row and rank. The math warps' tensor cores
// would idle meanwhile.
template <class T>
__device__ __forceinline__ void store_own_tiles(const PrefillCuda& a, const Session& s,
                                                const PrefillSchedule<T>& schedule, int storer, int lane,
                                                uint32_t staging, Handover* h) {
  constexpr int kParts = T::kMathWarps / T::kStorers, kRowLanes = T::kTileN / 8, kRows = kWarp / kRowLanes;
  const int visits = schedule.visits();
#pragma unroll 1
  for (int visit = 0; visit < visits; visit++) {
    const PrefillPlace at = schedule.place(visit);
    if (at.owner != s.call.rank) continue;
#pragma unroll 1
    for (int warp = storer * kParts; warp < (storer + 1) * kParts; warp++) {
      wait_raised(&h->pushed[warp], visit + 1);
      const int token = at.token + 16 * warp + lane / kRowLanes, n = at.column + 8 * (lane % kRowLanes);
      const size_t place = (static_cast<size_t>(token) * a.n + n) * 2;
      const uint32_t rows = staging + warp * T::kStagingWarp + lane / kRowLanes * T::kPitch + lane % kRowLanes * 16;
      const auto store = [&](std::byte* y) {
#pragma unroll
        for (int row = 0; row < 16; row += kRows) {
          const uint4 v = load_shared(rows + row * T::kPitch);
          const size_t there = place + static_cast<size_t>(row) * a.n * 2;
          if (token + row < a.m && n < a.n) *reinterpret_cast<uint4*>(y + there) = v;
        }
      };
      store(static_cast<std::byte*>(a.y));
      if constexpr (T::kTwoRanks) continue;
      // A sum of what has not come is nobody's: a rank that fills its y with NaN must not get it afterwards.
      if (__any_sync(kAllLanes, raised(&h->abandoned) != 0)) continue;
      const int peers = s.call.world_size - 1;
#pragma unroll 1
      for (int i = 0; i < peers; i++) {
        const int piece = (warp - storer * kParts) * peers + i, peer = s.peer(i + 1);
        if (visit + 1 < visits) keep_pace(a, h, visit, piece, kParts * peers, false);
        store(s.call.window[peer] + h->y[peer]);
      }
    }
    __syncwarp();
    if (lane == 0) raise(&h->stored[storer], visit + 1);
  }
  if constexpr (!T::kTwoRanks) {
    __threadfence_system();  // before the closing barrier
    __syncwarp();
    if (lane == 0) raise(&h->stored[storer], visits + 1);
  }
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
    // The last tile may be every rank's. It goes by halves, the second one behind the closing barrier.
    const PrefillPlace last = schedule.place(visits - 1);
    const bool has_halves = T::kHasHalves && last.owner == kEveryRank;
    const int carried = visits - (has_halves ? 1 : 0);
#pragma unroll 1
    for (int visit = 0; visit < carried; visit++) {
      const PrefillPlace at = schedule.place(visit);
      const bool own = at.owner == s.call.rank;
      if (own) {
        stamp(Stamp::partial_awaited, visit);
        if (fine) fine = await_partials(at);
        stamp(Stamp::partial_came, visit);
        if (lane == 0) announce_partials(at, fine);
        __syncwarp();
      }
      await_math(visit + 1);
      stamp(Stamp::taken, visit);
      if (fine && (T::kTwoRanks || !own)) {
#pragma unroll 1
        for (int piece = 0; piece < kPieces; piece++) {
          if (visit + 1 < visits) keep_pace(a, h, visit, piece, kPieces, has_halves && visit + 1 == carried);
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
      if constexpr (T::kStorers > 0) {
        if (own && lane < T::kStorers) wait_raised_alone(&h->stored[lane], visit + 1);
      }
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
    if constexpr (T::kHasHalves) {
      if (has_halves) carry_half(last, visits - 1, 0, fine);
    }
    copies_arrived();
    if (!T::kTwoRanks && lane < T::kStorers) wait_raised_alone(&h->stored[lane], visits + 1);
    __syncwarp();
    fine = fine && close();
    if constexpr (T::kHasHalves) {
      if (has_halves) {
        carry_half(last, visits - 1, 1, fine);
        fine = attend(visits + 2, fine);
        copies_arrived();
      }
    }
    return fine;
  }

 private:
  __device__ __forceinline__ void await_math(int least) const {
    if (lane < T::kMathWarps) wait_raised_alone(&h->pushed[lane], least);
    __syncwarp();
  }

  // Half of a tile that every rank sums, to its slot on the other rank, where data are told by not being the sentinel:
  // so all of it goes there, whatever m is.
  __device__ __forceinline__ void carry_half(const PrefillPlace& at, int visit, int half, bool fine) const {
    using Half = HalfTile<T>;
    await_math(visit + 1 + half);
    stamp(Stamp::taken, visit + 1 + half);
    if (!fine) return;
    const PrefillEpilogue<Half> end{a, s, 0, lane};
    std::byte* const to = exchange_of<T>(end, at, half, schedule.cta).slot(1 - s.call.rank, s.call.rank);
    const int base = 2 * a.k_steps * (visit + 1) - a.late_steps;
#pragma unroll 1
    for (int warp = 0; warp < T::kMathWarps; warp++) {
      if (half == 0) await_step(h, base + warp * (a.late_steps * 15 / 16) / T::kMathWarps);
      const int begin = warp * Half::kWarpBytes;
      if (lane == 0) copy_out(to + begin, half_in<T>(staging, half) + begin, Half::kWarpBytes);
      copies_commit();
    }
    stamp(Stamp::sent, visit + 1 + half);
  }

  // Between two ranks the only partial is fetched into staging, which is free by then: math warps then wait no more
  // than once, instead of once a batch (7 us a tile).
  __device__ __forceinline__ void announce_partials(const PrefillPlace& at, bool fine) const {
    if (!fine) raise(&h->abandoned, 1);
    if (!fine || !T::kTwoRanks) return barrier_arrive(&h->arrived);
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

  // Until the math warps have `done` this much; `fine` is whether they may wait for the other rank.
  __device__ __forceinline__ bool attend(int done, bool fine) const {
    const uint32_t missing = 1u << (1 - s.call.rank);
    const auto ready = [&] {
      const bool is_done = lane >= T::kMathWarps || raised(&h->pushed[lane]) >= static_cast<uint32_t>(done);
      if (__all_sync(kAllLanes, is_done)) return true;
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
      missing = __ballot_sync(kAllLanes, waits && load_acquire(flag) == kSentinel);
      return missing == 0;
    };
    if (!wait_together(s, ready, missing)) return false;
    if (waits) store_sys(flag, kSentinel);
    __syncwarp();
    return true;
  }

  // Between two ranks: a piece of the rows of y, to the other one. A lane a row: 70 ns of the copy engine each, so this
  // rank's own rows are not its work.
  __device__ __forceinline__ void send_rows(const PrefillPlace& at, int piece) const {
    constexpr int kRows = T::kTileM / kPieces;
    static_assert(kRows <= kWarp);
    const int bytes = 2 * min(T::kTileN, a.n - at.column), peer = 1 - s.call.rank, row = piece * kRows + lane;
    if (lane >= kRows || at.token + row >= a.m) return;
    const size_t place = static_cast<size_t>(at.token + row) * a.n + at.column;
    copy_out(s.call.window[peer] + h->y[peer] + place * 2, staging + row * T::kPitch, bytes);
  }
};

}  // namespace sglang_symm::device
