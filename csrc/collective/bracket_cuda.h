// The kernels around a call that somebody else's kernel does (NCCL): the protocol before it, the outcome behind it.
//
//   open    my header to every peer, every peer's header here, descriptors compared; `begun` = this call's epoch
//   close   `ended` = this call's epoch; NaN (all bits set) into the output of a group that is broken
//
// `begun` and `ended` are host memory: a host tells from them that the kernel in between does not end.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "signal/pad_cuda.h"

namespace sglang_symm {

struct BracketCuda {
  CallCuda call;
  uint32_t* begun;
  uint32_t* ended;
  void* out;
  size_t bytes;
};

void launch_open(const BracketCuda& bracket, cudaStream_t stream);
void launch_close(const BracketCuda& bracket, cudaStream_t stream);

}  // namespace sglang_symm
