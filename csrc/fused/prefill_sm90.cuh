// The kernel of many tokens: a persistent GEMM whose tiles are reduced by their owners while later tiles are computed.
//
//   rank 0    | tiles that rank 1 owns           | tiles that it owns itself              | closing
//   math      | MMA 0  | MMA 1  | MMA 2  | ..    | MMA + sum  | MMA + sum  | ..           | barrier
//   mover     |        | 0 -> 1 | 1 -> 1 | ..            | y -> all | y -> all |          |
//   rank 1    | tiles that rank 0 owns           | tiles that it owns itself              |
//
// Every rank visits its own tiles last and in the same order as the others send them, so a partial has come long before
// it is summed, and both halves of the traffic hide under the MMAs; what is left is the way of the last tiles' sums.
//
// A cluster of two CTAs takes 256 tokens x kTileN rows of the weight, each CTA 128 of the tokens; each fetches half of
// the weight for both. A CTA: 8 math warps (2 warpgroups, 64 tokens each), a producer, a mover
// (and two warps that only keep the warpgroup whole).
//
//   stage s    full[s]: its bytes have landed, of both CTAs' copies     empty[s]: 16 math warps of both have read it
//   staging    math warp w: pushed[w] = i + 1, tile i lies there        mover: freed = i + 1, it has been read out
//   arrived    a barrier, a phase a tile of the own: its partials are here (between two ranks: in staging)
//   partials   in the owner's arena, with a flag a tile in its slots: 1 when all of it has been written, then the
//              sentinel again. The closing barrier holds a rank until its peers have summed what it sent, and nothing
//              is sent before the call before has ended, hence staging memory is free between calls
//
// Few tiles, one to a CTA (one_shot): nothing is left to hide under. Math warps push their accumulators to everybody's
// slots, wait for the others', and store y here alone: one step over the link instead of two.
#pragma once

#include "fused/prefill_cuda.h"
#include "fused/ring_sm90.cuh"

namespace sglang_symm::device {

constexpr int kMaxPrefillStages = 8;

template <class T, int TileN_, bool OneShot>
struct PrefillTile {
  using Type = T;
  static constexpr bool kOneShot = OneShot;
  static constexpr int kTileM = 128, kTileN = TileN_;  // of a CTA
  static constexpr int kMathWarps = 8, kProducer = 8, kMover = 9, kThreads = 12 * kWarp;
  // A thread's: as launched; wide tiles: a math warp's, another warp's.
  static constexpr bool kMovesRegisters = kTileN > 128;
  static constexpr int kRegisters = 168, kMathRegisters = 232, kOtherRegisters = 40;
  static constexpr int kRowBytes = kBoxColumns * 2;
  static constexpr int kTokenBytes = kTileM * kRowBytes, kWeightBytes = kTileN * kRowBytes;
  static constexpr int kStageBytes = kTokenBytes + kWeightBytes;
  static constexpr int kBytes = kTileM * kTileN * 2;  // of a tile's result
  static constexpr int kWarpBytes = kBytes / kMathWarps;
  static constexpr int kChunkBytes = 512;                   // 16 a lane: 8 rows x 32 columns
  static constexpr int kChunks = kWarpBytes / kChunkBytes;  // chunk c: rows lane / 4 + 8 (c % 2), columns 32 (c / 2)..
};

// A cluster's tile, and this CTA's part of it.
struct PrefillPlace {
  int index;  // of the tile
  int owner;
  int token, column;  // where this CTA's part begins
};

// Which tiles a CTA visits: those of rank + 1 first, its own rank's last. Within them, bands of kBand rows of tiles
// column by column: what runs at the same time shares its tokens and its weights in L2.
template <class T>
struct PrefillSchedule {
  static constexpr int kBand = 8;
  const PrefillCuda& a;
  int cta;  // in the cluster

