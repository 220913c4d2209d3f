// The kernel of few tokens. The weights stream once from memory and nothing else may take time:
//
//   producer   W0 W1 W2 .. | x0 x1 .. | W5 x5  W6 x6  ...                          TMA into a ring of stages
//   math        (waits)    | tile 0: MMA MMA MMA .. push | tile 1: MMA MMA .. push |
//   reducers                                (waits)      | tile 0: poll, sum, y    | tile 1: poll, sum, y |
//                          ^ the previous kernel has ended                             headers held, epochs advanced ^
//
//   stage s    full[s]: its bytes have landed (1 arrival + bytes)     empty[s]: four math warps have read it
//   tile i     done[w] > i: math warp w has pushed it (of those that the CTA leads), so polling for it is worth while.
//              Not a promise that it is there: data is waited for by its words alone, hence a math warp may run tiles
//              ahead of its reducer
//
// With static_weight the first weights are fetched before the previous kernel has ended: 1.5 to 2 us less an op. The
// kernel behind is let in at once; its first weights then stream while this one's last tiles are summed.
#pragma once

#include "fused/reducer_sm90.cuh"

namespace sglang_symm::device {

constexpr int kMaxStages = 8;

// What a CTA does: of every tile blockIdx.x + i * gridDim.x all of k; or, of a pair (a.parts == 2), half of k of the
// pair's tiles, whose sums both CTAs take turns to make.
struct Work {
  int tile, stride, tiles;
  int parts, part;   // of k
  int first, steps;  // of k: stages of columns

  __device__ __forceinline__ explicit Work(const DecodeCuda& a) {
    const int cta = static_cast<int>(blockIdx.x), ctas = static_cast<int>(gridDim.x);
    const bool pair = a.parts > 1;
    const int half = (a.k_steps + 1) / 2;
    parts = pair ? 2 : 1;
    part = pair ? static_cast<int>(cluster_rank()) : 0;
    tile = pair ? cta / 2 : cta;
    stride = pair ? ctas / 2 : ctas;
    tiles = (a.tiles - tile + stride - 1) / stride;
    first = part * half;
    steps = !pair ? a.k_steps : part == 0 ? half : a.k_steps - half;
  }
  __device__ __forceinline__ int tile_of(int i) const { return tile + i * stride; }
  // Who sums the pair's parts of tile i, pushes the partial, and sums all ranks'.
  __device__ __forceinline__ int leader_of(int i) const { return i & (parts - 1); }
  __device__ __forceinline__ bool leads(int i) const { return leader_of(i) == part; }
};

// The stage that the producer asks for next. Kept, not computed from its number: one thread asks for all that an SM
// gets, and two divisions a stage were a quarter of its time.
template <class T>
struct Cursor {
  const Work& work;
  int i = 0;  // the CTA's tile
  int row = work.tile_of(0) * T::kTileN;
  int column = work.first * T::kStageColumns;
  int left = work.steps;  // of the tile, this one too

  __device__ __forceinline__ void next() {
    column += T::kStageColumns;
    if (--left > 0) return;
    row = work.tile_of(++i) * T::kTileN;
    column = work.first * T::kStageColumns;
    left = work.steps;
  }
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

