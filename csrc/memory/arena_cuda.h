// An arena whose blocks come back in the order of streams: a block may be freed while kernels that use it are pending.
//
//   eager    The free memory belongs to one stream at a time. That stream allocates and frees at once; another one that
//            allocates first waits for it (by an event) and takes the free memory over. A block freed by a stream that
//            is not the owner rests until an event of that stream has passed.
//   capture  A block allocated while a graph is captured belongs to that graph. Freed during the capture, it serves the
//            same capture again; it returns to the heap when the tensor is freed and the graph is destroyed.
//
// A graph keeps the arena mapped: a replay after the group's end finds the broken word and leaves.
#pragma once

#include <cuda_runtime_api.h>

#include <unordered_map>
#include <vector>

#include "base/driver_cuda.h"
#include "memory/arena.h"

namespace sglang_symm {

class ArenaCuda final : public Arena, public std::enable_shared_from_this<ArenaCuda> {
 public:
  ArenaCuda(std::unique_ptr<Segment> own, const ArenaLayout& layout, int rank, int device);
  ~ArenaCuda() override;

  void* allocate(size_t bytes, Stream stream = nullptr) override;
  void free(void* pointer) override;
  uint64_t capture_in(Stream stream) const override;
  void retire() override;
  // The graph that is captured (if one is) uses this arena: keeps it until the graph is destroyed.
  void keep_for(const CaptureCuda& capture);
  // Gives up what graphs kept that have been destroyed. Called now and then, never from CUDA's own threads.
  static void collect_graphs();

 private:
  struct Block {
    cudaStream_t stream;
    unsigned long long capture;  // 0: eager
    size_t bytes;
    bool in_use;  // a tensor has it
  };
  struct Resting {
    size_t offset;
    cudaStream_t stream;
    cudaEvent_t event;  // nullptr: not recorded yet, the stream was being captured
  };
  // All with mutex_ held.
  void* allocate_captured(size_t bytes, cudaStream_t stream, const CaptureCuda& capture);
  bool take_over(cudaStream_t stream);
  void wake(cudaStream_t waiting);
  bool record(Resting* block);
  void graph_ended(unsigned long long capture);
  void keep_locked(const CaptureCuda& capture);

  int device_;
  cudaStream_t owner_ = nullptr;
  bool has_owner_ = false;
  std::unordered_map<size_t, Block> blocks_;  // by offset
  std::vector<Resting> resting_;
  std::vector<unsigned long long> graphs_;  // captures that are alive and keep this arena
};

}  // namespace sglang_symm
