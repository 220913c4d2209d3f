#include "fused/gemm_config.h"

#include <gtest/gtest.h>

namespace sglang_symm {
namespace {

struct Row {
  GemmShape shape;
  std::string expected;  // empty: not for the decode kernel
};

TEST(GemmConfig, ANormBehindItLeavesGemmsOfHalfOfTheSmsToTheLibraryBetweenTwoRanks) {
  const auto apart = [](const GemmShape& shape) { return is_faster_apart_with_norm(*choose_decode(shape), shape); };
  EXPECT_TRUE(apart({64, 4096, 2, 132}));
  EXPECT_TRUE(apart({17, 4224, 2, 132}));
  EXPECT_FALSE(apart({16, 4096, 2, 132})) << "up to 16 tokens the GEMM is faster here";
  EXPECT_FALSE(apart({64, 4232, 2, 132})) << "67 tiles: more than half of the SMs have one";
  EXPECT_FALSE(apart({64, 4096, 2, 64})) << "on half of a GPU all SMs have one";
  EXPECT_FALSE(apart({64, 4096, 4, 132}));
}

TEST(GemmConfig, FollowsTheTable) {
  const Row rows[] = {
      {{1, 8192, 2, 132}, "64x16 tiles, 128 in 128 CTAs, 5 stages of 256 columns, 4 reducers, one-shot"},
      {{17, 8192, 2, 132}, "64x64 tiles, 128 in 128 CTAs, 6 stages of 128 columns, 4 reducers, one-shot"},
      {{64, 14336, 2, 132}, "64x64 tiles, 224 in 132 CTAs, 6 stages of 128 columns, 4 reducers, one-shot"},
      {{64, 14336, 2, 64}, "64x64 tiles, 224 in 64 CTAs, 6 stages of 128 columns, 4 reducers, one-shot"},
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
      {{17, 2048, 2, 132}, ""},
      {{17, 2112, 2, 132}, "64x64 tiles, 33 in 33 CTAs, 6 stages of 128 columns, 4 reducers, one-shot"},
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
      {{240, 8192, 2, 132}, ""},  // products of nothing cost more than the fusion gains
      {{241, 8192, 2, 132}, "256x128 tiles, 1 x 64 in 128 CTAs, 6 stages, one-shot"},
      {{256, 8192, 2, 132}, "256x128 tiles, 1 x 64 in 128 CTAs, 6 stages, one-shot"},
      {{300, 8192, 2, 132}, ""},  // half of the products would be of nothing
      {{512, 8192, 2, 132}, ""},  // one wave of wide tiles: nothing to hide under
      // Two waves: owners sum all tiles.
      {{1024, 8192, 2, 132}, "256x256 tiles, 4 x 32 in 132 CTAs, 3 stages, two-shot"},
      {{1280, 8192, 2, 132}, ""},  // a third wave for a few tiles
      {{1536, 8192, 2, 132}, "256x256 tiles, 6 x 32 in 132 CTAs, 3 stages, two-shot, the last 60 one-shot"},
      {{2048, 8192, 2, 132}, "256x256 tiles, 8 x 32 in 132 CTAs, 3 stages, two-shot, the last 58 one-shot"},
      {{2048, 8192, 2, 128}, "256x256 tiles, 8 x 32 in 128 CTAs, 3 stages, two-shot, the last 64 one-shot"},
      {{2048, 4096, 2, 132}, "256x256 tiles, 8 x 16 in 132 CTAs, 3 stages, two-shot"},
      {{256, 4096, 2, 132}, ""},   // half of the SMs would idle
      {{512, 4096, 2, 132}, ""},   // one wave of wide tiles
      {{256, 14336, 2, 132}, ""},  // a second wave for a few tiles
      // Three waves, but more than two ranks: owners sum the last one, too.
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
        EXPECT_GE(c->share * world + c->last, tiles);
        EXPECT_TRUE(!c->one_shot || c->last == tiles);
        const int clusters = c->ctas / kPrefillCluster;
        EXPECT_EQ(c->last > 0, c->one_shot || (world == 2 && tiles > 2 * clusters));
        if (c->last > 0) {
          EXPECT_EQ((tiles - c->last) % clusters, 0) << "the last are a wave, or all";
        }
        EXPECT_EQ(c->late_steps > 0, c->last > 0 && !c->one_shot);
        EXPECT_LE(shared_bytes(*c), size_t{227} << 10);
        EXPECT_EQ(c->ctas % kPrefillCluster, 0);
        EXPECT_LE(c->ctas, 132) << "all of it must be resident";
        EXPECT_EQ(is_for_two_ranks(c->one_shot, c->tile_n), world == 2);
        const size_t result = static_cast<size_t>(m * n) * 2;
        EXPECT_GE(c->one_shot ? slot_bytes(*c, world) : staging_bytes(*c, m, n, world), result);
      }
    }
  }
}

