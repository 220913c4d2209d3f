// The fused kernel of few tokens: y = round(sum over ranks of round(x_r @ w_r^T) (+ bias)), sums in fp32 in rank order.
// What launches it; the kernel is in decode_sm90.cu and the headers that it includes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "fused/gemm_config.h"
#include "signal/pad_cuda.h"

namespace sglang_symm {

// A row-major matrix of 16-bit elements as the copy engine takes it: address and stride are multiples of 16 bytes.
struct MatrixCuda {
  const void* data;
  int64_t rows, columns;
  int64_t row_stride;  // elements
};

struct DecodeCuda {
  CallCuda call;     // the descriptor's dtype is bfloat16 or float16
  void* y;           // [m, n], contiguous, 16-byte aligned
  const void* bias;  // [n], or nullptr
  int m, n;
  int k_steps;  // stages of columns
  int stages;
  int tiles;
  bool two_shot;
  // No kernel that is in flight writes the weight: it is fetched while the previous kernel ends.
  bool static_weight;
  size_t slots;  // offset in every arena: [2 parities][slot_bytes]
  size_t slot_bytes;
};

// Puts the kernel into the stream. x [m, k], weight [n, k]; `args` without k_steps, stages, tiles and two_shot, which
// `config` gives.
void launch_decode(const GemmConfig& config, DecodeCuda args, const MatrixCuda& x, const MatrixCuda& weight,
                   cudaStream_t stream);

}  // namespace sglang_symm
