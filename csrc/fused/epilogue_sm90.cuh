// The two ends of a partial: pushed from the accumulators to every rank's slot, and stored as rows of y.
#pragma once

#include "fused/tile_sm90.cuh"

namespace sglang_symm::device {

// A math warp: rounds its accumulators and pushes them: to the next rank first, to its own slot last, or to the owner
// alone. Rounding never makes the sentinel, since the instructions' NaN is 0x7FFF.
template <class T>
__device__ __forceinline__ void push_tile(const DecodeCuda& a, const Session& s, int tile, int warp, int lane,
                                          const float (&d)[T::kHalves][T::kTileM / 2]) {
  const int place = place_of(a.m, warp, lane);
#pragma unroll
  for (int c = 0; c < T::kChunks; c++) {
    if (!has_tokens<T>(a.m, lane, c)) continue;
    uint32_t word[4];
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const int half = T::kHalves == 2 ? q >> 1 : 0;
      const int column = T::kHalves == 2 ? c : 2 * c + (q >> 1);  // of 8 tokens each
      word[q] = T::Type::round(&d[half][4 * column + 2 * (q & 1)]);
    }
    const uint4 chunk = make_uint4(word[0], word[1], word[2], word[3]);
    if (T::kHasTwoShot && a.two_shot) {
      const int owner = owner_of<T>(tile, c, warp);
      store_slot(slot_of<T>(a, s, owner, s.call.rank, tile) + c * T::kChunkBytes + place * 16, chunk);
      continue;
    }
#pragma unroll
    for (int step = 1; step <= T::kWorld; step++) {
      const int peer = s.peer(step == T::kWorld ? 0 : step);
      store_slot(slot_of<T>(a, s, peer, s.call.rank, tile) + c * T::kChunkBytes + place * 16, chunk);
    }
  }
}

// A reducer warp, all lanes: a chunk of a tile as tokens' rows, four lanes a sector of 32 bytes.
template <class T>
__device__ __forceinline__ void store_rows(const DecodeCuda& a, int tile, int warp, int lane, int c, uint4 chunk) {
  const uint32_t word[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  const int quarter = lane & 3, source = (lane & ~3) + ((2 * quarter) & 3);
#pragma unroll
  for (int p = 0; p < 2; p++) {
    const uint32_t low = transpose_8x8(word[2 * p]), high = transpose_8x8(word[2 * p + 1]);
    const uint32_t low0 = __shfl_sync(kAllLanes, low, source), low1 = __shfl_sync(kAllLanes, low, source + 1);
    const uint32_t high0 = __shfl_sync(kAllLanes, high, source), high1 = __shfl_sync(kAllLanes, high, source + 1);
    const int token = 8 * (T::kHalves == 2 ? c : 2 * c + p) + (lane >> 2);
    const int n = tile * T::kTileN + (T::kHalves == 2 ? 64 * p : 0) + 16 * warp + 4 * quarter;
    if (token >= a.m || n >= a.n) continue;
    auto* y = static_cast<uint16_t*>(a.y) + static_cast<size_t>(token) * a.n + n;
    *reinterpret_cast<uint2*>(y) = quarter < 2 ? make_uint2(low0, low1) : make_uint2(high0, high1);
  }
}

}  // namespace sglang_symm::device