  __device__ __forceinline__ int all() const { return a.tiles_m * a.tiles_n; }
  __device__ __forceinline__ int visits() const {
    const int clusters = static_cast<int>(gridDim.x) / 2, first = static_cast<int>(blockIdx.x) / 2;
    return (all() - first + clusters - 1) / clusters;
  }
  __device__ __forceinline__ PrefillPlace place(int visit) const {
    const int clusters = static_cast<int>(gridDim.x) / 2;
    int t = static_cast<int>(blockIdx.x) / 2 + visit * clusters + min((a.call.rank + 1) * a.share, all());
    if (t >= all()) t -= all();
    const int band = t / (kBand * a.tiles_n), rows = min(kBand, a.tiles_m - band * kBand);
    const int inside = t - band * kBand * a.tiles_n;
    const int row = band * kBand + inside % rows, column = inside / rows;
    return {t, t / a.share, (2 * row + cta) * T::kTileM, column * T::kTileN};
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
  const PrefillSchedule<T>& schedule;
  volatile uint32_t* step;  // how many stages have been asked for

  __device__ __forceinline__ void weight(int stage, int k, const PrefillPlace& at) const {
    constexpr int kHalf = T::kTileN / 2;
    barrier_expect(&ring.full[stage], T::kStageBytes);
    const uint32_t to = ring.memory + stage * T::kStageBytes + T::kTokenBytes + schedule.cta * kHalf * T::kRowBytes;
    load_box_to_all(to, weight_map, k * kBoxColumns, at.column + schedule.cta * kHalf, &ring.full[stage], 3,
                    a.tiles_m > 1 ? kEvictNormal : kEvictFirst);
  }
  __device__ __forceinline__ void tokens(int stage, int k, const PrefillPlace& at) const {
    load_box(ring.memory + stage * T::kStageBytes, token_map, k * kBoxColumns, at.token, &ring.full[stage],
             a.tiles_m > 1 ? kEvictNormal : kEvictLast);
  }
  __device__ __forceinline__ int ahead() const { return min(ring.stages, a.k_steps); }  // of the first tile
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
    uint32_t steps = k;
    const int visits = schedule.visits();
    for (int visit = 0; visit < visits; visit++, k = 0) {
      const PrefillPlace at = schedule.place(visit);
#pragma unroll 1
      for (; k < a.k_steps; k++) {
        barrier_wait(&ring.empty[p.stage], p.parity);
        weight(p.stage, k, at);
        tokens(p.stage, k, at);
        p.next(ring.stages);
        *step = ++steps;
      }
    }
  }
};

// ---- math ----

// d = 64 tokens of this warpgroup x kTileN rows of the weight, all of k.
template <class T>
__device__ __forceinline__ void multiply_tile(const PrefillCuda& a, const Ring& ring, int group, int lane, Position* at,
                                              float (&d)[T::kTileN / 2]) {
  constexpr int kMmaBytes = 32, kMmas = T::kRowBytes / kMmaBytes, kGroupBytes = 64 * T::kRowBytes;
#pragma unroll
  for (int i = 0; i < T::kTileN / 2; i++) d[i] = 0.0f;
  int before = -1;  // the stage whose MMAs may still run
  const auto release = [&](int stage) {
    if (lane < 2) barrier_arrive_at(&ring.empty[stage], lane);
  };
#pragma unroll 1
  for (int k = 0; k < a.k_steps; k++) {
    barrier_wait(&ring.full[at->stage], at->parity);
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
  if (before >= 0) release(before);
}

// Four lanes have a row's words of columns 8 j + 2 (lane % 4), j = 0..3; afterwards lane l has columns 8 (l % 4) ..
// + 7.
__device__ __forceinline__ uint4 row_of_quad(uint4 v, int lane) {
  const bool odd = (lane & 1) != 0, high = (lane & 2) != 0;
  const uint32_t a = __shfl_xor_sync(kAllLanes, odd ? v.x : v.y, 1);
  const uint32_t b = __shfl_xor_sync(kAllLanes, odd ? v.z : v.w, 1);
  const uint4 w = odd ? make_uint4(a, v.y, b, v.w) : make_uint4(v.x, a, v.z, b);
  const uint32_t c = __shfl_xor_sync(kAllLanes, high ? w.x : w.z, 2);
  const uint32_t e = __shfl_xor_sync(kAllLanes, high ? w.y : w.w, 2);
  return high ? make_uint4(c, e, w.z, w.w) : make_uint4(w.x, w.y, c, e);
}

// A math warp's end of a tile.
template <class T>
struct PrefillEpilogue {
#ifndef BATCH
#define BATCH 4
#endif
  static constexpr int kBatch = BATCH;  // chunks under way together
  using Accumulators = float[T::kTileN / 2];

  const PrefillCuda& a;
  const Session& s;
  int warp, lane;  // warp: of 8, 16 tokens each

  // The rounded partial of chunk c; of a product that the library has made, if it has.
  __device__ __forceinline__ uint4 chunk(const PrefillPlace& at, const Accumulators& d, int c) const {
    if (a.partial != nullptr) return product(at, c);
    const int j = 4 * (c >> 1), h = 2 * (c & 1);
    return make_uint4(T::Type::round(&d[4 * j + h]), T::Type::round(&d[4 * j + 4 + h]),
                      T::Type::round(&d[4 * j + 8 + h]), T::Type::round(&d[4 * j + 12 + h]));
  }
  __device__ __forceinline__ int token(const PrefillPlace& at, int c) const {
    return at.token + 16 * warp + 8 * (c & 1) + (lane >> 2);
  }
  // Where this warp's chunks of a tile lie in a tile of a slot, of the staging memory, of a peer's partials.
  __device__ __forceinline__ size_t within(int c) const {
    return static_cast<size_t>(warp * T::kWarpBytes + c * T::kChunkBytes + lane * 16);
  }

  // load(r, c, v): rank r's words of chunks c .. c + kBatch - 1; store(c, v): the sums, as the lane's 16 bytes of a
  // row.
  template <class Load, class Store>
  __device__ __forceinline__ void sum(const PrefillPlace& at, const Accumulators& d, const Load& load,
                                      const Store& store) const {
    if (s.call.world_size == 2) {  // the usual: a + b is b + a
#pragma unroll
      for (int first = 0; first < T::kChunks; first += kBatch) {
        uint4 v[kBatch] = {};
        load(1 - s.call.rank, first, v);
#pragma unroll
        for (int b = 0; b < kBatch; b++) {
          const int c = first + b;
          float total[8], other[8];
          unpack(chunk(at, d, c), total);
          unpack(v[b], other);
#pragma unroll
          for (int i = 0; i < 8; i++) total[i] = __fadd_rn(total[i], other[i]);
          store(c, rows(at, c, total));
        }
      }
      return;
    }
#pragma unroll
    for (int first = 0; first < T::kChunks; first += kBatch) {
      float total[kBatch][8];
#pragma unroll 1
      for (int r = 0; r < s.call.world_size; r++) {
        uint4 v[kBatch] = {};
        if (r == s.call.rank) {
#pragma unroll
          for (int b = 0; b < kBatch; b++) v[b] = chunk(at, d, first + b);
        } else {
          load(r, first, v);
        }
#pragma unroll
        for (int b = 0; b < kBatch; b++) {
          float f[8];
          unpack(v[b], f);
#pragma unroll
          for (int i = 0; i < 8; i++) total[b][i] = r == 0 ? f[i] : __fadd_rn(total[b][i], f[i]);
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; b++) store(first + b, rows(at, first + b, total[b]));
    }
  }

 private:
  static __device__ __forceinline__ void unpack(uint4 v, float (&f)[8]) {
    T::Type::unpack(v.x, &f[0]);
    T::Type::unpack(v.y, &f[2]);
    T::Type::unpack(v.z, &f[4]);
    T::Type::unpack(v.w, &f[6]);
  }
  // The sums of chunk c, with the bias, rounded, as the lane's 16 bytes of a row.
  __device__ __forceinline__ uint4 rows(const PrefillPlace& at, int c, float (&total)[8]) const {
    using Type = typename T::Type;
    if (a.bias != nullptr) add_bias(at.column + 32 * (c >> 1), total);
    uint4 v =
        make_uint4(Type::round(&total[0]), Type::round(&total[2]), Type::round(&total[4]), Type::round(&total[6]));
    if (Type::has_nan(v.x) || Type::has_nan(v.y) || Type::has_nan(v.z) || Type::has_nan(v.w)) {
      v = make_uint4(Type::canonical(v.x), Type::canonical(v.y), Type::canonical(v.z), Type::canonical(v.w));
    }
    return row_of_quad(v, lane);
  }
  __device__ __forceinline__ uint4 product(const PrefillPlace& at, int c) const {
    uint32_t word[4] = {};
    const int row = token(at, c);
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const int column = at.column + 32 * (c >> 1) + 8 * q + 2 * (lane & 3);
      if (row >= a.m || column >= a.n) continue;
      const auto* words = static_cast<const uint16_t*>(a.partial) + static_cast<size_t>(row) * a.n + column;
      word[q] = *reinterpret_cast<const uint32_t*>(words);
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
  }
  __device__ __forceinline__ void add_bias(int column, float (&total)[8]) const {
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const int n = column + 8 * q + 2 * (lane & 3);
      if (n >= a.n) continue;
      float f[2];
      T::Type::unpack(*reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(a.bias) + n), f);
      total[2 * q] = __fadd_rn(total[2 * q], f[0]);
      total[2 * q + 1] = __fadd_rn(total[2 * q + 1], f[1]);
    }
  }
};

// ---- one-shot ----

// False once something did not come: then the rest of y is NaN.
template <class T>
__device__ __forceinline__ bool reduce_one_shot(const PrefillCuda& a, const Session& s, const PrefillPlace& at, int cta,
                                                int warp, int lane, bool fine, const float (&d)[T::kTileN / 2]) {
  const PrefillEpilogue<T> end{a, s, warp, lane};
  const auto slot = [&](int rank, int source, int c) {
    const size_t tile = (static_cast<size_t>(source) * (a.tiles_m * a.tiles_n) + at.index) * 2 + cta;
    return s.call.window[rank] + a.slots + s.parity() * a.slot_bytes + tile * T::kBytes + end.within(c);
  };
  const auto comes = [&](int c) { return end.token(at, c) < a.m; };
  if (s.alive) {
#pragma unroll
    for (int c = 0; c < T::kChunks; c++) {
      if (!comes(c)) continue;
      const uint4 v = end.chunk(at, d, c);
#pragma unroll 1
      for (int step = 1; step < s.call.world_size; step++) store_slot(slot(s.peer(step), s.call.rank, c), v);
    }
  }
  constexpr int kBatch = PrefillEpilogue<T>::kBatch;
  const auto load = [&](int r, int c, uint4(&v)[kBatch]) {
    const auto ready = [&] {
      // The last chunk that was sent tells when a look is worth while: a wait takes no bandwidth from what comes.
      bool all = true;
      const int last = c + kBatch - 1;
      if (comes(last)) all = load_sys(reinterpret_cast<const uint32_t*>(slot(s.call.rank, r, last))) != kSentinel;
      if (!__all_sync(kAllLanes, all)) return false;
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        v[b] = comes(c + b) ? load_slot(slot(s.call.rank, r, c + b)) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int b = 0; b < kBatch; b++) all &= is_data(v[b]);
      return __all_sync(kAllLanes, all) != 0;
    };
    const uint32_t missing = 1u << r;
    if (fine) fine = wait_together(s, ready, missing);
    if (!fine) return;
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      if (comes(c + b)) store_slot(slot(s.call.rank, r, c + b), all_bits_set());
    }
  };
  auto* y = static_cast<uint16_t*>(a.y);
  const auto store = [&](int c, uint4 v) {
    const int row = end.token(at, c), column = at.column + 32 * (c >> 1) + 8 * (lane & 3);
    if (!fine) v = all_bits_set();
    if (row < a.m && column < a.n) *reinterpret_cast<uint4*>(y + static_cast<size_t>(row) * a.n + column) = v;
  };
  end.sum(at, d, load, store);
  return fine;
}

