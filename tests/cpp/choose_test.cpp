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
  Algorithm expected;
};

constexpr size_t K = 1024;

// A ladder of its own for every op, so that a mix-up of ops shows.
const char* const kTuning =
    "all_reduce:one_shot<=1024,two_shot<=65536,two_shot_direct;row_parallel_linear:one_shot<=2048,two_shot_direct;"
    "reduce_scatter:one_shot<=4096,two_shot_direct;all_gather:one_shot<=8192,two_shot_direct;"
    "broadcast:one_shot<=16384,two_shot_direct";

TEST(Choose, FollowsTheTable) {
  using enum OpCode;
  using enum Algorithm;
  Agreed agreed;
  agreed.tuning = Tuning::parse(kTuning);
  const Row rows[] = {
      {OpCode::all_reduce, DType::float32, ReduceOp::sum, 0, one_shot},
      {OpCode::all_reduce, DType::float32, ReduceOp::sum, K, one_shot},
      {OpCode::all_reduce, DType::bfloat16, ReduceOp::sum, K + 2, two_shot},
      {OpCode::all_reduce, DType::float16, ReduceOp::sum, 64 * K, two_shot},
      {OpCode::all_reduce, DType::float32, ReduceOp::sum, 64 * K + 4, two_shot_direct},
      {all_reduce_add_rms_norm, DType::float32, ReduceOp::sum, 64 * K, two_shot},
      {OpCode::all_reduce, DType::float64, ReduceOp::sum, 8, process_group},
      {OpCode::all_reduce, DType::float32, ReduceOp::max, 8, process_group},
      {OpCode::all_reduce, DType::int64, ReduceOp::sum, 8, process_group},
      {row_parallel_linear, DType::float16, ReduceOp::sum, 2 * K, one_shot},
      {row_parallel_linear, DType::float16, ReduceOp::sum, 2 * K + 2, two_shot_direct},
      {row_parallel_linear_add_rms_norm, DType::float16, ReduceOp::sum, 2 * K, one_shot},
      {all_gather, DType::int64, ReduceOp::sum, 8 * K, one_shot},
      {all_gather, DType::unnamed, ReduceOp::sum, 8 * K + 1, two_shot_direct},
      {broadcast, DType::boolean, ReduceOp::sum, 16 * K, one_shot},
      {broadcast, DType::boolean, ReduceOp::sum, 16 * K + 1, two_shot_direct},
      {reduce_scatter, DType::float32, ReduceOp::sum, 4 * K, one_shot},
      {reduce_scatter, DType::float32, ReduceOp::sum, 4 * K + 4, two_shot_direct},
      {reduce_scatter, DType::int32, ReduceOp::sum, 4, process_group},
      {barrier, DType::bytes, ReduceOp::sum, 0, one_shot},
  };
  for (const Row& row : rows) {
    EXPECT_EQ(choose(row.op, row.dtype, row.reduce_op, row.bytes, agreed), row.expected)
        << name(row.op) << " " << name(row.dtype) << " " << row.bytes << " bytes";
  }
}

TEST(Choose, NcclWhereTheGroupHasItsCommunicatorAndPinnedModeDoesNotForbid) {
  using enum Algorithm;
  Agreed agreed;
  agreed.tuning = Tuning::parse(
      "all_reduce:one_shot<=1024,nccl;row_parallel_linear:one_shot;reduce_scatter:one_shot;all_gather:one_shot;"
      "broadcast:one_shot");
  const auto chosen = [&](DType dtype, ReduceOp op, size_t bytes) {
    return choose(OpCode::all_reduce, dtype, op, bytes, agreed);
  };
  EXPECT_EQ(chosen(DType::int64, ReduceOp::sum, 8), process_group);
  EXPECT_EQ(chosen(DType::float32, ReduceOp::sum, 2 * K), one_shot);
  agreed.nccl = true;
  EXPECT_EQ(chosen(DType::int64, ReduceOp::sum, 8), nccl);
  EXPECT_EQ(chosen(DType::bfloat16, ReduceOp::max, 8), nccl);
  EXPECT_EQ(chosen(DType::complex64, ReduceOp::sum, 8), nccl);
  EXPECT_EQ(chosen(DType::complex64, ReduceOp::product, 8), process_group);
  EXPECT_EQ(chosen(DType::int16, ReduceOp::sum, 8), process_group);
  EXPECT_EQ(chosen(DType::float32, ReduceOp::sum, K), one_shot);
  EXPECT_EQ(chosen(DType::float32, ReduceOp::sum, 2 * K), nccl);
  agreed.pinned = true;
  EXPECT_EQ(chosen(DType::float32, ReduceOp::sum, 2 * K), one_shot);
  agreed.forced = nccl;
  EXPECT_EQ(chosen(DType::float32, ReduceOp::sum, 2 * K), one_shot);
  agreed.pinned = false;
  EXPECT_EQ(chosen(DType::float32, ReduceOp::sum, 8), nccl);
  agreed.nccl = false;
  EXPECT_EQ(chosen(DType::float32, ReduceOp::sum, 8), one_shot);
}

