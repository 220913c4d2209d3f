// The prefill kernel, from operands to accumulators: tiles, the order in which CTAs visit them, producer and MMAs.
#pragma once

#include "fused/prefill_cuda.h"
#include "fused/prefill_trace_sm90.cuh"
#include "fused/ring_sm90.cuh"

namespace sglang_symm::device {

constexpr int kPrefillThreads = 384;
constexpr int kMaxPrefillStages = 6, kMaxPrefillRings = 16;  // of one ring; of both

template <class T, int TileN_, bool TwoRanks>
struct PrefillTile {
  using Type = T;
  // A kernel has the sum of two ranks or that of more: with both in it, it spills more registers.
  static constexpr bool kTwoRanks = TwoRanks;
  static constexpr int kCluster = kPrefillCluster;
  static constexpr int kTileM = kPrefillTokens / kCluster, kTileN = TileN_;  // of a CTA
  // Storers bring sums to y; between two ranks they make them.
  static constexpr int kMathWarps = 8, kProducer = 8, kMover = 9, kFirstStorer = 10, kStorers = 2;
  static constexpr int kThreads = kPrefillThreads;
  static_assert(kThreads == (kFirstStorer + kStorers) * kWarp);
  static constexpr int kRowBytes = kBoxColumns * 2;
  static constexpr int kTokenBytes = kTileM * kRowBytes, kWeightBytes = kTileN * kRowBytes;
  static constexpr int kStageBytes = kTokenBytes + kWeightBytes;
  static constexpr int kBytes = kTileM * kTileN * 2;  // of a tile's result
  static constexpr int kWarpBytes = kBytes / kMathWarps;
  static constexpr int kChunkBytes = 512;                   // 16 a lane: 8 rows x 32 columns
  static constexpr int kChunks = kWarpBytes / kChunkBytes;  // chunk c: rows lane / 4 + 8 (c % 2), columns 32 (c / 2)..
};

// Between two ranks a cluster's last tile ends by halves of its columns, which have smaller stages, over the same
// memory.
template <class T>
using HalfTile = PrefillTile<typename T::Type, T::kTileN / 2, T::kTwoRanks>;
template <class T>
__host__ __device__ constexpr int half_stages(int stages) {
  return T::kTwoRanks ? stages * T::kStageBytes / HalfTile<T>::kStageBytes : 0;
}
template <class T>
constexpr bool has_barriers = kMaxPrefillStages + half_stages<T>(kMaxPrefillStages) <= kMaxPrefillRings;

// A cluster's tile, and this CTA's part of it.
constexpr int kEveryRank = -1;
struct PrefillPlace {
  int index;          // of the tile
  int owner;          // who sums it: a rank, or every rank for itself
  int token, column;  // where this CTA's part begins

  // Of two that are `columns` wide.
  __device__ __forceinline__ PrefillPlace half(int which, int columns) const {
    return {index, owner, token, column + which * columns};
  }
};

// Which tiles a CTA visits. Between two ranks both have the same order; between more those of rank + 1 come first, the
// own rank's last. Within a part, bands of kBand rows of tiles column by column: what runs at the same time shares its
// tokens and its weights in L2.
template <class T>
struct PrefillSchedule {
  static constexpr int kBand = 8;
  const PrefillCuda& a;
  int cta;  // in the cluster