// ---- two-shot: what math warps and the mover tell each other ----

struct Handover {
  uint32_t pushed[8];         // by math warp w
  uint32_t freed;             // by the mover
  uint32_t step;              // by the producer
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
  const size_t tile = (static_cast<size_t>(from) * a.share + (at.index - at.owner * a.share)) * 2 + cta;
  return s.call.window[at.owner] + a.partials + tile * T::kBytes;
}
__device__ __forceinline__ uint32_t* flag_of(const PrefillCuda& a, const Session& s, const PrefillPlace& at, int cta,
                                             int source) {
  const size_t flag = (static_cast<size_t>(source) * a.share + (at.index - at.owner * a.share)) * 2 + cta;
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
  if (at.owner != s.call.rank) {
    wait_raised(&h->freed, visit);
#pragma unroll
    for (int c = 0; c < T::kChunks; c++) store_shared(staging + end.within(c), end.chunk(at, d, c));
  } else {
    barrier_wait(&h->arrived, own & 1);
    // To this rank's y, and to staging for the others'.
    const auto store = [&](int c, uint4 v) {
      const int row = 16 * warp + 8 * (c & 1) + (lane >> 2), column = 32 * (c >> 1) + 8 * (lane & 3);
      store_shared(staging + (row * T::kTileN + column) * 2, v);
      const int token = at.token + row, n = at.column + column;
      auto* y = static_cast<uint16_t*>(a.y) + static_cast<size_t>(token) * a.n + n;
      if (token < a.m && n < a.n) *reinterpret_cast<uint4*>(y) = v;
    };
    if (s.call.world_size == 2) {  // the partial lies where the sums will: read it whole first
      uint4 sums[T::kChunks];
      const auto load = [&](int, int c, uint4(&v)[kBatch]) {
#pragma unroll
        for (int b = 0; b < kBatch; b++) v[b] = load_shared(staging + end.within(c + b));
      };
      end.sum(at, d, load, [&](int c, uint4 v) { sums[c] = v; });
      __syncwarp();
#pragma unroll
      for (int c = 0; c < T::kChunks; c++) store(c, sums[c]);
    } else {
      const auto load = [&](int r, int c, uint4(&v)[kBatch]) {
        const std::byte* partial = partial_of<T>(a, s, at, cta, r);
#pragma unroll
        for (int b = 0; b < kBatch; b++) v[b] = load_sys(static_cast<const void*>(partial + end.within(c + b)));
      };
      end.sum(at, d, load, store);
    }
  }
  fence_for_copies();
  __syncwarp();
  if (lane == 0) raise(&h->pushed[warp], visit + 1);
}

