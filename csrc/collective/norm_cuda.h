// Residual and RMSNorm behind a sum over ranks, for each row of `columns` elements:
//
//   h = round(sum + residual)      sum: round(x_0 + x_1 + ... + x_{P-1}) in rank order, as every native sum
//   y = round(weight * round(h / sqrt(mean(h^2) + eps)))
//
//   all_reduce_norm   one kernel: one-shot push, then the norm of the row that a CTA has summed
//   norm              the second half alone, behind a sum that another kernel has left in memory
//
// Both give the same bits: who adds which squares in which order depends on `columns` and the dtype alone, not on the
// number of rows, the rank or where the tensors lie.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "signal/pad_cuda.h"

namespace sglang_symm {

struct NormCuda {
  CallCuda call;  // all_reduce_norm only
  DType dtype;
  const void* in;        // [rows, columns]: this rank's x, or the sum
  const void* residual;  // [rows, columns]
  const void* weight;    // [columns]
  void* y;               // [rows, columns]
  void* hidden;          // [rows, columns]: h
  uint32_t rows;
  uint32_t columns;
  float eps;
  size_t slots;  // offset in every arena: [2 parities][slot_bytes]
  size_t slot_bytes;
};

// Bytes that a rank pushes into each peer's slots: a row begins at a chunk of its own.
size_t norm_slot_bytes(size_t rows, size_t columns, DType dtype);

// A grid that waits: at most `max_ctas` CTAs. norm_slot_bytes <= the part of slot_bytes that one source has.
void launch_all_reduce_norm(const NormCuda& norm, int max_ctas, cudaStream_t stream);
// Programmatic launch: brought in while the kernel that makes the sum ends.
void launch_norm(const NormCuda& norm, cudaStream_t stream);

}  // namespace sglang_symm