  __device__ __forceinline__ int all() const { return a.tiles_m * a.tiles_n; }
  __device__ __forceinline__ int visits() const {
    const int clusters = static_cast<int>(gridDim.x) / T::kCluster, first = static_cast<int>(blockIdx.x) / T::kCluster;
    return (all() - first + clusters - 1) / clusters;
  }
  __device__ __forceinline__ PrefillPlace place(int visit) const { return place_on(a.call.rank, visit); }
  // Nothing follows that a tile's way could hide under.
  __device__ __forceinline__ bool ends_by_halves(int visit) const { return T::kTwoRanks && visit + 1 == visits(); }
  // What the same CTA of another rank visits; grids are equal on all ranks.
  __device__ __forceinline__ PrefillPlace place_on(int rank, int visit) const {
    const int clusters = static_cast<int>(gridDim.x) / T::kCluster;
    int t = static_cast<int>(blockIdx.x) / T::kCluster + visit * clusters, owner = kEveryRank;
    if constexpr (!T::kTwoRanks) {
      t += min((rank + 1) * a.share, all());
      if (t >= all()) t -= all();
      owner = t / a.share;
    }
    const int band = t / (kBand * a.tiles_n), rows = min(kBand, a.tiles_m - band * kBand);
    const int inside = t - band * kBand * a.tiles_n;
    const int row = band * kBand + inside % rows, column = inside / rows;
    return {t, owner, (T::kCluster * row + cta) * T::kTileM, column * T::kTileN};
  }
};

// ---- producer: one thread ----
//
// One row of tiles reads its weights once. Several rows share them, at about the same time, and tokens of a long k are
// more than L2 holds: then nothing goes first and nothing stays.

template <class T>
struct PrefillProducer {
  const PrefillCuda& a;
  const CUtensorMap* weight_map;
  const CUtensorMap* token_map;
  const Ring& ring;
  const Ring& half_ring;
  const PrefillSchedule<T>& schedule;
  volatile uint32_t* step;  // how many have been asked for: a stage counts two, a half's one

  // How long L2 keeps them.
  __device__ __forceinline__ uint64_t of_weights() const { return a.tiles_m > 1 ? kEvictNormal : kEvictFirst; }
  __device__ __forceinline__ uint64_t of_tokens() const { return a.tiles_m > 1 ? kEvictNormal : kEvictLast; }
  __device__ __forceinline__ void weight(int stage, int k, const PrefillPlace& at) const {
    constexpr uint16_t kBoth = 3;  // a bit a CTA
    barrier_expect(&ring.full[stage], T::kStageBytes);
    const int row = schedule.cta * (T::kTileN / T::kCluster);
    const uint32_t to = ring.memory + stage * T::kStageBytes + T::kTokenBytes + row * T::kRowBytes;
    load_box_to_all(to, weight_map, k * kBoxColumns, at.column + row, &ring.full[stage], kBoth, of_weights());
  }
  __device__ __forceinline__ void tokens(int stage, int k, const PrefillPlace& at) const {
    const uint32_t to = ring.memory + stage * T::kStageBytes;
    load_box(to, token_map, k * kBoxColumns, at.token, &ring.full[stage], of_tokens());
  }
  // Stages of a tile's first steps, that are for all of its columns.
  __device__ __forceinline__ int whole(int visit) const {
    return a.k_steps - (schedule.ends_by_halves(visit) ? a.late_steps : 0);
  }
  // Of the first tile: what is asked for before stages are given back.
  __device__ __forceinline__ int ahead() const { return min(ring.stages, whole(0)); }
  __device__ __forceinline__ void fill_weights() const {
    const PrefillPlace at = schedule.place(0);
    for (int k = 0; k < ahead(); k++) weight(k, k, at);
  }
  __device__ __forceinline__ void fill_tokens() const {
    const PrefillPlace at = schedule.place(0);
    for (int k = 0; k < ahead(); k++) tokens(k, k, at);
  }
  __device__ __forceinline__ void stream() const {
    Position p;
    p.parity = 1;  // a stage that was never used is empty
    for (int i = 0; i < ahead(); i++) p.next(ring.stages);
    int k = ahead();
    uint32_t steps = 2 * k;
    const int visits = schedule.visits();
    for (int visit = 0; visit < visits; visit++, k = 0) {
      const PrefillPlace at = schedule.place(visit);
#pragma unroll 1
      for (const int whole_steps = whole(visit); k < whole_steps; k++) {
        barrier_wait(&ring.empty[p.stage], p.parity);
        weight(p.stage, k, at);
        tokens(p.stage, k, at);
        p.next(ring.stages);
        *step = steps += 2;
      }
      if constexpr (T::kTwoRanks) {
        if (schedule.ends_by_halves(visit)) stream_halves(at, p, steps);
      }
    }
  }