// The mover, all lanes: carries staging to where it belongs, raises and awaits flags. It alone waits for peers.
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
      const bool own = at.owner == s.call.rank;
      if (own) {
        if (fine) fine = await_partials(at);
        if (lane == 0) announce_partials(at, fine);
        __syncwarp();
      }
      if (lane < T::kMathWarps) {
        while (raised(&h->pushed[lane]) < static_cast<uint32_t>(visit + 1)) __nanosleep(32);
      }
      __syncwarp();
      if (fine) {
#pragma unroll 1
        for (int piece = 0; piece < kPieces; piece++) {
          if (visit + 1 < visits) keep_pace(visit + 1, piece);
          if (own) {
            send_rows(at, piece);
          } else if (lane == 0) {
            constexpr int kPieceBytes = T::kBytes / kPieces;
            std::byte* to = partial_of<T>(a, s, at, schedule.cta, s.call.rank);
            copy_out(to + piece * kPieceBytes, staging + piece * kPieceBytes, kPieceBytes);
          }
          copies_commit();
        }
      }
      copies_read();
      __syncwarp();
      if (lane == 0) raise(&h->freed, visit + 1);
      if (fine && !own && lane == 0) {
        copies_arrived();
        __threadfence_system();
        store_sys(flag_of(a, s, at, schedule.cta, s.call.rank), 1u);
      }
      __syncwarp();
    }
    copies_arrived();
    __syncwarp();
    return fine && close();
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
    copy_in(staging, partial_of<T>(a, s, at, schedule.cta, 1 - s.call.rank), T::kBytes, &h->arrived);
  }

  // The closing barrier, CTA c with CTA c of the peers: nobody's sums come any more, nobody reads partials.
  __device__ __forceinline__ bool close() const {
    const bool waits = lane + 1 < s.call.world_size;
    const int peer = s.peer(waits ? lane + 1 : 0);
    if (waits) store_release(&s.pad(peer)->done[s.parity()][s.call.rank][blockIdx.x], s.epoch);
    const uint32_t* flag = &s.own()->done[s.parity()][peer][blockIdx.x];
    uint32_t missing = 0;
    const auto ready = [&] {
      missing = __reduce_or_sync(kAllLanes, waits && load_acquire(flag) != s.epoch ? 1u << peer : 0);
      return missing == 0;
    };
    return wait_together(s, ready, missing);
  }

  __device__ __forceinline__ bool await_partials(const PrefillPlace& at) const {
    const bool waits = lane < s.call.world_size && lane != s.call.rank;
    uint32_t* flag = flag_of(a, s, at, schedule.cta, waits ? lane : s.call.rank);
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

  // A piece of the rows of y, to every other rank. A lane a row.
  __device__ __forceinline__ void send_rows(const PrefillPlace& at, int piece) const {
    constexpr int kRows = T::kTileM / kPieces;
    const int bytes = 2 * min(T::kTileN, a.n - at.column);
    for (int i = lane; i < kRows * (s.call.world_size - 1); i += kWarp) {
      const int peer = s.peer(1 + i / kRows), row = piece * kRows + i % kRows;
      if (at.token + row >= a.m) continue;
      const size_t place = static_cast<size_t>(at.token + row) * a.n + at.column;
      copy_out(s.call.window[peer] + h->y[peer] + place * 2, staging + row * T::kTileN * 2, bytes);
    }
  }
};