  __device__ __forceinline__ void weight(const Cursor<T>& at, uint32_t to, uint64_t* full) const {
    barrier_expect(full, T::kWeightBytes + a.m * T::kBoxes * T::kRowBytes);
#pragma unroll
    for (int box = 0; box < T::kBoxes; box++) {
      load_box(to + box * T::kTileN * T::kRowBytes, weight_map, at.column + box * kBoxColumns, at.row, full,
               kEvictFirst);
    }
  }
  // m rows of the tile's. What lies behind them in shared memory makes columns of the product that are nobody's. Rows
  // outside of the tensor, which TMA fills with zeros, cost more than rows of it: 24 tokens took 27 us that take 21.
  __device__ __forceinline__ void tokens(const Cursor<T>& at, uint32_t to, uint64_t* full) const {
#pragma unroll
    for (int box = 0; box < T::kBoxes; box++) {
      load_box(to + T::kWeightBytes + box * T::kTileM * T::kRowBytes, token_map, at.column + box * kBoxColumns, 0, full,
               kEvictLast);
    }
  }
  __device__ __forceinline__ void fill_weights() const {
    Cursor<T> at{work};
    for (int s = 0; s < ahead; s++, at.next()) weight(at, ring.memory + s * T::kStageBytes, &ring.full[s]);
  }
  __device__ __forceinline__ void fill_tokens() const {
    Cursor<T> at{work};
    for (int s = 0; s < ahead; s++, at.next()) tokens(at, ring.memory + s * T::kStageBytes, &ring.full[s]);
  }
  __device__ __forceinline__ void stream() const {
    Cursor<T> at{work};
    for (int s = 0; s < ahead; s++) at.next();
    Position p;
#pragma unroll 1
    for (int step = ahead; step < total; step++) {
      const uint32_t to = ring.memory + p.stage * T::kStageBytes;
      barrier_wait(&ring.empty[p.stage], p.parity);
      weight(at, to, &ring.full[p.stage]);
      tokens(at, to, &ring.full[p.stage]);
      at.next();
      p.next(ring.stages);
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

// Of a pair the CTA that leads tile i adds the other's half of k to its own, warp by warp. `came` counts what arrives
// there, in `received`: of one tile in two. `received` is free for the next: the other's warp sends that after it has
// had this warp's half of the tile between, which this warp sends after it has read here.
template <class T>
__device__ __forceinline__ void add_up(const Work& work, int i, uint32_t received, uint64_t* came, int warp, int lane,
                                       float (&d)[T::kHalves][T::kTileM / 2]) {
  constexpr int kUnitFloats = 4, kUnitsOfHalf = T::kTileM / 2 / kUnitFloats, kUnits = T::kHalves * kUnitsOfHalf;
  const uint32_t at = received + (warp * kUnits * kWarp + lane) * 16;
  const bool leads = work.leads(i);
  if (leads) {
    if (lane == 0) barrier_expect(came, kUnits * kWarp * 16);
    barrier_wait_cluster(came, (i >> 1) & 1);
  }
#pragma unroll
  for (int unit = 0; unit < kUnits; unit++) {
    float* mine = &d[unit / kUnitsOfHalf][unit % kUnitsOfHalf * kUnitFloats];
    const uint32_t there = at + unit * kWarp * 16;
    if (!leads) {
      store_shared_at(there, mine, came, work.leader_of(i));
      continue;
    }
    const uint4 v = load_shared(there);
    mine[0] = __fadd_rn(mine[0], __uint_as_float(v.x));
    mine[1] = __fadd_rn(mine[1], __uint_as_float(v.y));
    mine[2] = __fadd_rn(mine[2], __uint_as_float(v.z));
    mine[3] = __fadd_rn(mine[3], __uint_as_float(v.w));
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
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages], came[T::kMathWarps];
  __shared__ volatile uint32_t done[T::kMathWarps];
  const Ring ring{(shared_address(memory) + 1023) & ~1023u, full, empty, a.stages};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x & (kWarp - 1);
  const Work work(a);
  const int tiles = work.tiles, total = a.partial == nullptr ? tiles * work.steps : 0;
  const Producer<T> producer{a, &weight_map, &token_map, ring, work, total, min(total, a.stages)};

  if (warp == T::kProducer) {
    if (elect_one()) {
      prefetch_map(&weight_map);
      prefetch_map(&token_map);
      for (int s = 0; s < a.stages; s++) {
        barrier_init(&full[s], 1);
        barrier_init(&empty[s], T::kMathWarps);
      }
      for (uint64_t& barrier : came) barrier_init(&barrier, 1);
      barrier_init_visible();
    }
    __syncwarp();
  }
  if (a.parts > 1) cluster_arrive();
  if (warp == T::kProducer && a.static_weight && elect_one()) producer.fill_weights();
  if (threadIdx.x < T::kMathWarps) done[threadIdx.x] = 0;
  let_next_kernel_in();
  __syncthreads();
  if (warp == T::kProducer && elect_one()) {  // before the epoch is read: a look at memory is 0.7 us
    wait_for_previous_kernel();
    if (!a.static_weight) producer.fill_weights();
    producer.fill_tokens();
  }
  const Session s = begin_together(a.call);
  if (a.parts > 1) cluster_wait();  // each CTA's barriers count what the other one stores

  if (warp == T::kProducer) {
    const bool signals = blockIdx.x == 0 && s.alive;
    __syncwarp();
    if (signals) send_headers(s);
    if (elect_one()) producer.stream();
    __syncwarp();
    if (signals) await_headers(s);
  } else if (warp < T::kMathWarps) {
    Position at;
    for (int i = 0; i < tiles; i++) {
      float d[T::kHalves][T::kTileM / 2];
      if (a.partial == nullptr) {
        multiply<T>(work.steps, ring, lane, &at, d);
      } else {
        load_product<T>(a, work.tile_of(i), warp, lane, d);
      }
      if (a.parts > 1) add_up<T>(work, i, ring.memory + a.stages * T::kStageBytes, &came[warp], warp, lane, d);
      if (!work.leads(i)) continue;
      if (s.alive) push_tile<T>(a, s, work.tile_of(i), warp, lane, d);
      __syncwarp();
      if (lane == 0) done[warp] = i + 1;
    }
  } else {
    const int reducer = warp - T::kMathWarps;
    Reducer<T> reducers{a, s, reducer / 4, reducer % 4, lane, s.alive};
    int before = -1;  // the tile whose results are still to be collected
    for (int i = work.part; i < tiles; i += work.parts) {
      while (done[reducer % 4] <= static_cast<uint32_t>(i)) __nanosleep(64);
      __syncwarp();
      reducers.reduce(work.tile_of(i));
      if (reducers.two_shot() && before >= 0) reducers.collect(before);
      before = work.tile_of(i);
    }
    if (reducers.two_shot() && before >= 0) reducers.collect(before);
  }
  end(s);
}

}  // namespace sglang_symm::device
