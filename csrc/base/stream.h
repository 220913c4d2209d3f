// The queue in whose order work is done and memory is used.
#pragma once

namespace sglang_symm {

// A cudaStream_t, without CUDA's headers. On the CPU there is one queue, the calling thread: always null.
using Stream = void*;

}  // namespace sglang_symm
