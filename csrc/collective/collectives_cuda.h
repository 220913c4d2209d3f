// Collectives between GPUs of one host. Every call is one kernel in the caller's stream (a call larger than the slots
// is several); the host never waits. See kernels_cuda.h for the algorithms, pad_cuda.h for the protocol.
#pragma once

#include <memory>
#include <string>

#include "collective/collectives.h"
#include "collective/kernels_cuda.h"
#include "memory/arena_cuda.h"
#include "signal/signal_cpu.h"

namespace sglang_symm {

class CollectivesCuda : public Collectives {
 public:
  // Collective, once all peers are attached: clears the fixed part, then proves every window by writing into it and
  // reading from it. max_ctas: the SMs that kernels of this rank may fill, the same on all ranks.
  CollectivesCuda(std::string group, std::shared_ptr<ArenaCuda> arena, SignalCpu& signal, int device, int rank,
                  int world_size, const LayoutCuda& layout, int max_ctas);
  // Waits for the device, then marks the group as broken for graphs that may be replayed.
  ~CollectivesCuda() override;

  void all_reduce(const Descriptor& descriptor, const AllReduceArgs& args, Stream stream) override;
  void reduce_scatter(const Descriptor& descriptor, const void* in, void* out, std::span<const size_t> sizes,
                      Stream stream) override;
  void all_gather(const Descriptor& descriptor, const void* in, void* out, std::span<const size_t> bytes,
                  Stream stream) override;
  void broadcast(const Descriptor& descriptor, void* data, size_t bytes, int src, Stream stream) override;
  void announce(const Descriptor& descriptor, Stream stream) override;
  void drain() override;
  // two_shot_direct pushes x into the owners' staging memory; from here on they read it in this arena if it lies there.
  // That is slower over a link, and faster between ranks that share a GPU, whose memory x would pass twice more. A
  // rank's own affair.
  void let_peers_read() { peers_read_ = true; }
  // For a waiting kernel of a floor above: puts it behind the last one of this device, whatever stream that went to,
  // and returns what it needs of the group.
  CallCuda enter(const Descriptor& descriptor, cudaStream_t stream) {
    order(stream);
    return call(descriptor);
  }
  const LayoutCuda& layout() const { return layout_; }
  int device() const { return device_; }
  int max_ctas() const { return max_ctas_; }
  size_t arena_bytes() const { return arena_->bytes(); }
  std::vector<uint64_t> exchange(const Descriptor& descriptor, uint64_t offset) override {
    return signal_.exchange(descriptor, offset);
  }

 private:
  void prove_windows();
  PadCuda* pad(int rank) const { return reinterpret_cast<PadCuda*>(arena_->window(rank)); }
  CallCuda call(const Descriptor& descriptor) const;
  SumCuda sum(const Descriptor& descriptor) const;
  void copy(const Descriptor& descriptor, CopyCuda whole, bool direct, cudaStream_t stream);
  // Puts this call behind the last waiting kernel of this device, whatever stream that went to.
  void order(cudaStream_t stream);

  std::string group_;
  std::shared_ptr<ArenaCuda> arena_;
  SignalCpu& signal_;
  int device_;
  int rank_;
  int world_size_;
  LayoutCuda layout_;
  int max_ctas_;
  bool peers_read_ = false;
  CallCuda call_{};  // without what differs from call to call
  // Given up by a constructor that raises, too: else no group could be made at these addresses again.
  RegisteredHost own_pad_;
  RegisteredHost record_pad_;  // of the rank that has the abort record, unless it is this one
};

}  // namespace sglang_symm
