#include "memory/arena_cuda.h"

#include <algorithm>

namespace sglang_symm {

namespace {

// What a graph holds. CUDA destroys it in a thread of its own, where no CUDA call is allowed: it is only noted down.
struct Kept {
  std::shared_ptr<ArenaCuda> arena;
  unsigned long long capture;
};

std::mutex ended_mutex;
std::vector<Kept>& ended() {
  static auto* list = new std::vector<Kept>();
  return *list;
}

void CUDART_CB on_graph_end(void* pointer) {
  auto* kept = static_cast<Kept*>(pointer);
  {
    const std::lock_guard lock(ended_mutex);
    ended().push_back(std::move(*kept));
  }
  delete kept;
}

}  // namespace

ArenaCuda::ArenaCuda(std::unique_ptr<Segment> own, const ArenaLayout& layout, int rank, int device)
    : Arena(std::move(own), layout, rank), device_(device) {}

ArenaCuda::~ArenaCuda() {
  for (const Resting& block : resting_) {
    if (block.event != nullptr) (void)cudaEventDestroy(block.event);
  }
}

void* ArenaCuda::allocate(size_t bytes, Stream handle) {
  const auto stream = static_cast<cudaStream_t>(handle);
  const DeviceScope scope(device_);
  const CaptureCuda capture = capture_of(stream);
  if (!capture) collect_graphs();
  const OutsideOfCaptures outside;
  const std::lock_guard lock(mutex_);
  if (capture) return allocate_captured(bytes, stream, capture);
  if (!take_over(stream)) return nullptr;
  auto offset = heap_.allocate(bytes);
  if (!offset && !resting_.empty()) {
    wake(stream);
    offset = heap_.allocate(bytes);
  }
  if (!offset) return nullptr;
  blocks_[*offset] = {stream, 0, bytes, true};
  return at(*offset);
}

uint64_t ArenaCuda::capture_in(Stream stream) const {
  const DeviceScope scope(device_);
  return capture_of(static_cast<cudaStream_t>(stream)).id;
}

void* ArenaCuda::allocate_captured(size_t bytes, cudaStream_t stream, const CaptureCuda& capture) {
  keep_locked(capture);
  auto best = blocks_.end();
  for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
    const Block& b = block->second;
    const bool fits = !b.in_use && b.capture == capture.id && b.stream == stream && b.bytes >= bytes;
    if (fits && (best == blocks_.end() || b.bytes < best->second.bytes)) best = block;
  }
  if (best != blocks_.end() && best->second.bytes <= 2 * std::max<size_t>(bytes, 512)) {
    best->second.in_use = true;
    return at(best->first);
  }
  const auto offset = heap_.allocate(bytes);
  if (!offset) return nullptr;
  blocks_[*offset] = {stream, capture.id, bytes, true};
  return at(*offset);
}

void ArenaCuda::free(void* pointer) {
  int before = -1;
  // A deleter must not raise, and at the process's end the driver may be gone.
  if (cudaGetDevice(&before) != cudaSuccess) return;
  const DeviceScope scope(device_, std::nothrow);
  const OutsideOfCaptures outside;
  const std::lock_guard lock(mutex_);
  const auto found = blocks_.find(offset(pointer));
  if (found == blocks_.end()) {
    heap_.free(offset(pointer));  // raises: not a live block
    return;
  }
  const Block block = found->second;
  if (block.capture != 0) {
    found->second.in_use = false;
    if (std::find(graphs_.begin(), graphs_.end(), block.capture) != graphs_.end()) return;  // the graph's still
    heap_.free(found->first);
    blocks_.erase(found);
    return;
  }
  const size_t place = found->first;
  blocks_.erase(found);
  if (has_owner_ && block.stream == owner_ && !retired_) {
    heap_.free(place);
    return;
  }
  Resting resting{place, block.stream, nullptr};
  if (record(&resting) && retired_) {
    (void)cudaEventSynchronize(resting.event);
    (void)cudaEventDestroy(resting.event);
    heap_.free(place);
  } else {
    resting_.push_back(resting);
  }
}

