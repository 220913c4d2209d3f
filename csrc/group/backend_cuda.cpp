#include <algorithm>
#include <cstdlib>

#include "base/driver_cuda.h"
#include "collective/collectives_nccl.h"
#include "group/backend.h"
#include "group/group.h"
#include "memory/arena_cuda.h"
#include "memory/segment_cuda.h"

namespace sglang_symm {

namespace {

constexpr size_t kDefaultArena = size_t{512} << 20;
constexpr size_t kAlignment = 512;  // as PyTorch's allocator

int device_index(const std::string& device) {
  char* end = nullptr;
  const long index = std::strtol(device.c_str() + 5, &end, 10);
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  if (*end != 0 || device.size() == 5 || index < 0 || index >= count) {
    fail(ErrorKind::argument, "device '", device, "', expected cuda:0 to cuda:", count - 1);
  }
  return static_cast<int>(index);
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

// A grid that waits must be resident as a whole, hence fit the SMs that the rank may fill. Ranks that share a GPU
// (tools/mps_rig) own a part of it each and say so here.
int usable_sms(int device) {
  const int all = attribute(cudaDevAttrMultiProcessorCount, device);
  const char* text = std::getenv("SGLANG_SYMM_SMS");
  if (text == nullptr || *text == 0) return all;
  char* end = nullptr;
  const long sms = std::strtol(text, &end, 10);
  if (*end != 0 || sms < 1 || sms > all) {
    fail(ErrorKind::argument, "SGLANG_SYMM_SMS='", text, "', expected 1 to ", all, ", the SMs of cuda:", device);
  }
  return static_cast<int>(sms);
}

class BackendCuda final : public Backend {
 public:
  explicit BackendCuda(GroupConfig* config)
      : name_(config->name),
        rank_(config->rank),
        world_size_(config->world_size),
        nccl_(config->agreed.nccl),
        nccl_window_(config->nccl_window) {
    ArenaCuda::collect_graphs();  // memory that nothing needs any more
    device_ = device_index(config->device);
    if (attribute(cudaDevAttrComputeCapabilityMajor, device_) < 9) {
      fail(ErrorKind::argument, "symmetric memory on ", config->device, ", whose compute capability is ",
           attribute(cudaDevAttrComputeCapabilityMajor, device_), ".",
           attribute(cudaDevAttrComputeCapabilityMinor, device_),
           ": expected 9.0 (Hopper) or newer. Use communicator='process_group'");
    }
    if (config->arena_bytes == 0) {
      const DeviceScope scope(device_);
      size_t free = 0, total = 0;
      check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
      config->arena_bytes = std::min(kDefaultArena, total / 64);
    }
    const size_t bytes = SegmentCuda::rounded(device_, std::max(config->arena_bytes, kMinArena));
    layout_ = LayoutCuda::of(bytes, world_size_);
    max_ctas_ = usable_sms(device_);
    arena_ = std::make_shared<ArenaCuda>(SegmentCuda::create(device_, bytes),
                                         ArenaLayout{layout_.heap, bytes, kAlignment}, rank_, device_);
    base_ = arena_;
  }

  const std::shared_ptr<Arena>& arena() const override { return base_; }
  size_t slot_bytes() const override { return layout_.slot_bytes; }
  std::string settings() const override {
    return cat("arena_bytes=", arena_->bytes(), " slot_bytes=", layout_.slot_bytes, " max_ctas=", max_ctas_);
  }
  void attach(int peer, Fd fd) override {
    arena_->attach(peer, SegmentCuda::import(device_, std::move(fd), arena_->bytes(), peer));
  }
  std::unique_ptr<Collectives> connect(SignalCpu& signal, const std::string& nccl_id) override {
    std::unique_ptr<CollectivesCuda> made;
    if (nccl_) {
      const CollectivesNccl::Options options{nccl_id, nccl_window_};
      const CommunicatorNccl::Members members{name_, rank_, world_size_, device_};
      made = std::make_unique<CollectivesNccl>(options, members, arena_, signal, layout_, max_ctas_);
    } else {
      made = std::make_unique<CollectivesCuda>(name_, arena_, signal, device_, rank_, world_size_, layout_, max_ctas_);
    }
    const bool shares_gpu = max_ctas_ < attribute(cudaDevAttrMultiProcessorCount, device_);
    if (shares_gpu) made->let_peers_read();
    return made;
  }

 private:
  static constexpr size_t kMinArena = size_t{4} << 20;  // the pad and slots of 16 ranks, and something to hand out

  std::string name_;
  int rank_;
  int world_size_;
  bool nccl_;
  bool nccl_window_;
  int device_ = 0;
  int max_ctas_ = 1;
  LayoutCuda layout_{};
  std::shared_ptr<ArenaCuda> arena_;
  std::shared_ptr<Arena> base_;
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(GroupConfig* config) {
  return std::make_unique<BackendCuda>(config);
}

}  // namespace sglang_symm
