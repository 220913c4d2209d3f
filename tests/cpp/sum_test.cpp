#include "collective/sum.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "base/error.h"

namespace sglang_symm {
namespace {

std::vector<CpuPath> paths() {
  std::vector<CpuPath> all{CpuPath::portable};
  if (best_cpu_path() >= CpuPath::avx2) all.push_back(CpuPath::avx2);
  if (best_cpu_path() >= CpuPath::avx512) all.push_back(CpuPath::avx512);
  return all;
}

TEST(Sum, EveryHalfAndBFloat16ComesBackFromFloatUnchanged) {
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    for (uint32_t bits = 0; bits < 65536; bits++) {
      const float wide = to_float(static_cast<uint16_t>(bits), dtype);
      const uint16_t back = from_float(wide, dtype);
      if (std::isnan(wide)) {
        EXPECT_TRUE(std::isnan(to_float(back, dtype)));
      } else {
        ASSERT_EQ(back, bits) << name(dtype);
      }
    }
  }
}

TEST(Sum, RoundsToNearestEvenAsTheCompilersHalfDoes) {
  std::mt19937 random(1);
  for (int i = 0; i < 2'000'000; i++) {
    uint32_t bits = static_cast<uint32_t>(random());
    if (i % 2 == 0) bits = (bits & 0x8FFFFFFFu) | 0x30000000u;  // around the subnormals and normals of half
    float x;
    std::memcpy(&x, &bits, sizeof x);
    if (std::isnan(x)) continue;
    const auto expected = static_cast<_Float16>(x);
    uint16_t expected_bits;
    std::memcpy(&expected_bits, &expected, sizeof expected);
    ASSERT_EQ(from_float(x, DType::float16), expected_bits) << x;
  }
}

TEST(Sum, AllInstructionSetsGiveThePortableBits) {
  std::mt19937 random(7);
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    const size_t element = element_size(dtype);
    for (const size_t count : {0, 1, 31, 2047, 2048, 2049, 5000}) {
      for (const int world : {1, 2, 3, 16}) {
        std::vector<std::vector<std::byte>> data(static_cast<size_t>(world), std::vector<std::byte>(count * element));
        std::vector<const void*> sources;
        for (auto& x : data) {
          for (auto& byte : x) byte = static_cast<std::byte>(random());  // any bits: NaN, infinity, subnormal
          sources.push_back(x.data());
        }
        std::vector<std::byte> bias(100 * element);
        for (auto& byte : bias) byte = static_cast<std::byte>(random());
        std::vector<std::byte> reference;
        for (const CpuPath path : paths()) {
          std::vector<std::byte> a(count * element), b(count * element);
          void* outputs[] = {a.data(), b.data()};
          SumTask task{sources.data(), world, outputs, 2, count, dtype};
          task.bias = bias.data();
          task.bias_length = 100;
          task.bias_start = 37;
          sum_in_rank_order(task, path);
          ASSERT_EQ(a, b);
          if (path == CpuPath::portable) reference = a;
          ASSERT_EQ(a, reference) << name(path) << " " << name(dtype) << " count " << count << " world " << world;
        }
      }
    }
  }
}

TEST(Sum, AddsInRankOrderAndTheBiasLast) {
  // 1e8 + 1 - 1e8 depends on the order in fp32: rank order gives 0, any other 1.
  const float x[3] = {1e8f, 1.0f, -1e8f};
  const void* sources[] = {&x[0], &x[1], &x[2]};
  const float bias = 0.25f;
  float out = -1;
  void* output = &out;
  SumTask task{sources, 3, &output, 1, 1, DType::float32};
  task.bias = &bias;
  task.bias_length = 1;
  sum_in_rank_order(task, CpuPath::portable);
  EXPECT_EQ(out, 0.25f);
}

TEST(Sum, MayWriteOverOneOfItsSources) {
  std::vector<float> a(5000), b(5000);
  for (size_t i = 0; i < a.size(); i++) a[i] = static_cast<float>(i), b[i] = 1;
  const void* sources[] = {a.data(), b.data()};
  void* outputs[] = {b.data(), a.data()};
  sum_in_rank_order({sources, 2, outputs, 2, a.size(), DType::float32}, best_cpu_path());
  for (size_t i = 0; i < a.size(); i++) ASSERT_EQ(a[i], static_cast<float>(i) + 1);
  EXPECT_EQ(a, b);
}

TEST(Sum, RefusesOtherTypes) {
  const void* source = nullptr;
  void* output = nullptr;
  EXPECT_THROW(sum_in_rank_order({&source, 1, &output, 1, 0, DType::int32}, CpuPath::portable), Error);
}

}  // namespace
}  // namespace sglang_symm