// The free memory is `stream`'s from here on. False when that cannot be said now.
bool ArenaCuda::take_over(cudaStream_t stream) {
  if (has_owner_ && owner_ != stream) {
    Resting mark{0, owner_, nullptr};
    if (!record(&mark)) return false;  // the owner is being captured by another thread
    const cudaError_t code = cudaStreamWaitEvent(stream, mark.event, 0);
    (void)cudaEventDestroy(mark.event);
    check_cuda(code, "cudaStreamWaitEvent");
  }
  owner_ = stream;
  has_owner_ = true;
  if (resting_.empty()) return true;
  // What has rested long enough.
  std::erase_if(resting_, [&](Resting& block) {
    if (block.event == nullptr && !record(&block)) return false;
    if (cudaEventQuery(block.event) != cudaSuccess) {
      (void)cudaGetLastError();
      return false;
    }
    (void)cudaEventDestroy(block.event);
    heap_.free(block.offset);
    return true;
  });
  return true;
}

// Makes `waiting` wait for everything that rests, and takes it back.
void ArenaCuda::wake(cudaStream_t waiting) {
  std::erase_if(resting_, [&](Resting& block) {
    if (block.event == nullptr && !record(&block)) return false;
    if (cudaStreamWaitEvent(waiting, block.event, 0) != cudaSuccess) {
      (void)cudaGetLastError();
      return false;
    }
    (void)cudaEventDestroy(block.event);
    heap_.free(block.offset);
    return true;
  });
}

bool ArenaCuda::record(Resting* block) {
  // Deleters ask too, and must not raise: when CUDA only repeats an older failure, the block rests for good.
  try {
    if (capture_of(block->stream)) return false;
  } catch (const Error&) {
    return false;
  }
  if (cudaEventCreateWithFlags(&block->event, cudaEventDisableTiming) != cudaSuccess) {
    (void)cudaGetLastError();
    block->event = nullptr;
    return false;
  }
  if (cudaEventRecord(block->event, block->stream) == cudaSuccess) return true;
  (void)cudaGetLastError();
  (void)cudaEventDestroy(block->event);
  block->event = nullptr;
  return false;
}

void ArenaCuda::keep_for(const CaptureCuda& capture) {
  if (!capture) return;
  const std::lock_guard lock(mutex_);
  keep_locked(capture);
}

void ArenaCuda::keep_locked(const CaptureCuda& capture) {
  if (std::find(graphs_.begin(), graphs_.end(), capture.id) != graphs_.end()) return;
  auto* kept = new Kept{shared_from_this(), capture.id};
  cudaUserObject_t object = nullptr;
  const cudaError_t created = cudaUserObjectCreate(&object, kept, on_graph_end, 1, cudaUserObjectNoDestructorSync);
  if (created != cudaSuccess) delete kept;
  check_cuda(created, "cudaUserObjectCreate");
  check_cuda(cudaGraphRetainUserObject(capture.graph, object, 1, cudaGraphUserObjectMove), "cudaGraphRetainUserObject");
  graphs_.push_back(capture.id);
}

void ArenaCuda::graph_ended(unsigned long long capture) {
  const std::lock_guard lock(mutex_);
  std::erase(graphs_, capture);
  std::erase_if(blocks_, [&](const auto& entry) {
    if (entry.second.capture != capture || entry.second.in_use) return false;
    heap_.free(entry.first);
    return true;
  });
}

void ArenaCuda::collect_graphs() {
  std::vector<Kept> gone;
  {
    const std::lock_guard lock(ended_mutex);
    if (ended().empty()) return;
    gone.swap(ended());
  }
  for (const Kept& kept : gone) kept.arena->graph_ended(kept.capture);
  gone.clear();
  ArenaRegistry::instance().collect();
}

void ArenaCuda::retire() {
  collect_graphs();  // nobody may allocate here again
  Arena::retire();
  const std::lock_guard lock(mutex_);
  int before = -1;
  if (cudaGetDevice(&before) != cudaSuccess) return;
  const DeviceScope scope(device_, std::nothrow);
  (void)cudaDeviceSynchronize();
  for (const Resting& block : resting_) {
    if (block.event != nullptr) (void)cudaEventDestroy(block.event);
    heap_.free(block.offset);
  }
  resting_.clear();
}

}  // namespace sglang_symm
