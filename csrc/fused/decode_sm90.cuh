// The kernel of few tokens. The weights stream once from memory and nothing else may take time:
//
//   producer   W0 W1 W2 .. | x0 x1 .. | W5 x5  W6 x6  ...                          TMA into a ring of stages
//   math        (waits)    | tile 0: MMA MMA MMA .. push | tile 1: MMA MMA .. push |
//   reducers                                (waits)      | tile 0: poll, sum, y    | tile 1: poll, sum, y |
//                          ^ the previous kernel has ended                             headers held, epochs advanced ^
//
//   stage s    full[s]: its bytes have landed (1 arrival + bytes)     empty[s]: four math warps have read it
//   tile i     done[w] > i: math warp w has pushed it, so polling for it is worth while. Not a promise that it is
//   there:
//              data is waited for by its words alone, hence a math warp may run tiles ahead of its reducer
//
// With static_weight the first weights are fetched before the previous kernel has ended: 1.5 to 2 us less an op. The
// kernel behind is let in at once; its first weights then stream while this one's last tiles are summed.
#pragma once

#include "fused/reducer_sm90.cuh"

namespace sglang_symm::device {

constexpr int kMaxStages = 8;

// What a CTA does: tiles blockIdx.x, blockIdx.x + gridDim.x, ... with all of k; or of a pair (a.parts == 2) one tile
// with half of it.
struct Work {
  int tile, tiles;
  int part;          // of k
  int first, steps;  // of k: stages of columns

  __device__ __forceinline__ explicit Work(const DecodeCuda& a) {
    const int cta = static_cast<int>(blockIdx.x), ctas = static_cast<int>(gridDim.x);
    const bool pair = a.parts > 1;
    const int half = (a.k_steps + 1) / 2;
    part = pair ? static_cast<int>(cluster_rank()) : 0;
    tile = pair ? cta / 2 : cta;
    tiles = pair ? 1 : (a.tiles - cta + ctas - 1) / ctas;
    first = part * half;
    steps = !pair ? a.k_steps : part == 0 ? half : a.k_steps - half;
  }
  __device__ __forceinline__ int tile_of(int i) const { return tile + i * static_cast<int>(gridDim.x); }
};

// One thread.
template <class T>
struct Producer {
  const DecodeCuda& a;
  const CUtensorMap* weight_map;
  const CUtensorMap* token_map;
  const Ring& ring;
  const Work& work;
  int total;  // stages that this CTA consumes
  int ahead;  // of them, before anything is consumed

