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
// With static_weight the first weights are fetched before the previous kernel has ended: 2 to 3 us less an op. The
// kernel behind is let in at once; its first weights then stream while this one's last tiles are summed.
#pragma once

#include "fused/reducer_sm90.cuh"

namespace sglang_symm::device {

constexpr int kMaxStages = 8;

// The tiles of a CTA: blockIdx.x, blockIdx.x + gridDim.x, ...
__device__ __forceinline__ int tile_of(int i) {
  return static_cast<int>(blockIdx.x + i * gridDim.x);
}
__device__ __forceinline__ int tiles_of_cta(int tiles) {
  return (tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
}

// One thread.
template <class T>
struct Producer {
  const DecodeCuda& a;
  const CUtensorMap* weight_map;
  const CUtensorMap* token_map;
  const Ring& ring;
  int total;  // stages that this CTA consumes
  int ahead;  // of them, before anything is consumed

  __device__ __forceinline__ void weight(int step, int stage) const {
    const int i = step / a.k_steps, k = step - i * a.k_steps;
    barrier_expect(&ring.full[stage], T::kStageBytes);
#pragma unroll
    for (int box = 0; box < T::kBoxes; box++) {
      load_box(ring.memory + stage * T::kStageBytes + box * T::kTileN * T::kRowBytes, weight_map,
               (k * T::kBoxes + box) * kBoxColumns, tile_of(i) * T::kTileN, &ring.full[stage], kEvictFirst);
    }
  }
  __device__ __forceinline__ void tokens(int step, int stage) const {
    const int k = step % a.k_steps;
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
__device__ __forceinline__ void multiply(const DecodeCuda& a, const Ring& ring, int lane, Position* at,
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
  for (int k = 0; k < a.k_steps; k++) {
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
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
  __shared__ volatile uint32_t done[T::kMathWarps];
  const Ring ring{(shared_address(memory) + 1023) & ~1023u, full, empty, a.stages};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x & (kWarp - 1);
  const int tiles = tiles_of_cta(a.tiles), total = a.partial == nullptr ? tiles * a.k_steps : 0;
  const Producer<T> producer{a, &weight_map, &token_map, ring, total, min(total, a.stages)};
  const bool produces = warp == T::kProducer && lane == 0;

  if (produces) {
    prefetch_map(&weight_map);
    prefetch_map(&token_map);
    for (int s = 0; s < a.stages; s++) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], T::kMathWarps);
    }
    barrier_init_visible();
    if (a.static_weight) producer.fill_weights();
  }
  if (threadIdx.x < T::kMathWarps) done[threadIdx.x] = 0;
  let_next_kernel_in();
  __syncthreads();
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
    for (int i = 0; i < tiles; i++) {
      float d[T::kHalves][T::kTileM / 2];
      if (a.partial == nullptr) {
        multiply<T>(a, ring, lane, &at, d);
      } else {
        load_product<T>(a, tile_of(i), warp, lane, d);
      }
      if (s.alive) push_tile<T>(a, s, tile_of(i), warp, lane, d);
      __syncwarp();
      if (lane == 0) done[warp] = i + 1;
    }
  } else {
    const int reducer = warp - T::kMathWarps;
    Reducer<T> reducers{a, s, reducer / 4, reducer % 4, lane, s.alive};
    for (int i = 0; i < tiles; i++) {
      while (done[reducer % 4] <= static_cast<uint32_t>(i)) __nanosleep(64);
      __syncwarp();
      reducers.reduce(tile_of(i));
      if (reducers.two_shot() && i > 0) reducers.collect(tile_of(i - 1));
    }
    if (reducers.two_shot() && tiles > 0) reducers.collect(tile_of(tiles - 1));
  }
  end(s);
}

}  // namespace sglang_symm::device
