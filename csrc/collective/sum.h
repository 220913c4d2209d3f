// The arithmetic of every native reduction: out[i] = round(x_0[i] + x_1[i] + ... + x_{P-1}[i] (+ bias[i mod N])).
// fp32 accumulation, in rank order, one rounding to nearest even. One source, compiled for each instruction set; there
// is no multiplication to contract and no horizontal sum, so all of them give the same bits.
#pragma once

#include <cstddef>

#include "base/dtype.h"

namespace sglang_symm {

struct SumTask {
  const void* const* sources;  // [world_size] in rank order, each of `count` elements
  int world_size;
  void* const* outputs;  // each receives the result; an output may be one of the sources, element for element
  int output_count;
  size_t count;
  DType dtype;                 // float32, bfloat16 or float16
  const void* bias = nullptr;  // [bias_length], same dtype, or nullptr
  size_t bias_length = 0;
  size_t bias_start = 0;  // index in bias of element 0
};

enum class CpuPath { portable, avx2, avx512 };

CpuPath best_cpu_path();  // what this processor can do; SGLANG_SYMM_CPU=portable|avx2|avx512 lowers it
const char* name(CpuPath path);
void sum_in_rank_order(const SumTask& task, CpuPath path);

// Conversions, for tests.
float to_float(uint16_t bits, DType dtype);
uint16_t from_float(float value, DType dtype);

}  // namespace sglang_symm
