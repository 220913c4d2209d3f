// The fused kernel of few tokens: y = round(sum over ranks of round(x_r @ w_r^T) (+ bias)), sums in fp32 in rank order.
// What launches it; the kernel is in decode_sm90.cu and the headers that it includes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "fused/launch_cuda.h"
#include "signal/pad_cuda.h"

namespace sglang_symm {

struct DecodeCuda {
  CallCuda call;     // the descriptor's dtype is bfloat16 or float16
  void* y;           // [m, n], contiguous, 16-byte aligned
  const void* bias;  // [n], or nullptr
  // This rank's product [m, n], where the copy engine does not take its operands; else nullptr. Its peers' may be
  // computed here all the same: how a rank's tensors lie, and whether its k is a multiple of 8, is its own affair.
  const void* partial;
  int m, n;
  int k_steps;  // stages of columns
  int stages;
  int tiles;
  int parts;  // of k: 1, or 2 CTAs of a cluster to a tile
  bool two_shot;
  // No kernel that is in flight writes the weight: it is fetched while the previous kernel ends.
  bool static_weight;
  size_t slots;  // offset in every arena: [2 parities][slot_bytes]
  size_t slot_bytes;
};

// Puts the kernel into the stream. x [m, k], weight [n, k] (any two matrices with a partial); `args` without k_steps,
// stages, tiles, parts and two_shot, which `config` gives.
void launch_decode(const GemmConfig& config, DecodeCuda args, const MatrixCuda& x, const MatrixCuda& weight,
                   cudaStream_t stream);

}  // namespace sglang_symm