 private:
  // The last steps of k, of half of the columns and then of the others. CTAs fetch the weight of both in turn: the
  // tensor map's box has as many rows as half of a tile.
  __device__ __forceinline__ void stream_halves(const PrefillPlace& at, Position before, uint32_t steps) const {
    using Half = HalfTile<T>;
    static_assert(Half::kTileN == T::kTileN / T::kCluster);
    constexpr uint16_t kBoth = 3;
    const bool in_order = before.stage == 0;
    int read = 0;  // stages of the first ring whose memory is free
    Position p;
    p.parity = 1;
#pragma unroll 1
    for (int i = 0; i < 2 * a.late_steps; i++) {
      const int over = (i + 1) * Half::kStageBytes;
      const int needed = in_order ? min(ring.stages, (over + T::kStageBytes - 1) / T::kStageBytes) : ring.stages;
      for (; read < needed; read++) {
        barrier_wait(&ring.empty[before.stage], before.parity);
        before.next(ring.stages);
      }
      uint64_t* const full = &half_ring.full[p.stage];
      barrier_wait(&half_ring.empty[p.stage], p.parity);
      barrier_expect(full, Half::kStageBytes);
      const int half = i >= a.late_steps ? 1 : 0, k = a.k_steps - (half + 1) * a.late_steps + i;
      const PrefillPlace place = at.half(half, Half::kTileN);
      const uint32_t to = half_ring.memory + p.stage * Half::kStageBytes;
      if (i % T::kCluster == schedule.cta) {
        load_box_to_all(to + Half::kTokenBytes, weight_map, k * kBoxColumns, place.column, full, kBoth, of_weights());
      }
      load_box(to, token_map, k * kBoxColumns, place.token, full, of_tokens());
      p.next(half_ring.stages);
      *step = ++steps;
    }
  }
};

// ---- math ----

// d += 64 tokens of this warpgroup x kTileN rows of the weight, `steps` stages of k.
template <class T>
__device__ __forceinline__ void multiply(const Ring& ring, int steps, int visit, int group, int lane, Position* at,
                                         float (&d)[T::kTileN / 2]) {
  constexpr int kMmaBytes = 32, kMmas = T::kRowBytes / kMmaBytes, kGroupBytes = 64 * T::kRowBytes;
  int before = -1;  // the stage whose MMAs may still run
  const auto release = [&](int stage) {
    if (lane < T::kCluster) barrier_arrive_at(&ring.empty[stage], lane);
  };
#pragma unroll 1
  for (int k = 0; k < steps; k++) {
    barrier_wait(&ring.full[at->stage], at->parity);
    if (k == 0) stamp(Stamp::filled, visit);
    const uint32_t tokens = ring.memory + at->stage * T::kStageBytes + group * kGroupBytes;
    const uint32_t weight = ring.memory + at->stage * T::kStageBytes + T::kTokenBytes;
    wgmma_fence();
#pragma unroll
    for (int mma = 0; mma < kMmas; mma++) {
      Wgmma<typename T::Type, T::kTileN>::add(d, operand(tokens + mma * kMmaBytes), operand(weight + mma * kMmaBytes));
    }
    wgmma_commit();
    wgmma_wait_previous();
    if (before >= 0) release(before);
    before = at->stage;
    at->next(ring.stages);
  }
  wgmma_wait_all();
  stamp(Stamp::multiplied, visit);
  if (before >= 0) release(before);
}

// d = that; the first steps of a tile, or all.
template <class T>
__device__ __forceinline__ void multiply_tile(const Ring& ring, int steps, int visit, int group, int lane, Position* at,
                                              float (&d)[T::kTileN / 2]) {
#pragma unroll
  for (int i = 0; i < T::kTileN / 2; i++) d[i] = 0.0f;
  stamp(Stamp::begins, visit);
  multiply<T>(ring, steps, visit, group, lane, at, d);
}

}  // namespace sglang_symm::device
