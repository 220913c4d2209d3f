#include "fused/gemm_config.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace sglang_symm {
namespace {

struct Row {
  GemmShape shape;
  std::string expected;  // empty: not for the decode kernel
};

TEST(GemmConfig, ANormBehindItLeavesGemmsOfHalfOfTheSmsToTheLibraryBetweenTwoRanks) {
  const auto apart = [](const GemmShape& shape) { return is_faster_apart_with_norm(*choose_decode(shape), shape); };
  EXPECT_TRUE(apart({64, 4096, 2, 132}));
  EXPECT_TRUE(apart({33, 4224, 2, 132}));
  EXPECT_FALSE(apart({32, 4096, 2, 132})) << "up to 32 tokens the GEMM is faster here";
  EXPECT_FALSE(apart({64, 4232, 2, 132})) << "67 tiles: more than half of the SMs have one";
  EXPECT_FALSE(apart({64, 4096, 2, 64})) << "on half of a GPU all SMs have one";
  EXPECT_FALSE(apart({64, 4096, 4, 132}));
}

TEST(GemmConfig, FollowsTheTable) {
  const Row rows[] = {
      {{1, 8192, 2, 132}, "64x16 tiles, 128 in 128 CTAs, 5 stages of 256 columns, 4 reducers, one-shot"},
      {{17, 8192, 2, 132}, "64x32 tiles, 128 in 128 CTAs, 4 stages of 256 columns, 4 reducers, one-shot"},
      {{32, 8192, 2, 132}, "64x32 tiles, 128 in 128 CTAs, 4 stages of 256 columns, 4 reducers, one-shot"},
      {{33, 8192, 2, 132}, "64x64 tiles, 128 in 128 CTAs, 6 stages of 128 columns, 8 reducers, one-shot"},
      {{64, 14336, 2, 132}, "64x64 tiles, 224 in 132 CTAs, 6 stages of 128 columns, 8 reducers, one-shot"},
      {{64, 14336, 2, 64}, "64x64 tiles, 224 in 64 CTAs, 6 stages of 128 columns, 8 reducers, one-shot"},
      {{3, 8192, 4, 32}, "128x16 tiles, 64 in 32 CTAs, 6 stages of 64 columns, 4 reducers, one-shot"},
      {{9, 8192, 4, 32}, "128x16 tiles, 64 in 32 CTAs, 6 stages of 64 columns, 4 reducers, two-shot"},
      {{40, 8192, 8, 16}, "128x64 tiles, 64 in 16 CTAs, 6 stages of 64 columns, 8 reducers, two-shot"},
      {{16, 8192, 4, 132}, "64x16 tiles, 128 in 128 CTAs, 5 stages of 256 columns, 4 reducers, one-shot"},
      {{17, 8192, 4, 132}, "64x64 tiles, 128 in 128 CTAs, 6 stages of 128 columns, 8 reducers, two-shot"},
      {{8, 8192, 8, 132}, "64x16 tiles, 128 in 128 CTAs, 5 stages of 256 columns, 4 reducers, one-shot"},
      {{9, 8192, 8, 132}, "64x16 tiles, 128 in 128 CTAs, 5 stages of 256 columns, 4 reducers, two-shot"},
      {{40, 8192, 8, 132}, "64x64 tiles, 128 in 128 CTAs, 6 stages of 128 columns, 8 reducers, two-shot"},
      {{64, 16384, 4, 132}, "128x64 tiles, 128 in 128 CTAs, 6 stages of 64 columns, 8 reducers, two-shot"},
      {{2, 8, 2, 132}, "64x16 tiles, 1 in 1 CTAs, 5 stages of 256 columns, 4 reducers, one-shot"},
      {{2, 584, 2, 132}, "64x16 tiles, 10 in 10 CTAs, 5 stages of 256 columns, 4 reducers, one-shot"},
      {{16, 2048, 2, 132}, "64x16 tiles, 32 in 32 CTAs, 5 stages of 256 columns, 4 reducers, one-shot"},
      {{17, 2048, 2, 132}, "64x32 tiles, 32 in 32 CTAs, 4 stages of 256 columns, 4 reducers, one-shot"},
      {{64, 576, 2, 132}, "64x64 tiles, 9 in 9 CTAs, 6 stages of 128 columns, 8 reducers, one-shot"},
      {{0, 8192, 2, 132}, ""},
      {{65, 8192, 2, 132}, ""},
      {{1, 8192, 1, 132}, ""},
      {{1, 8192, 3, 132}, ""},
      {{1, 8192, 6, 132}, ""},
      {{1, 8192, 16, 132}, ""},
      {{1, 8190, 2, 132}, ""},
      {{1, 0, 2, 132}, ""},
  };
  for (const Row& row : rows) {
    const auto config = choose_decode(row.shape);
    EXPECT_EQ(config ? to_string(*config) : "", row.expected)
        << "m " << row.shape.m << " n " << row.shape.n << " world " << row.shape.world_size;
  }
}

TEST(GemmConfig, BetweenMoreThanTwoRanksTilesAreSmallWhereEachHasAnSm) {
  for (const int world : {4, 8}) {
    for (const int64_t m : {1, 8, 9, 16, 17, 64}) {
      for (const int sms : {1, 16, 127, 128, 132}) {
        const auto config = choose_decode({m, 8192, world, sms});
        ASSERT_TRUE(config);
        EXPECT_EQ(config->tile_n, sms >= 128 ? 64 : 128) << "m " << m << " world " << world << " SMs " << sms;
        EXPECT_EQ(config->tile_m, m <= 16 ? 16 : 64);
      }
    }
  }
}

TEST(GemmConfig, FitsTheSharedMemoryOfAnSmAndHoldsEveryToken) {
  for (const int world : {2, 4, 8}) {
    for (const int sms : {16, 132}) {
      for (int64_t m = 1; m <= kMaxDecodeTokens; m++) {
        const auto config = choose_decode({m, 8192, world, sms});
        ASSERT_TRUE(config);
        EXPECT_GE(config->tile_m, m);
        EXPECT_LE(shared_bytes(*config), size_t{227} << 10);
        EXPECT_GE(int64_t{config->tiles} * config->tile_n, 8192);
      }
    }
  }
}

TEST(GemmConfig, SlotsHoldEverySourcesWholeResultAndTheSums) {
  const auto one_shot = choose_decode({64, 8192, 2, 132});
  ASSERT_TRUE(one_shot);
  EXPECT_EQ(slot_bytes(*one_shot, 2), size_t{2} * 8192 * 64 * 2);
  const auto two_shot = choose_decode({64, 8192, 8, 132});
  ASSERT_TRUE(two_shot);
  EXPECT_EQ(slot_bytes(*two_shot, 8), size_t{8 + 1} * 8192 * 64 * 2);
}

TEST(PrefillConfig, FollowsTheTable) {
  const Row rows[] = {
      {{64, 8192, 2, 132}, ""},
      {{128, 8192, 2, 132}, ""},
      {{256, 8192, 2, 132}, ""},  // nothing to hide under
      {{300, 8192, 2, 132}, ""},  // half of the products would be of nothing
      {{480, 8192, 2, 132}, ""},
      {{490, 8192, 2, 132}, "256x256 tiles, 2 x 32 in 128 CTAs, 3 stages, one-shot"},
      {{512, 8192, 2, 132}, "256x256 tiles, 2 x 32 in 128 CTAs, 3 stages, one-shot"},
      {{720, 8192, 2, 132}, ""},
      {{768, 8192, 2, 132}, "256x128 tiles, 3 x 64 in 132 CTAs, 6 stages, one-shot"},  // three visits, not twice two
      {{900, 8192, 2, 132}, ""},
      {{1024, 8192, 2, 132}, "256x256 tiles, 4 x 32 in 132 CTAs, 3 stages, one-shot"},
      {{1150, 8192, 2, 132}, ""},
      {{1280, 8192, 2, 132}, "256x128 tiles, 5 x 64 in 132 CTAs, 6 stages, one-shot"},
      {{1536, 8192, 2, 132}, "256x256 tiles, 6 x 32 in 132 CTAs, 3 stages, one-shot"},
      {{1792, 8192, 2, 132}, "256x128 tiles, 7 x 64 in 132 CTAs, 6 stages, one-shot"},
      {{2048, 8192, 2, 132}, "256x256 tiles, 8 x 32 in 132 CTAs, 3 stages, one-shot"},
      {{2048, 8192, 2, 128}, "256x256 tiles, 8 x 32 in 128 CTAs, 3 stages, one-shot"},
      {{2048, 4096, 2, 132}, "256x256 tiles, 8 x 16 in 132 CTAs, 3 stages, one-shot"},
      {{8192, 4096, 2, 132}, "256x256 tiles, 32 x 16 in 132 CTAs, 3 stages, one-shot"},
      {{256, 4096, 2, 132}, ""},  // half of the SMs would idle
      {{512, 4096, 2, 132}, ""},
      {{256, 14336, 2, 132}, ""},  // a second wave for a few tiles
      // More than two ranks: owners sum.
      {{256, 8192, 3, 44}, "256x128 tiles, 1 x 64 in 44 CTAs, 6 stages, two-shot"},
      {{256, 8192, 4, 32}, "256x128 tiles, 1 x 64 in 32 CTAs, 6 stages, two-shot"},
      {{1024, 8192, 4, 32}, "256x128 tiles, 4 x 64 in 32 CTAs, 6 stages, two-shot"},
      {{512, 8192, 4, 132}, ""},  // two waves: too little to hide under
      {{700, 8192, 4, 132}, ""},  // three waves of tiles that are not full
      {{750, 8192, 4, 132}, "256x128 tiles, 3 x 64 in 132 CTAs, 6 stages, two-shot"},
      {{1570, 8192, 4, 132}, ""},
      {{1850, 8192, 4, 132}, "256x128 tiles, 8 x 64 in 132 CTAs, 6 stages, two-shot"},
      {{2048, 8192, 4, 132}, "256x128 tiles, 8 x 64 in 132 CTAs, 6 stages, two-shot"},
      {{2048, 8192, 3, 132}, "256x128 tiles, 8 x 64 in 132 CTAs, 6 stages, two-shot"},
      {{256, 8192, 8, 16}, ""},
      {{2048, 576, 2, 132}, ""},
      {{256, 8190, 2, 132}, ""},
      {{256, 8192, 1, 132}, ""},
      {{2048, 8192, 2, 1}, ""},
  };
  for (const Row& row : rows) {
    const auto config = choose_prefill(row.shape);
    EXPECT_EQ(config ? to_string(*config) : "", row.expected)
        << "m " << row.shape.m << " n " << row.shape.n << " world " << row.shape.world_size;
  }
}

TEST(PrefillConfig, EveryTileHasAnOwnerAndFitsWhatItIsGiven) {
  for (const int world : {2, 3, 4, 8, 16}) {
    for (const int64_t m : {65, 256, 300, 1000, 2048, 8192}) {
      for (const int64_t n : {8192, 8200, 14336}) {
        const auto c = choose_prefill({m, n, world, 132});
        if (!c) continue;
        EXPECT_GE(int64_t{c->tiles_m} * kPrefillTokens, m);
        EXPECT_GE(int64_t{c->tiles_n} * c->tile_n, n);
        const int tiles = c->tiles_m * c->tiles_n;
        EXPECT_EQ(c->share > 0, world > 2);
        EXPECT_TRUE(world == 2 || c->share * world >= tiles);
        EXPECT_EQ(c->late_steps > 0, world == 2 && c->tile_n == 256);
        EXPECT_LE(shared_bytes(*c), size_t{227} << 10);
        EXPECT_EQ(c->ctas % kPrefillCluster, 0);
        EXPECT_LE(c->ctas, 132) << "all of it must be resident";
        const size_t result = static_cast<size_t>(m * n) * 2;
        EXPECT_GE(world == 2 ? slot_bytes(*c, world) : staging_bytes(*c, m, n, world), result);
      }
    }
  }
}

TEST(PrefillConfig, SlotsHoldTheOtherRanksPartOfAllTilesOrFlags) {
  const auto c = choose_prefill({2048, 8192, 2, 132});
  ASSERT_TRUE(c);
  EXPECT_EQ(slot_bytes(*c, 2), size_t{2048} * 8192 * 2);
  EXPECT_EQ(staging_bytes(*c, 2048, 8192, 2), size_t{0});
  EXPECT_EQ(c->late_steps, 27) << "as long as half of the last visit's 58 tiles is on its way";
  // 256 tokens less: 224 tiles, 26 of them in the last visit.
  EXPECT_EQ(with_tokens(*c, 1792, 8192, 2).late_steps, 12);
  EXPECT_EQ(visits(*c), 4);
  const auto owned = choose_prefill({2048, 8192, 4, 132});
  ASSERT_TRUE(owned);
  EXPECT_EQ(owned->share, 128);
  EXPECT_EQ(slot_bytes(*owned, 4), size_t{4} * 128 * 2 * 4) << "a word a source, tile and CTA";
  EXPECT_EQ(staging_bytes(*owned, 2048, 8192, 4), size_t{2048} * 8192 * 2) << "y is more than the partials";
}

TEST(GemmConfig, CtasTakeTheirTilesInPairsWhereAllSmsAreBusierThen) {
  const auto text = [](int64_t m, int64_t n, int64_t k, int world = 2, int sms = 132) {
    const GemmConfig c = with_columns(*choose_decode({m, n, world, sms}), k, sms);
    return cat(c.tiles, " in ", c.ctas, " CTAs", c.k_parts > 1 ? " by half of k" : "");
  };
  // Few tiles, whose SMs alone would not keep memory busy.
  EXPECT_EQ(text(1, 2048, 2048), "32 in 64 CTAs by half of k");
  EXPECT_EQ(text(17, 2048, 2048), "32 in 64 CTAs by half of k");
  EXPECT_EQ(text(64, 3136, 2048), "49 in 98 CTAs by half of k");
  EXPECT_EQ(text(64, 3136, 2048, 8), "49 in 98 CTAs by half of k");
  EXPECT_EQ(text(64, 3136, 2040), "49 in 49 CTAs");
  EXPECT_EQ(text(64, 64, 2048), "1 in 2 CTAs by half of k");
  // SMs that nearly do.
  EXPECT_EQ(text(1, 4096, 4096), "64 in 128 CTAs by half of k");
  EXPECT_EQ(text(33, 4224, 4096), "66 in 132 CTAs by half of k");
  EXPECT_EQ(text(33, 4224, 4088), "66 in 66 CTAs");
  // One and a half visits for two.
  EXPECT_EQ(text(64, 10240, 2048), "160 in 132 CTAs by half of k");
  EXPECT_EQ(text(1, 12672, 2048), "198 in 132 CTAs by half of k");
  // As many visits.
  EXPECT_EQ(text(1, 8192, 4096), "128 in 132 CTAs by half of k");
  EXPECT_EQ(text(32, 8192, 4096), "128 in 132 CTAs by half of k");
  EXPECT_EQ(text(32, 8192, 4088), "128 in 128 CTAs");
  EXPECT_EQ(text(16, 8192, 7168, 4), "128 in 128 CTAs") << "between two ranks alone";
  EXPECT_EQ(text(33, 8192, 14336), "128 in 128 CTAs");
  EXPECT_EQ(text(64, 12736, 4096), "199 in 132 CTAs");
  // An odd number of SMs, and too few.
  EXPECT_EQ(text(64, 1536, 2048, 2, 65), "24 in 48 CTAs by half of k");
  EXPECT_EQ(text(1, 2048, 4096, 2, 33), "32 in 32 CTAs by half of k");
  EXPECT_EQ(text(1, 2112, 4096, 2, 33), "33 in 33 CTAs") << "16 pairs take three visits of half";
  EXPECT_EQ(text(1, 2048, 8192, 2, 1), "32 in 1 CTAs");
  EXPECT_EQ(text(1, 8192, 8192, 4, 33), "64 in 33 CTAs") << "tiles of 128 rows";
  for (const int world : {2, 4, 8}) {
    for (const int64_t m : {16, 17, 64}) {
      const auto config = choose_decode({m, 2048, world, 132});
      const GemmConfig pairs = with_columns(*config, 4096, 132);
      EXPECT_EQ(pairs.k_parts, 2);
      EXPECT_LE(shared_bytes(pairs), size_t{227} << 10);
      EXPECT_EQ(slot_bytes(pairs, world), slot_bytes(*config, world));
    }
  }
}

TEST(PrefillConfig, ARoundHoldsWhatSlotsAndStagingMemoryHold) {
  constexpr size_t kMega = size_t{1} << 20;
  const auto tokens = [](int world, size_t slots, size_t staging) {
    const auto c = choose_prefill({8192, 8192, world, 132});
    return tokens_a_round(c.value(), 8192, 8192, world, slots * kMega, staging * kMega);
  };
  EXPECT_EQ(tokens(2, 128, 0), 8192);
  EXPECT_EQ(tokens(2, 64, 0), 4096);
  EXPECT_EQ(tokens(2, 63, 0), 2816);
  EXPECT_EQ(tokens(2, 16, 0), 1024);
  EXPECT_EQ(tokens(2, 15, 0), 0);
  EXPECT_EQ(tokens(4, 64, 128), 8192);
  EXPECT_EQ(tokens(4, 64, 32), 2048);
  EXPECT_EQ(tokens(4, 64, 31), 1792);
  EXPECT_EQ(tokens(4, 64, 16), 1024);
  EXPECT_EQ(tokens(4, 64, 15), 0);
  EXPECT_EQ(tokens(4, 0, 128), 0);
  const auto c = choose_prefill({500, 8192, 2, 132});
  ASSERT_TRUE(c);
  EXPECT_EQ(tokens_a_round(*c, 500, 8192, 2, 8 * kMega, 0), 500);
  EXPECT_EQ(tokens_a_round(*c, 500, 8192, 2, 8 * kMega - 1, 0), 0) << "tiles are whole";
}

}  // namespace
}  // namespace sglang_symm
