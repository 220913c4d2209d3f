#include "collective/choose.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace sglang_symm {
namespace {

struct Row {
  OpCode op;
  DType dtype;
  ReduceOp reduce_op;
  size_t bytes;
  int world_size;
  Algorithm expected;
};

TEST(Choose, FollowsTheTable) {
  using enum OpCode;
  constexpr size_t K = 1024;
  const Agreed agreed;
  const Row rows[] = {
      {all_reduce, DType::float32, ReduceOp::sum, 0, 2, Algorithm::one_shot},
      {all_reduce, DType::float32, ReduceOp::sum, 16 * K, 2, Algorithm::one_shot},
      {all_reduce, DType::float32, ReduceOp::sum, 16 * K + 4, 2, Algorithm::two_shot_direct},
      {all_reduce, DType::bfloat16, ReduceOp::sum, 8 * K, 4, Algorithm::one_shot},
      {all_reduce, DType::bfloat16, ReduceOp::sum, 16 * K, 4, Algorithm::two_shot_direct},
      {all_reduce, DType::float64, ReduceOp::sum, 8, 2, Algorithm::process_group},
      {all_reduce, DType::float32, ReduceOp::max, 8, 2, Algorithm::process_group},
      {all_reduce, DType::int64, ReduceOp::sum, 8, 2, Algorithm::process_group},
      {row_parallel_linear, DType::float16, ReduceOp::sum, 1 << 20, 3, Algorithm::two_shot_direct},
      {all_gather, DType::int64, ReduceOp::sum, 64 * K, 8, Algorithm::one_shot},
      {all_gather, DType::unnamed, ReduceOp::sum, 64 * K + 1, 8, Algorithm::two_shot_direct},
      {broadcast, DType::boolean, ReduceOp::sum, 1, 2, Algorithm::one_shot},
      {reduce_scatter, DType::int32, ReduceOp::sum, 4, 2, Algorithm::process_group},
      {barrier, DType::bytes, ReduceOp::sum, 0, 2, Algorithm::one_shot},
  };
  for (const Row& row : rows) {
    EXPECT_EQ(choose(row.op, row.dtype, row.reduce_op, row.bytes, row.world_size, agreed), row.expected)
        << name(row.op) << " " << name(row.dtype) << " " << row.bytes << " bytes";
  }
}

TEST(Choose, ForcedWinsExceptWhereItCannotBe) {
  Agreed agreed;
  agreed.forced = Algorithm::two_shot;
  EXPECT_EQ(choose(OpCode::all_reduce, DType::float32, ReduceOp::sum, 8, 2, agreed), Algorithm::two_shot);
  EXPECT_EQ(choose(OpCode::all_reduce, DType::int32, ReduceOp::sum, 8, 2, agreed), Algorithm::process_group);
  EXPECT_EQ(choose(OpCode::barrier, DType::bytes, ReduceOp::sum, 0, 2, agreed), Algorithm::one_shot);
}

TEST(Choose, PinnedModeExcludesTheProcessGroup) {
  Agreed agreed;
  agreed.pinned = true;
  agreed.forced = Algorithm::process_group;
  EXPECT_EQ(choose(OpCode::all_reduce, DType::float32, ReduceOp::sum, 8, 2, agreed), Algorithm::one_shot);
  EXPECT_THROW(choose(OpCode::all_reduce, DType::float64, ReduceOp::sum, 8, 2, agreed), Error);
}

TEST(Choose, ParsesItsOwnNamesAndNamesThemInItsError) {
  EXPECT_FALSE(parse_algorithm("auto").has_value());
  for (int i = 0; i < kAlgorithms; i++) {
    EXPECT_EQ(parse_algorithm(name(static_cast<Algorithm>(i))), static_cast<Algorithm>(i));
  }
  try {
    parse_algorithm("fastest");
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("two_shot_direct"), std::string::npos);
  }
}

}  // namespace
}  // namespace sglang_symm