// What cannot be had is NaN. All threads; every CTA's tiles are all of y on every rank.
template <class T>
__device__ __forceinline__ void fill_tiles(const PrefillCuda& a, const PrefillSchedule<T>& schedule) {
  constexpr int kRowChunks = T::kTileN / 8;
#pragma unroll 1
  for (int visit = 0; visit < schedule.visits(); visit++) {
    const PrefillPlace at = schedule.place(visit);
#pragma unroll 1
    for (int i = threadIdx.x; i < T::kTileM * kRowChunks; i += T::kThreads) {
      const int row = at.token + i / kRowChunks, column = at.column + 8 * (i % kRowChunks);
      if (row >= a.m || column >= a.n) continue;
      auto* y = static_cast<uint16_t*>(a.y) + static_cast<size_t>(row) * a.n + column;
      *reinterpret_cast<uint4*>(y) = all_bits_set();
    }
  }
}

// ---- the kernel ----

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    prefill(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap token_map,
            const __grid_constant__ PrefillCuda a) {
  extern __shared__ std::byte memory[];
  __shared__ alignas(8) uint64_t full[kMaxPrefillStages], empty[kMaxPrefillStages];
  __shared__ Handover handover;
  const uint32_t base = (shared_address(memory) + 1023) & ~1023u;
  const Ring ring{base, full, empty, a.stages};
  const uint32_t staging = base + a.stages * T::kStageBytes;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x & (kWarp - 1);
  const PrefillSchedule<T> schedule{a, static_cast<int>(cluster_rank())};
  const PrefillProducer<T> producer{a, &weight_map, &token_map, ring, schedule, &handover.step};
  const bool produces = warp == T::kProducer && lane == 0;

  if (produces) {
    prefetch_map(&weight_map);
    prefetch_map(&token_map);
    for (int stage = 0; stage < a.stages; stage++) {
      barrier_init(&full[stage], 1);
      barrier_init(&empty[stage], 2 * T::kMathWarps);
    }
    barrier_init(&handover.arrived, 1);
    barrier_init_visible();
  }
  if (threadIdx.x < T::kMathWarps) handover.pushed[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    handover.freed = 0;
    handover.step = min(a.stages, a.k_steps);
  }
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  cluster_sync();  // the other CTA's barriers count what is fetched for it
  if (produces) {
    if (a.static_weight) producer.fill_weights();
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (!a.static_weight) producer.fill_weights();
    producer.fill_tokens();
  }
  const Session s = begin(a.call);

  bool fine = s.alive;
  if (warp >= T::kMathWarps) {
    if constexpr (T::kMovesRegisters) give_registers<T::kOtherRegisters>();
    if (produces) producer.stream();
    if (warp == T::kMover) {
      // In two-shot every CTA needs the places of its peers' y.
      if (s.alive && blockIdx.x == 0) send_headers(s);
      if (s.alive && (blockIdx.x == 0 || !T::kOneShot)) fine = await_headers(s);
      if constexpr (!T::kOneShot) fine = PrefillMover<T>{a, s, schedule, staging, &handover, lane}.move(fine);
    }
    __syncwarp();
    if constexpr (T::kMovesRegisters) {
      meet_warpgroup();
      take_registers<T::kRegisters>();
    }
  } else {
    if constexpr (T::kMovesRegisters) take_registers<T::kMathRegisters>();
    Position at;
    int own = 0;
    const int visits = schedule.visits();
#pragma unroll 1
    for (int visit = 0; visit < visits; visit++) {
      const PrefillPlace place = schedule.place(visit);
      float d[T::kTileN / 2];
      multiply_tile<T>(a, ring, warp / 4, lane, &at, d);
      if constexpr (T::kOneShot) {
        fine = reduce_one_shot<T>(a, s, place, schedule.cta, warp, lane, fine, d);
      } else {
        hand_over<T>(a, s, place, schedule.cta, visit, own, warp, lane, staging, &handover, d);
        own += place.owner == s.call.rank ? 1 : 0;
      }
    }
    if constexpr (T::kMovesRegisters) {
      meet_warpgroup();
      give_registers<T::kRegisters>();
    }
  }
  cluster_sync();  // no CTA leaves while the other one still arrives at its barriers
  if constexpr (!T::kOneShot) {
    if (__syncthreads_and(fine) == 0) fill_tiles(a, schedule);
  }
  end(s);
}

}  // namespace sglang_symm::device
