#include <algorithm>

#include "base/error.h"
#include "collective/collectives_cpu.h"
#include "group/backend.h"
#include "group/group.h"
#include "memory/segment_cpu.h"

namespace sglang_symm {

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kMaxSlot = 2 << 20;  // a round of two ranks stays in their second- and third-level caches

class BackendCpu final : public Backend {
 public:
  explicit BackendCpu(const GroupConfig& config)
      : rank_(config.rank),
        world_size_(config.world_size),
        arena_bytes_((config.arena_bytes + kPage - 1) / kPage * kPage),
        slot_bytes_(std::clamp(arena_bytes_ / 16 / kPage * kPage, kPage, kMaxSlot)) {
    auto segment = SegmentCpu::create(arena_bytes_, "sglang_symm arena " + config.name);
    segment->prefault(0, 2 * slot_bytes_);
    arena_ = std::make_shared<Arena>(std::move(segment), ArenaLayout{2 * slot_bytes_, arena_bytes_, 64}, rank_);
  }

  const std::shared_ptr<Arena>& arena() const override { return arena_; }
  size_t slot_bytes() const override { return slot_bytes_; }
  std::string settings() const override { return cat("arena_bytes=", arena_bytes_, " slot_bytes=", slot_bytes_); }
  void attach(int peer, Fd fd) override {
    auto segment = SegmentCpu::import(std::move(fd), arena_->bytes());
    segment->prefault(0, 2 * slot_bytes_);
    arena_->attach(peer, std::move(segment));
  }
  std::unique_ptr<Collectives> connect(SignalCpu& signal, const std::string&) override {
    return std::make_unique<CollectivesCpu>(*arena_, signal, rank_, world_size_, slot_bytes_, best_cpu_path());
  }

 private:
  int rank_;
  int world_size_;
  size_t arena_bytes_;
  size_t slot_bytes_;
  std::shared_ptr<Arena> arena_;
};

}  // namespace

std::unique_ptr<Backend> make_backend(GroupConfig* config) {
  if (config->device == "cpu") return std::make_unique<BackendCpu>(*config);
#ifdef SGLANG_SYMM_WITH_CUDA
  if (config->device.rfind("cuda:", 0) == 0) return make_cuda_backend(config);
  fail(ErrorKind::argument, "symmetric memory on device '", config->device, "', expected 'cpu' or 'cuda:N'");
#else
  fail(ErrorKind::argument, "symmetric memory on device '", config->device,
       "', expected 'cpu': this library was built without CUDA. Use communicator='process_group'");
#endif
}

}  // namespace sglang_symm
