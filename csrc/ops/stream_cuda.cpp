// What the ops floor asks PyTorch about CUDA, and the allocator behind use_symmetric_memory on GPUs.
#include <c10/cuda/CUDAStream.h>

#include "memory/arena_cuda.h"
#include "ops/common.h"
#include "ops/ops.h"

namespace sglang_symm::ops {

Stream current_stream(const Group& group) {
  if (group.config().device == "cpu") return nullptr;
  const at::Device device(group.config().device);
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
}

}  // namespace sglang_symm::ops

// For torch.cuda.memory.CUDAPluggableAllocator: the segments of a torch.cuda.MemPool come from the arena of the group
// whose use_symmetric_memory this thread is inside of; ordinary memory when it is full and nothing is captured.
extern "C" __attribute__((visibility("default"))) void* sglang_symm_cuda_malloc(ssize_t bytes, int device,
                                                                                cudaStream_t stream) {
  using namespace sglang_symm;
  void* block = nullptr;
  if (Group* group = ops::current_cuda_group()) {
    try {
      block = group->allocate_output(static_cast<size_t>(bytes), /*required=*/false, stream);
    } catch (const Error&) {
      return nullptr;  // strict, or a capture: PyTorch raises its OutOfMemoryError
    }
    if (block != nullptr) return block;
    ops::warn_full_once(*group, static_cast<size_t>(bytes));
  }
  int before = -1;
  if (cudaGetDevice(&before) != cudaSuccess) return nullptr;
  (void)cudaSetDevice(device);
  if (cudaMalloc(&block, static_cast<size_t>(bytes)) != cudaSuccess) block = nullptr;
  (void)cudaGetLastError();
  (void)cudaSetDevice(before);
  return block;
}

extern "C" __attribute__((visibility("default"))) void sglang_symm_cuda_free(void* pointer, ssize_t, int,
                                                                             cudaStream_t) {
  if (pointer != nullptr && !sglang_symm::ArenaRegistry::instance().free(pointer)) (void)cudaFree(pointer);
}
