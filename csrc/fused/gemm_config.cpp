#include "fused/gemm_config.h"

#include <algorithm>

#include "base/error.h"

namespace sglang_symm {

namespace {

// 64 to 96 KB in flight an SM saturate HBM; ranks with a GPU each have the SMs' shared memory to themselves, and the
// more of it is full before the previous kernel ends the better. Tiles of 64 rows, one to an SM, then stream from twice
// as many SMs as those of 128: at N = 8192, K = 7168, one token between four H200s 32.6 us for 44.5. Where tiles take
// turns on few SMs they are taller, so that slots are fewer.
struct Row {
  int max_world, max_m;
  int tile_n, tile_m, boxes, stages, reducers;
  bool two_shot;
  bool one_wave;  // only where every tile has an SM
};
constexpr Row kDecode[] = {
    {2, 16, 64, 16, 4, 5, 4, false, false},  //
    {2, 32, 64, 32, 4, 4, 4, false, false},  //
    {2, 64, 64, 64, 2, 6, 8, false, false},  //
    {4, 16, 64, 16, 4, 5, 4, false, true},   //
    {4, 64, 64, 64, 2, 6, 8, true, true},    //
    {4, 8, 128, 16, 1, 6, 4, false, false},  //
    {4, 16, 128, 16, 1, 6, 4, true, false},  //
    {4, 64, 128, 64, 1, 6, 8, true, false},  //
    {8, 8, 64, 16, 4, 5, 4, false, true},    //
    {8, 16, 64, 16, 4, 5, 4, true, true},    //
    {8, 64, 64, 64, 2, 6, 8, true, true},    //
    {8, 8, 128, 16, 1, 6, 4, false, false},  //
    {8, 16, 128, 16, 1, 6, 4, true, false},  //
    {8, 64, 128, 64, 1, 6, 8, true, false},  //
};

// What loses to the library's GEMM and an all-reduce at a usual k has no row. A visit is a tile of each cluster; full
// is how much of what all clusters could multiply in their visits is asked for. Between two H200s, N = 8192, us, this
// kernel and cuBLAS with an all-reduce, K = 4096 and 14336: wide tiles, 1 visit, 512 tokens 68, 73 and 189, 199; 2
// visits, 1024 tokens 116, 146 and 361, 401; 4 visits, 2048 tokens 210, 290 and 728, 787. Narrow ones, 1 visit, 256
// tokens 40, 42 and 114, 106; 3 visits, 768 tokens 94, 109 and 297, 314; 5 visits, 1280 tokens 147, 183 and 483, 507.
// Between three and four: up to two visits, and a third or fourth whose tiles are not full, or a later one's, have none
// (four H200s, N = 8192, us, K = 2048 and 7168: 512 tokens 70, 69 and 128, 121; 768 tokens 89, 98 and 178, 185; 2048
// tokens 185, 248 and 408, 499).
struct PrefillRow {
  int min_world, max_world;
  int tile_n, stages;
  int least_visits, most_visits;
  double least_full;
};
constexpr int kAny = 1 << 20;
constexpr PrefillRow kPrefill[] = {
    {2, 2, 256, 3, 1, 1, 0.92},      //
    {2, 2, 256, 3, 2, 2, 0.91},      //
    {2, 2, 128, 6, 3, 3, 0.92},      //
    {2, 2, 128, 6, 5, 15, 0.94},     //
    {2, 2, 256, 3, 3, kAny, 0.87},   //
    {3, 4, 128, 6, 3, 4, 0.93},      //
    {3, 4, 128, 6, 5, kAny, 0.853},  //
};

// Between two ranks half of the last visit's tiles takes 0.18 us a tile over the link between two H200s (64 KB at 361
// GB/s), a step of half of a tile 0.40 us. 0, 18 to 22, 26 to 31 and 34 steps for 58 tiles, K = 4096, 2048 tokens:
// 221.5, 219.3, 215.5 and 216.1 us. Of narrow tiles halves take too long: 0, 4, 8 steps, 768 tokens: 97.8, .., 100.6
// us.
constexpr int kLateSteps = 9, kOfTiles = 20, kLeastHalved = 256;

constexpr int64_t kLongest = int64_t{1} << 30;  // coordinates are 32-bit

int over(int64_t a, int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

int64_t tokens_of_rounds(int64_t m, int64_t rounds) {
  return int64_t{over(over(m, rounds), kPrefillTokens)} * kPrefillTokens;
}

}  // namespace

std::optional<GemmConfig> choose_decode(const GemmShape& s) {
  if (s.world_size != 2 && s.world_size != 4 && s.world_size != 8) return std::nullopt;
  if (s.m < 1 || s.m > kMaxDecodeTokens || s.n < 8 || s.n > kLongest || s.n % 8 != 0 || s.sms < 1) return std::nullopt;
  for (const Row& row : kDecode) {
    if (s.world_size > row.max_world || s.m > row.max_m) continue;
    const int tiles = static_cast<int>((s.n + row.tile_n - 1) / row.tile_n);
    if (row.one_wave && tiles > s.sms) continue;
    return GemmConfig{.tile_n = row.tile_n,
                      .tile_m = row.tile_m,
                      .boxes = row.boxes,
                      .stages = row.stages,
                      .reducers = row.reducers,
                      .tiles = tiles,
                      .ctas = std::min(tiles, s.sms),
                      .k_parts = 1,
                      .max_world = row.max_world,
                      .two_shot = row.two_shot};
  }
  return std::nullopt;
}

bool is_faster_apart_with_norm(const GemmConfig& c, const GemmShape& s) {
  // Half of the SMs without a tile. Two H200s, 64 tokens, apart and not: N = 2048 behind an ordinary kernel, K = 4096
  // 15.1 and 15.3 us; N = 4096, a step of a Llama-3-8B 5.94 and 5.96 ms, with 32 tokens 5.05 and 5.02. Not measured
  // between more GPUs.
  return s.world_size == 2 && c.tile_m > 32 && 2 * c.tiles <= s.sms;
}

GemmConfig with_columns(GemmConfig c, int64_t k, int sms) {
  // A pair's visit is half of a CTA's. Two H200s, us, CTAs and pairs, 1 and 64 tokens. Few tiles, whose SMs alone do
  // not keep memory busy: N = 2048, K = 2048 6.8 and 5.3, 8.5 and 7.2, K = 8192 15.8 and 11.4, 22.8 and 15.0. Three
  // visits of half for two: N = 10240, K = 4096 25.6 and 21.5, 29.4 and 26.8. N = 4096, whose 64 tiles nearly keep it
  // busy: K = 8192 19.3 and 18.1, 24.0 and 21.4; K = 2048 7.5 and 7.1, 9.7 and 8.8, but not behind an ordinary kernel.
  // As many visits: N = 8192, K = 4096 18.3 and 17.5, 20.6 and 20.9; K = 2048 10.5 and 10.5.
  constexpr int64_t kLeast = 2048, kLeastForLittle = 4096;
  const int pairs = sms / 2;
  if (c.tile_n != 64 || pairs == 0) return c;
  const int visits = 2 * over(c.tiles, sms), visits_of_pairs = over(c.tiles, pairs);
  const bool fewer = visits_of_pairs < visits;
  const bool much_faster = fewer && (c.tiles > sms || 8 * c.tiles <= 3 * sms);
  // As many visits: not measured between more than two ranks.
  const bool as_many = visits_of_pairs == visits && c.tile_m <= 32 && c.max_world == 2;
  if (!fewer && !as_many) return c;
  if (k < (much_faster ? kLeast : kLeastForLittle)) return c;
  c.k_parts = 2;
  c.ctas = 2 * std::min(c.tiles, pairs);
  return c;
}

std::optional<PrefillConfig> choose_prefill(const GemmShape& s) {
  if (s.world_size < 2 || s.m <= kMaxDecodeTokens || s.n < 8 || s.n % 8 != 0) return std::nullopt;
  const int clusters = s.sms / kPrefillCluster;
  if (clusters < 1 || s.m > kLongest || s.n > kLongest) return std::nullopt;
  for (const PrefillRow& row : kPrefill) {
    if (s.world_size < row.min_world || s.world_size > row.max_world) continue;
    const PrefillConfig c = with_tokens(
        {.tile_n = row.tile_n, .stages = row.stages, .ctas = kPrefillCluster * clusters}, s.m, s.n, s.world_size);
    const int count = visits(c);
    if (count < row.least_visits || count > row.most_visits) continue;
    // Two narrow visits are a wide one, and take longer.
    if (s.world_size == 2 && row.tile_n == 128 && count % 2 == 0) continue;
    const double most = static_cast<double>(count) * clusters * kPrefillTokens * row.tile_n;
    if (static_cast<double>(s.m) * static_cast<double>(s.n) < row.least_full * most) continue;
    return c;
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
  const int other_part = c.k_parts > 1 ? c.tile_n * c.tile_m * static_cast<int>(sizeof(float)) : 0;
  return static_cast<size_t>(c.stages * c.boxes * kRow * (c.tile_n + c.tile_m) + other_part + kAlignment);
}

size_t slot_bytes(const PrefillConfig& c, int world_size) {
  const size_t parts = static_cast<size_t>(kPrefillTokens * c.tile_n) * 2;
  if (c.share == 0) return static_cast<size_t>(c.tiles_m) * static_cast<size_t>(c.tiles_n) * parts;
  return static_cast<size_t>(world_size) * static_cast<size_t>(c.share * kPrefillCluster) * sizeof(uint32_t);
}

PrefillConfig with_tokens(PrefillConfig c, int64_t m, int64_t n, int world_size) {
  c.tiles_m = over(m, kPrefillTokens);
  c.tiles_n = over(n, c.tile_n);
  const int64_t tiles = int64_t{c.tiles_m} * c.tiles_n;
  c.ctas = static_cast<int>(std::min<int64_t>(c.ctas, kPrefillCluster * tiles));
  const int64_t last_visit = tiles - int64_t{visits(c) - 1} * (c.ctas / kPrefillCluster);
  c.share = world_size > 2 ? over(tiles, world_size) : 0;
  c.late_steps = c.share == 0 && c.tile_n >= kLeastHalved ? over(last_visit * kLateSteps, kOfTiles) : 0;
  return c;
}

size_t staging_bytes(const PrefillConfig& config, int64_t m, int64_t n, int world_size) {
  const PrefillConfig c = with_tokens(config, m, n, world_size);
  if (c.share == 0) return 0;
  const int64_t partials = int64_t{world_size - 1} * c.share * kPrefillTokens * c.tile_n * 2;
  return static_cast<size_t>(std::max(partials, m * n * 2));
}

int visits(const PrefillConfig& c) {
  return over(int64_t{c.tiles_m} * c.tiles_n, c.ctas / kPrefillCluster);
}

int64_t least_round(int64_t m) {
  int64_t rounds = 1;
  while (tokens_of_rounds(m, rounds + 1) >= kLeastRound) rounds++;
  return std::min(m, tokens_of_rounds(m, rounds));
}

int64_t tokens_a_round(const PrefillConfig& config, int64_t m, int64_t n, int world_size, size_t have_slots,
                       size_t have_staging) {
  for (int64_t rounds = 1;; rounds++) {
    const int64_t tokens = tokens_of_rounds(m, rounds);
    if (rounds > 1 && tokens < kLeastRound) return 0;
    const int64_t count = std::min(tokens, m);
    const bool has_slots = slot_bytes(with_tokens(config, count, n, world_size), world_size) <= have_slots;
    if (has_slots && staging_bytes(config, count, n, world_size) <= have_staging) return count;
  }
}

size_t shared_bytes(const PrefillConfig& c) {
  constexpr int kTokens = kPrefillTokens / kPrefillCluster, kRow = 2 * kBoxColumns, kAlignment = 1024;
  return static_cast<size_t>(c.stages * (kTokens + c.tile_n) * kRow + kTokens * c.tile_n * 2 + kAlignment);
}

std::string to_string(const PrefillConfig& c) {
  return cat(kPrefillTokens, "x", c.tile_n, " tiles, ", c.tiles_m, " x ", c.tiles_n, " in ", c.ctas, " CTAs, ",
             c.stages, " stages, ", c.share == 0 ? "one-shot" : "two-shot");
}

std::string to_string(const GemmConfig& c) {
  return cat(c.tile_n, "x", c.tile_m, " tiles, ", c.tiles, " in ", c.ctas, " CTAs",
             c.k_parts > 1 ? " by half of k, " : ", ", c.stages, " stages of ", c.boxes * kBoxColumns, " columns, ",
             c.reducers, " reducers, ", c.two_shot ? "two-shot" : "one-shot");
}

}  // namespace sglang_symm