  __device__ __forceinline__ void weight(int step, int stage) const {
    const int i = step / work.steps, k = work.first + step - i * work.steps;
    barrier_expect(&ring.full[stage], T::kWeightBytes + a.m * T::kBoxes * T::kRowBytes);
#pragma unroll
    for (int box = 0; box < T::kBoxes; box++) {
      load_box(ring.memory + stage * T::kStageBytes + box * T::kTileN * T::kRowBytes, weight_map,
               (k * T::kBoxes + box) * kBoxColumns, work.tile_of(i) * T::kTileN, &ring.full[stage], kEvictFirst);
    }
  }
  // m rows of the tile's. What lies behind them in shared memory makes columns of the product that are nobody's. Rows
  // outside of the tensor, which TMA fills with zeros, cost more than rows of it: 24 tokens took 27 us that take 21.
  __device__ __forceinline__ void tokens(int step, int stage) const {
    const int k = work.first + step % work.steps;
    const uint32_t to = ring.memory + stage * T::kStageBytes + T::kWeightBytes;
#pragma unroll
    for (int box = 0; box < T::kBoxes; box++) {
      load_box(to + box * T::kTileM * T::kRowBytes, token_map, (k * T::kBoxes + box) * kBoxColumns, 0,
               &ring.full[stage], kEvictLast);
    }
  }
  __device__ __forceinline__ void fill_weights() const {
    for (int step = 0; step < ahead; step++) weight(step, step);
  }
  __device__ __forceinline__ void fill_tokens() const {
    for (int step = 0; step < ahead; step++) tokens(step, step);
  }
  __device__ __forceinline__ void stream() const {
    Position at;
#pragma unroll 1
    for (int step = ahead; step < total; step++) {
      barrier_wait(&ring.empty[at.stage], at.parity);
      weight(step, at.stage);
      tokens(step, at.stage);
      at.next(ring.stages);
    }
  }
};

// One warp of the four, all lanes: its rows of one tile.
template <class T>
__device__ __forceinline__ void multiply(int steps, const Ring& ring, int lane, Position* at,
                                         float (&d)[T::kHalves][T::kTileM / 2]) {
  constexpr int kHalfBytes = 64 * T::kRowBytes, kMmaBytes = 32, kMmas = T::kRowBytes / kMmaBytes;
#pragma unroll
  for (int half = 0; half < T::kHalves; half++) {
#pragma unroll
    for (int i = 0; i < T::kTileM / 2; i++) d[half][i] = 0.0f;
  }
  int before = -1;  // the stage whose MMAs may still run
  const auto release = [&](int stage) {
    if (lane == 0) barrier_arrive(&ring.empty[stage]);
  };
#pragma unroll 1
  for (int k = 0; k < steps; k++) {
    barrier_wait(&ring.full[at->stage], at->parity);
    const uint32_t weight = ring.memory + at->stage * T::kStageBytes, tokens = weight + T::kWeightBytes;
    wgmma_fence();
#pragma unroll
    for (int box = 0; box < T::kBoxes; box++) {
#pragma unroll
      for (int mma = 0; mma < kMmas; mma++) {
        const uint64_t x = operand(tokens + box * T::kTileM * T::kRowBytes + mma * kMmaBytes);
#pragma unroll
        for (int half = 0; half < T::kHalves; half++) {
          const uint32_t rows = weight + box * T::kTileN * T::kRowBytes + half * kHalfBytes + mma * kMmaBytes;
          Wgmma<typename T::Type, T::kTileM>::add(d[half], operand(rows), x);
        }
      }
    }
    wgmma_commit();
    if constexpr (T::kOverlapped) {
      wgmma_wait_previous();
      if (before >= 0) release(before);
      before = at->stage;
    } else {
      wgmma_wait_all();
      release(at->stage);
    }
    at->next(ring.stages);
  }
  if constexpr (T::kOverlapped) {
    wgmma_wait_all();
    if (before >= 0) release(before);
  }
}

// The pair's second CTA gives its half of k to the first, warp by warp; true in the first. `came` counts what arrives
// there, in `received`.
template <class T>
__device__ __forceinline__ bool add_up(const Work& work, uint32_t received, uint64_t* came, int warp, int lane,
                                       float (&d)[T::kHalves][T::kTileM / 2]) {
  constexpr int kUnitFloats = 4, kUnitsOfHalf = T::kTileM / 2 / kUnitFloats, kUnits = T::kHalves * kUnitsOfHalf;
  const uint32_t at = received + (warp * kUnits * kWarp + lane) * 16;
  if (work.part == 0) barrier_wait_cluster(came, 0);
#pragma unroll
  for (int unit = 0; unit < kUnits; unit++) {
    float* mine = &d[unit / kUnitsOfHalf][unit % kUnitsOfHalf * kUnitFloats];
    const uint32_t there = at + unit * kWarp * 16;
    if (work.part != 0) {
      store_shared_at(there, mine, came, 0);
      continue;
    }
    const uint4 v = load_shared(there);
    mine[0] = __fadd_rn(mine[0], __uint_as_float(v.x));
    mine[1] = __fadd_rn(mine[1], __uint_as_float(v.y));
    mine[2] = __fadd_rn(mine[2], __uint_as_float(v.z));
    mine[3] = __fadd_rn(mine[3], __uint_as_float(v.w));
  }
  return work.part == 0;
}

// The same of a product that the library has made.
template <class T>
__device__ __forceinline__ void load_product(const DecodeCuda& a, int tile, int warp, int lane,
                                             float (&d)[T::kHalves][T::kTileM / 2]) {
  const auto* partial = static_cast<const typename T::Type::Storage*>(a.partial);
#pragma unroll
  for (int half = 0; half < T::kHalves; half++) {
#pragma unroll
    for (int i = 0; i < T::kTileM / 2; i++) {
      const int n = tile * T::kTileN + 64 * half + 16 * warp + 8 * (i >> 1 & 1) + (lane >> 2);
      const int token = 8 * (i >> 2) + 2 * (lane & 3) + (i & 1);
      const bool some = token < a.m && n < a.n;
      d[half][i] = some ? T::Type::load(partial[static_cast<size_t>(token) * a.n + n]) : 0.0f;
    }
  }
}

template <class T>
__global__ void __maxnreg__(T::kRegisters)
    decode(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap token_map,
           const __grid_constant__ DecodeCuda a) {
  std::byte* const memory = dynamic_shared_memory();
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages], came[T::kMathWarps];
  __shared__ volatile uint32_t done[T::kMathWarps];
  const Ring ring{(shared_address(memory) + 1023) & ~1023u, full, empty, a.stages};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x & (kWarp - 1);
  const Work work(a);
  const int tiles = work.tiles, total = a.partial == nullptr ? tiles * work.steps : 0;
  const Producer<T> producer{a, &weight_map, &token_map, ring, work, total, min(total, a.stages)};
  const bool produces = warp == T::kProducer && lane == 0;

