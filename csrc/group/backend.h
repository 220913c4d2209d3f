// What a device brings to a group: an arena, and collectives over it. One file a kind of device.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "collective/choose.h"
#include "collective/collectives.h"
#include "memory/arena.h"
#include "signal/signal_cpu.h"

namespace sglang_symm {

struct GroupConfig;

class Backend {
 public:
  virtual ~Backend() = default;

  virtual const std::shared_ptr<Arena>& arena() const = 0;
  virtual size_t slot_bytes() const = 0;
  // What all members must agree on, readable.
  virtual std::string settings() const = 0;
  virtual void attach(int peer, Fd fd) = 0;
  // Collective, once all peers are attached. nccl_id: rank 0's, for a group that owns an NCCL communicator.
  virtual std::unique_ptr<Collectives> connect(SignalCpu& signal, const std::string& nccl_id) = 0;
};

// "cpu", or "cuda:N" in a build with CUDA. Raises for anything else. Fills in what the device decides in `config`:
// an arena of 0 bytes becomes the device's default.
std::unique_ptr<Backend> make_backend(GroupConfig* config);
std::unique_ptr<Backend> make_cuda_backend(GroupConfig* config);

}  // namespace sglang_symm
