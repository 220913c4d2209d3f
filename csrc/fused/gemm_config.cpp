#include "fused/gemm_config.h"

#include <algorithm>

#include "base/error.h"

namespace sglang_symm {

namespace {

// 64 to 96 KB in flight an SM saturate HBM; two ranks have the SMs' shared memory to themselves, and the more of it is
// full before the previous kernel ends the better. Between more ranks tiles are taller, so that slots are fewer.
struct Row {
  int max_world, max_m;
  int tile_n, tile_m, boxes, stages, reducers;
  bool two_shot;
  int least_busy;  // fewer tiles than SMs over this: the library, which cuts k, is faster
};
// 2 ranks, N = K = 2048, M = 64: 10.5 us, and 9.5 with the library's GEMM and an all-reduce.
constexpr int kAny = 1 << 20;
constexpr Row kDecode[] = {
    {2, 16, 64, 16, 4, 5, 4, false, kAny},  //
    {2, 64, 64, 64, 2, 6, 4, false, 4},     //
    {4, 8, 128, 16, 1, 6, 4, false, kAny},  //
    {4, 16, 128, 16, 1, 6, 4, true, kAny},  //
    {4, 64, 128, 64, 1, 6, 8, true, kAny},  //
    {8, 8, 128, 16, 1, 6, 4, false, kAny},  //
    {8, 16, 128, 16, 1, 6, 4, true, kAny},  //
    {8, 64, 128, 64, 1, 6, 8, true, kAny},  //
};

}  // namespace

std::optional<GemmConfig> choose_decode(const GemmShape& s) {
  constexpr int64_t kLongest = int64_t{1} << 30;  // coordinates are 32-bit
  if (s.world_size != 2 && s.world_size != 4 && s.world_size != 8) return std::nullopt;
  if (s.m < 1 || s.m > kMaxDecodeTokens || s.n < 8 || s.k < 8 || s.n > kLongest || s.k > kLongest) return std::nullopt;
  if (s.n % 8 != 0 || s.k % 8 != 0 || s.sms < 1) return std::nullopt;
  for (const Row& row : kDecode) {
    if (s.world_size > row.max_world || s.m > row.max_m) continue;
    const int tiles = static_cast<int>((s.n + row.tile_n - 1) / row.tile_n);
    if (int64_t{tiles} * row.least_busy < s.sms) return std::nullopt;
    return GemmConfig{row.tile_n,    row.tile_m,  row.boxes, row.stages, row.reducers, tiles, std::min(tiles, s.sms),
                      row.max_world, row.two_shot};
  }
  return std::nullopt;
}

size_t slot_bytes(const GemmConfig& c, int world_size) {
  constexpr size_t kElement = 2;
  const int parts = world_size + (c.two_shot ? 1 : 0);
  return static_cast<size_t>(parts) * static_cast<size_t>(c.tiles) * static_cast<size_t>(c.tile_n * c.tile_m) *
         kElement;
}

size_t shared_bytes(const GemmConfig& c) {
  constexpr int kRow = 128, kAlignment = 1024;  // of the swizzle
  return static_cast<size_t>(c.stages * c.boxes * kRow * (c.tile_n + c.tile_m) + kAlignment);
}

std::string to_string(const GemmConfig& c) {
  return cat(c.tile_n, "x", c.tile_m, " tiles, ", c.tiles, " in ", c.ctas, " CTAs, ", c.stages, " stages of ",
             c.boxes * kBoxColumns, " columns, ", c.reducers, " reducers, ", c.two_shot ? "two-shot" : "one-shot");
}

}  // namespace sglang_symm