TEST(PrefillConfig, SlotsHoldTheFlagsAndBehindThemWhatBothRanksPush) {
  const auto c = choose_prefill({2048, 8192, 2, 132});
  ASSERT_TRUE(c);
  EXPECT_EQ(c->last, 58);
  EXPECT_EQ(c->share, 99);
  EXPECT_EQ(flag_bytes(*c, 2), size_t{1664});  // 2 x 99 x 2 words, whole lines
  EXPECT_EQ(slot_bytes(*c, 2), size_t{1664} + size_t{2} * 58 * 256 * 256 * 2);
  EXPECT_EQ(staging_bytes(*c, 2048, 8192, 2), size_t{2048} * 8192 * 2) << "y is more than the partials";
  // 256 tokens less: 224 tiles, 26 of them in the last wave. One wave: nothing is anybody's.
  EXPECT_EQ(with_tokens(*c, 1792, 8192, 2).last, 26);
  EXPECT_EQ(c->late_steps, 27) << "as long as half of 58 tiles is on its way";
  EXPECT_EQ(with_tokens(*c, 1792, 8192, 2).late_steps, 12);
  EXPECT_EQ(with_tokens(*c, 1024, 8192, 2).last, 0);
  EXPECT_EQ(with_tokens(*c, 256, 8192, 2).last, 32);
  EXPECT_EQ(with_tokens(*c, 256, 8192, 2).share, 0);
  EXPECT_EQ(flag_bytes(*choose_prefill({256, 8192, 2, 132}), 2), size_t{0});
}

TEST(GemmConfig, WhereHalfOfTheSmsHaveNoTileTwoCtasShareOne) {
  const auto text = [](int64_t m, int64_t n, int64_t k, int world = 2) {
    return to_string(with_columns(*choose_decode({m, n, world, 132}), k, 132));
  };
  EXPECT_EQ(text(17, 4096, 2048),
            "64x64 tiles, 64 in 128 CTAs by half of k, 6 stages of 128 columns, 4 reducers, one-shot");
  EXPECT_EQ(text(64, 4096, 2048, 8),
            "64x64 tiles, 64 in 128 CTAs by half of k, 6 stages of 128 columns, 8 reducers, two-shot");
  EXPECT_EQ(text(17, 4096, 2040), "64x64 tiles, 64 in 64 CTAs, 6 stages of 128 columns, 4 reducers, one-shot");
  EXPECT_EQ(text(17, 4288, 2048), "64x64 tiles, 67 in 67 CTAs, 6 stages of 128 columns, 4 reducers, one-shot");
  EXPECT_EQ(text(16, 4096, 2048), "64x16 tiles, 64 in 64 CTAs, 5 stages of 256 columns, 4 reducers, one-shot");
  for (const int world : {2, 4, 8}) {
    const auto config = choose_decode({64, 4096, world, 132});
    const GemmConfig pairs = with_columns(*config, 4096, 132);
    EXPECT_EQ(pairs.k_parts, 2);
    EXPECT_LE(shared_bytes(pairs), size_t{227} << 10);
    EXPECT_EQ(slot_bytes(pairs, world), slot_bytes(*config, world));
  }
}

TEST(PrefillConfig, ARoundHoldsWhatStagingMemoryHolds) {
  const auto c = choose_prefill({8192, 8192, 2, 132});
  ASSERT_TRUE(c);
  EXPECT_EQ(tokens_a_round(*c, 8192, 8192, 2, size_t{128} << 20), 8192);
  EXPECT_EQ(tokens_a_round(*c, 8192, 8192, 2, size_t{32} << 20), 2048);
  EXPECT_EQ(tokens_a_round(*c, 8192, 8192, 2, size_t{31} << 20), 1792);
  EXPECT_EQ(tokens_a_round(*c, 8192, 8192, 2, size_t{16} << 20), 1024);
  EXPECT_EQ(tokens_a_round(*c, 8192, 8192, 2, size_t{15} << 20), 0);
  // 3328 tokens go as 1792, whose last wave has 26 tiles, and 1536, with 60.
  EXPECT_EQ(tokens_a_round(*c, 3328, 8192, 2, size_t{32} << 20), 1792);
  EXPECT_EQ(slot_bytes_of_rounds(*c, 1792, 3328, 8192, 2), slot_bytes(with_tokens(*c, 1536, 8192, 2), 2));
  EXPECT_EQ(slot_bytes_of_rounds(*c, 1792, 1792, 8192, 2), slot_bytes(with_tokens(*c, 1792, 8192, 2), 2));
  const auto one_shot = choose_prefill({250, 8192, 2, 132});
  ASSERT_TRUE(one_shot);
  EXPECT_EQ(tokens_a_round(*one_shot, 250, 8192, 2, 0), 250);
}

}  // namespace
}  // namespace sglang_symm
