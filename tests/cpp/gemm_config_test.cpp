#include "fused/gemm_config.h"

#include <gtest/gtest.h>

namespace sglang_symm {
namespace {

struct Row {
  GemmShape shape;
  std::string expected;  // empty: not for the decode kernel
};

TEST(GemmConfig, FollowsTheTable) {
  const Row rows[] = {
      {{1, 8192, 4096, 2, 132}, "64x16 tiles, 128 in 128 CTAs, 5 stages of 256 columns, 4 reducers, one-shot"},
      {{16, 8192, 14336, 2, 132}, "64x16 tiles, 128 in 128 CTAs, 5 stages of 256 columns, 4 reducers, one-shot"},
      {{17, 8192, 4096, 2, 132}, "64x64 tiles, 128 in 128 CTAs, 6 stages of 128 columns, 4 reducers, one-shot"},
      {{64, 14336, 4096, 2, 132}, "64x64 tiles, 224 in 132 CTAs, 6 stages of 128 columns, 4 reducers, one-shot"},
      {{64, 14336, 4096, 2, 64}, "64x64 tiles, 224 in 64 CTAs, 6 stages of 128 columns, 4 reducers, one-shot"},
      {{3, 8192, 2048, 4, 32}, "128x16 tiles, 64 in 32 CTAs, 6 stages of 64 columns, 4 reducers, one-shot"},
      {{9, 8192, 1024, 4, 132}, "128x16 tiles, 64 in 64 CTAs, 6 stages of 64 columns, 4 reducers, two-shot"},
      {{40, 8192, 1024, 8, 132}, "128x64 tiles, 64 in 64 CTAs, 6 stages of 64 columns, 8 reducers, two-shot"},
      {{2, 8, 8, 2, 132}, "64x16 tiles, 1 in 1 CTAs, 5 stages of 256 columns, 4 reducers, one-shot"},
      {{2, 584, 520, 2, 132}, "64x16 tiles, 10 in 10 CTAs, 5 stages of 256 columns, 4 reducers, one-shot"},
      {{16, 2048, 2048, 2, 132}, "64x16 tiles, 32 in 32 CTAs, 5 stages of 256 columns, 4 reducers, one-shot"},
      {{17, 2048, 2048, 2, 132}, ""},
      {{17, 2112, 2048, 2, 132}, "64x64 tiles, 33 in 33 CTAs, 6 stages of 128 columns, 4 reducers, one-shot"},
      {{0, 8192, 4096, 2, 132}, ""},
      {{65, 8192, 4096, 2, 132}, ""},
      {{1, 8192, 4096, 1, 132}, ""},
      {{1, 8192, 4096, 3, 132}, ""},
      {{1, 8192, 4096, 6, 132}, ""},
      {{1, 8192, 4096, 16, 132}, ""},
      {{1, 8190, 4096, 2, 132}, ""},
      {{1, 8192, 4092, 2, 132}, ""},
      {{1, 0, 4096, 2, 132}, ""},
      {{1, 8192, 0, 2, 132}, ""},
  };
  for (const Row& row : rows) {
    const auto config = choose_decode(row.shape);
    EXPECT_EQ(config ? to_string(*config) : "", row.expected)
        << "m " << row.shape.m << " n " << row.shape.n << " k " << row.shape.k << " world " << row.shape.world_size;
  }
}

TEST(GemmConfig, WhereAPartialLiesDependsOnNothingOfARanksOwn) {
  for (const int world : {2, 4, 8}) {
    for (int64_t m = 1; m <= kMaxDecodeTokens; m++) {
      const auto reference = choose_decode({m, 8192, 4096, world, 132});
      ASSERT_TRUE(reference);
      for (const int64_t k : {8, 1024, 28672}) {
        for (const int sms : {1, 16, 264}) {
          const auto other = choose_decode({m, 8192, k, world, sms});
          ASSERT_TRUE(other);
          EXPECT_EQ(other->tile_n, reference->tile_n);
          EXPECT_EQ(other->tile_m, reference->tile_m);
          EXPECT_EQ(slot_bytes(*other, world), slot_bytes(*reference, world));
        }
      }
    }
  }
}

TEST(GemmConfig, FitsTheSharedMemoryOfAnSmAndHoldsEveryToken) {
  for (const int world : {2, 4, 8}) {
    for (int64_t m = 1; m <= kMaxDecodeTokens; m++) {
      const auto config = choose_decode({m, 8192, 4096, world, 132});
      ASSERT_TRUE(config);
      EXPECT_GE(config->tile_m, m);
      EXPECT_LE(shared_bytes(*config), size_t{227} << 10);
      EXPECT_GE(int64_t{config->tiles} * config->tile_n, 8192);
    }
  }
}

TEST(GemmConfig, SlotsHoldEverySourcesWholeResultAndTheSums) {
  const auto one_shot = choose_decode({64, 8192, 4096, 2, 132});
  ASSERT_TRUE(one_shot);
  EXPECT_EQ(slot_bytes(*one_shot, 2), size_t{2} * 8192 * 64 * 2);
  const auto two_shot = choose_decode({64, 8192, 4096, 8, 132});
  ASSERT_TRUE(two_shot);
  EXPECT_EQ(slot_bytes(*two_shot, 8), size_t{8 + 1} * 8192 * 64 * 2);
}

}  // namespace
}  // namespace sglang_symm