TEST(Choose, WhatNobodyReducesIsKnownBeforeItIsSent) {
  using enum DType;
  Agreed agreed;
  for (const bool nccl : {false, true}) {
    agreed.nccl = nccl;
    for (const DType dtype : {float32, bfloat16, float16, float64, int8, uint8, int32, int64, boolean}) {
      EXPECT_TRUE(reducible(dtype, ReduceOp::max, agreed)) << name(dtype);
    }
    EXPECT_TRUE(reducible(complex64, ReduceOp::sum, agreed));
    EXPECT_FALSE(reducible(complex64, ReduceOp::product, agreed));
    // PyTorch's NCCL takes them as little as Gloo does; a communicator of the group's own takes the unsigned ones.
    EXPECT_EQ(reducible(uint32, ReduceOp::max, agreed), nccl);
    EXPECT_EQ(reducible(uint64, ReduceOp::sum, agreed), nccl);
    for (const DType dtype : {int16, uint16, float8_e4m3fn, float8_e5m2, complex32, unnamed}) {
      EXPECT_FALSE(reducible(dtype, ReduceOp::sum, agreed)) << name(dtype);
    }
  }
}

TEST(Choose, ForcedWinsExceptWhereItCannotBe) {
  Agreed agreed;
  agreed.forced = Algorithm::two_shot;
  EXPECT_EQ(choose(OpCode::all_reduce, DType::float32, ReduceOp::sum, 8, agreed), Algorithm::two_shot);
  EXPECT_EQ(choose(OpCode::all_reduce, DType::int32, ReduceOp::sum, 8, agreed), Algorithm::process_group);
  EXPECT_EQ(choose(OpCode::barrier, DType::bytes, ReduceOp::sum, 0, agreed), Algorithm::one_shot);
}

TEST(Choose, PinnedModeExcludesTheProcessGroup) {
  Agreed agreed;
  agreed.pinned = true;
  agreed.forced = Algorithm::process_group;
  EXPECT_EQ(choose(OpCode::all_reduce, DType::float32, ReduceOp::sum, 8, agreed), Algorithm::one_shot);
  EXPECT_THROW(choose(OpCode::all_reduce, DType::float64, ReduceOp::sum, 8, agreed), Error);
}

TEST(Choose, PinnedModePassesOverStepsOfTheProcessGroup) {
  using enum Algorithm;
  Agreed agreed;
  const auto chosen = [&](size_t bytes) {
    return choose(OpCode::all_reduce, DType::float32, ReduceOp::sum, bytes, agreed);
  };
  agreed.tuning.all_reduce = {{K, one_shot}, {2 * K, process_group}, {4 * K, two_shot}, {SIZE_MAX, process_group}};
  EXPECT_EQ(chosen(2 * K), process_group);
  EXPECT_EQ(chosen(8 * K), process_group);
  agreed.pinned = true;
  EXPECT_EQ(chosen(2 * K), two_shot);
  EXPECT_EQ(chosen(8 * K), two_shot);
  agreed.tuning.all_reduce = {{SIZE_MAX, process_group}};
  EXPECT_EQ(chosen(K), two_shot_direct);
}

TEST(Tuning, IsReadAsItIsWritten) {
  EXPECT_EQ(to_string(Tuning::parse(kTuning)), kTuning);
  for (const bool cuda : {false, true}) {
    for (const int world_size : {1, 2, 3, 4, 8, 16}) {
      const std::string text = to_string(Tuning::built_in(cuda, world_size));
      EXPECT_EQ(to_string(Tuning::parse(text)), text);
    }
  }
}

TEST(Tuning, AnotherLadderHasAnotherDigest) {
  Agreed here, there;
  EXPECT_EQ(to_string(here), to_string(there));
  there.tuning.broadcast[0].up_to += 1;
  EXPECT_NE(to_string(here), to_string(there));
}

TEST(Tuning, AMalformedTextIsAnErrorThatShowsIt) {
  const std::string rest =
      ";row_parallel_linear:one_shot;reduce_scatter:one_shot;all_gather:one_shot;broadcast:one_shot";
  EXPECT_NO_THROW(Tuning::parse("all_reduce:one_shot" + rest));
  const struct {
    std::string text, shown;
  } wrong[] = {
      {"", "1 ops"},
      {"all_reduce:one_shot", "1 ops"},
      {"all_reduce:one_shot" + rest + ";barrier:one_shot", "6 ops"},
      {"broadcast:one_shot" + rest, "'broadcast:one_shot' for all_reduce:"},
      {"all_reduce:" + rest, "the step ''"},
      {"all_reduce:auto" + rest, "the step 'auto'"},
      {"all_reduce:fastest" + rest, "algorithm 'fastest'"},
      {"all_reduce:one_shot<=" + rest, "bytes, got ''"},
      {"all_reduce:one_shot<=-1,two_shot" + rest, "bytes, got '-1'"},
      {"all_reduce:one_shot<=1e6,two_shot" + rest, "bytes, got '1e6'"},
      {"all_reduce:one_shot<=99999999999999999999,two_shot" + rest, "bytes, got '99999999999999999999'"},
      {"all_reduce:one_shot<=8,two_shot<=8,one_shot" + rest, "the step 'two_shot<=8'"},
      {"all_reduce:one_shot,two_shot" + rest, "the step 'two_shot'"},
      {"all_reduce:one_shot<=8" + rest, "no last step"},
  };
  for (const auto& each : wrong) {
    try {
      Tuning::parse(each.text);
      ADD_FAILURE() << each.text;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::argument);
      EXPECT_NE(std::string(error.what()).find(each.shown), std::string::npos) << error.what();
    }
  }
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
