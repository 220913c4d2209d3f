// The geometry of a decode kernel: what a warp's accumulators are, and where they lie in a slot.
//
//   a tile     TileN rows of the weight x TileM tokens, by four math warps; of 64 rows warp w has 16 from 16 w on
//   a word     two tokens of one row, as the MMA leaves them: lane l has row l / 4, tokens 2 (l % 4) and the next
//   a chunk    four words of a lane, 16 bytes, 2 KiB a warpgroup. TileN = 128: both halves' rows l / 4 and l / 4 + 8,
//              of 8 tokens. TileN = 64: the two rows, of 16 tokens
//   a slot     [parity][source][tile][chunk][warp][lane]: fragments travel as they are, and are turned once, at the end
//   results    [parity][tile][chunk][warp][lane], behind the slots: two-shot alone, from the chunk's owner
//
// Few tokens leave lanes without any; the others then lie densely. (A 16-byte store into an empty 32-byte sector of a
// slot that L2 no longer holds is a read and a write of memory: 166 for 155 us once, at 8 ranks.)
#pragma once

#include "fused/decode_cuda.h"
#include "fused/ring_sm90.cuh"

namespace sglang_symm::device {

template <class T, int World, int TileN_, int TileM_, int Boxes_, int Reducers_>
struct Tile {
  using Type = T;
  static constexpr int kWorld = World;
  static constexpr int kTileN = TileN_;
  static constexpr int kTileM = TileM_;
  static constexpr int kBoxes = Boxes_;
  static constexpr int kReducers = Reducers_;

  static constexpr int kHalves = kTileN / 64;
  static constexpr int kBytes = kTileN * kTileM * 2;
  static constexpr int kChunkBytes = 2048;
  static constexpr int kChunks = kBytes / kChunkBytes;
  static constexpr int kChunkTokens = kTileN == 128 ? 8 : 16;
  static constexpr int kGroups = kReducers / 4;
  static constexpr int kGroupChunks = kChunks / kGroups;
  static_assert(kChunks * kChunkBytes == kBytes && kGroupChunks * kGroups == kChunks);

  // Between two ranks both algorithms send the same, and one-shot is a step less.
  static constexpr bool kHasTwoShot = kWorld > 2;

  static constexpr int kRowBytes = kBoxColumns * 2;
  static constexpr int kStageColumns = kBoxes * kBoxColumns;
  static constexpr int kWeightBytes = kTileN * kBoxes * kRowBytes;  // of a stage
  static constexpr int kStageBytes = kWeightBytes + kTileM * kBoxes * kRowBytes;

  static constexpr int kMathWarps = 4;
  static constexpr int kProducer = kMathWarps + kReducers;  // the last warp
  static constexpr int kThreads = (kProducer + 1) * kWarp;
  // The MMAs of a stage run while those of the next are issued, for a stage less under way. Where MMAs take no longer
  // than the weights do to come it is no gain: up to 16 tokens of 64 rows 0 to 4 % slower.
  static constexpr bool kOverlapped = kTileN == 128 || kTileM == 64;
  static constexpr int kLeastStages = kOverlapped ? 2 : 1;
  // Few enough for two CTAs on an SM where shared memory has room for them: the next kernel's weights then stream while
  // this one's last tiles are summed (P = 4, 16 tokens, K = 2048 on a shared GPU: 37.5 us for 38.5).
  static constexpr int kRegisters = kTileN == 128 && kTileM == 16 ? 112 : 128;
};

// Whether a lane has tokens in a chunk.
template <class T>
__device__ __forceinline__ bool has_tokens(int m, int lane, int chunk) {
  return T::kChunkTokens * chunk + 2 * (lane & 3) < m;
}

// Where a lane's 16 bytes lie in a chunk, in units of them.
__device__ __forceinline__ int place_of(int m, int warp, int lane) {
  const int busy = m >= 7 ? 4 : (m + 1) / 2;  // lanes of every four
  return (8 * warp + (lane >> 2)) * busy + (lane & 3);
}

template <class T>
__device__ __forceinline__ std::byte* slot_of(const DecodeCuda& a, const Session& s, int rank, int source, int tile) {
  return s.call.window[rank] + a.slots + s.parity() * a.slot_bytes +
         (static_cast<size_t>(source) * a.tiles + tile) * T::kBytes;
}

// The sums of a tile, as their owners push them.
template <class T>
__device__ __forceinline__ std::byte* results_of(const DecodeCuda& a, const Session& s, int rank, int tile) {
  return slot_of<T>(a, s, rank, T::kWorld, tile);
}

// Whose a warp's part of a chunk is in two-shot: few tokens or many, every rank has as much as any other. Tiles of 64
// rows have few chunks, at times an odd number: then tiles take turns.
template <class T>
__device__ __forceinline__ int owner_of(int tile, int chunk, int warp) {
  return (chunk + 2 * warp + (T::kTileN == 64 ? tile : 0)) & (T::kWorld - 1);
}

}  // namespace sglang_symm::device