  if (produces) {
    prefetch_map(&weight_map);
    prefetch_map(&token_map);
    for (int s = 0; s < a.stages; s++) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], T::kMathWarps);
    }
    for (uint64_t& barrier : came) barrier_init(&barrier, 1);
    barrier_init_visible();
    if (a.static_weight) producer.fill_weights();
  }
  if (threadIdx.x < T::kMathWarps) done[threadIdx.x] = 0;
  let_next_kernel_in();
  if (a.parts > 1) {
    cluster_sync();  // the first CTA's barriers count what the second one stores
  } else {
    __syncthreads();
  }
  if (produces) {  // before the epoch is read: a look at memory is 0.7 us
    wait_for_previous_kernel();
    if (!a.static_weight) producer.fill_weights();
    producer.fill_tokens();
  }
  const Session s = begin_together(a.call);

  if (warp == T::kProducer) {
    const bool signals = blockIdx.x == 0 && s.alive;
    __syncwarp();
    if (signals) send_headers(s);
    if (produces) producer.stream();
    __syncwarp();
    if (signals) await_headers(s);
  } else if (warp < T::kMathWarps) {
    Position at;
    if (a.parts > 1 && work.part == 0 && lane == 0) {
      barrier_expect(&came[warp], T::kTileN * T::kTileM * static_cast<int>(sizeof(float)) / T::kMathWarps);
    }
    for (int i = 0; i < tiles; i++) {
      float d[T::kHalves][T::kTileM / 2];
      if (a.partial == nullptr) {
        multiply<T>(work.steps, ring, lane, &at, d);
      } else {
        load_product<T>(a, work.tile_of(i), warp, lane, d);
      }
      if (a.parts > 1 && !add_up<T>(work, ring.memory + a.stages * T::kStageBytes, &came[warp], warp, lane, d)) break;
      if (s.alive) push_tile<T>(a, s, work.tile_of(i), warp, lane, d);
      __syncwarp();
      if (lane == 0) done[warp] = i + 1;
    }
  } else {
    const int reducer = warp - T::kMathWarps, summed = work.part == 0 ? tiles : 0;
    Reducer<T> reducers{a, s, reducer / 4, reducer % 4, lane, s.alive};
    for (int i = 0; i < summed; i++) {
      while (done[reducer % 4] <= static_cast<uint32_t>(i)) __nanosleep(64);
      __syncwarp();
      reducers.reduce(work.tile_of(i));
      if (reducers.two_shot() && i > 0) reducers.collect(work.tile_of(i - 1));
    }
    if (reducers.two_shot() && summed > 0) reducers.collect(work.tile_of(summed - 1));
  }
  end(s);
}

}  // namespace sglang_symm::device
