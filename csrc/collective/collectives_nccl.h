// Collectives of a group on GPUs that owns an NCCL communicator: Algorithm::nccl through it, all else as the others.
//
// A call is three launches: the protocol's header exchange (so a missing, late or disagreeing rank is found, by name,
// before NCCL would wait for it), NCCL's kernel, and a small one that notes the end.
#pragma once

#include "collective/collectives_cuda.h"
#include "collective/communicator_nccl.h"

namespace sglang_symm {

class CollectivesNccl final : public CollectivesCuda {
 public:
  struct Options {
    std::string unique_id;  // as nccl_unique_id() gave it to rank 0
    bool window;            // the arena becomes NCCL's window
  };

  CollectivesNccl(const Options& options, const CommunicatorNccl::Members& members,
                  const std::shared_ptr<ArenaCuda>& arena, SignalCpu& signal, const LayoutCuda& layout, int max_ctas);
  // Waits for the device; the watching thread bounds that.
  ~CollectivesNccl() override;

  void all_reduce(const Descriptor& descriptor, const AllReduceArgs& args, Stream stream) override;
  void reduce_scatter(const Descriptor& descriptor, const void* in, void* out, std::span<const size_t> sizes,
                      Stream stream) override;
  void all_gather(const Descriptor& descriptor, const void* in, void* out, std::span<const size_t> bytes,
                  Stream stream) override;
  void broadcast(const Descriptor& descriptor, void* data, size_t bytes, int src, Stream stream) override;

 private:
  // `out`, of `bytes`: what a broken group's call fills with NaN. `empty`: there is nothing for NCCL to do.
  void call(const Descriptor& descriptor, void* out, size_t bytes, bool empty, Stream stream,
            const std::function<int(nccl::Comm, cudaStream_t)>& enqueue);

  int rank_;
  std::unique_ptr<CommunicatorNccl> communicator_;
};

// Rank 0's, for all ranks of one communicator: hexadecimal digits.
std::string nccl_unique_id();

}  // namespace sglang_symm
