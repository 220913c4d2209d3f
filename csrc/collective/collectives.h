// A group's collectives, whatever its device: the contract that the ops floor calls.
//
// The descriptor names the algorithm; it is what all ranks must agree on. On the CPU a call returns when it is done;
// on CUDA it is put into `stream`, and errors that only the device can see show at the group's next check().
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/dtype.h"
#include "base/stream.h"
#include "signal/descriptor.h"
#include "signal/pad.h"

namespace sglang_symm {

struct AllReduceArgs {
  const void* in;
  void* out;  // may be `in`
  size_t count;
  DType dtype;
  const void* bias = nullptr;  // [bias_length], added once, before the rounding
  size_t bias_length = 0;
};

class Collectives {
 public:
  virtual ~Collectives() = default;

  virtual void all_reduce(const Descriptor& descriptor, const AllReduceArgs& args, Stream stream = nullptr) = 0;
  // in: the ranks' parts one after another, part r of sizes[r] elements; out: my part's sum.
  virtual void reduce_scatter(const Descriptor& descriptor, const void* in, void* out, std::span<const size_t> sizes,
                              Stream stream = nullptr) = 0;
  // out: the ranks' contributions one after another, contribution r of bytes[r].
  virtual void all_gather(const Descriptor& descriptor, const void* in, void* out, std::span<const size_t> bytes,
                          Stream stream = nullptr) = 0;
  virtual void broadcast(const Descriptor& descriptor, void* data, size_t bytes, int src, Stream stream = nullptr) = 0;
  // Headers only, in the stream's order: a barrier, and what goes before a call of the process group.
  virtual void announce(const Descriptor& descriptor, Stream stream = nullptr) = 0;
  // Headers only, between the hosts: returns every rank's offset, and when all have come.
  virtual std::vector<uint64_t> exchange(const Descriptor& descriptor, uint64_t offset = kNoOffset) = 0;
  // Waits until the device has done what this process has put into its streams.
  virtual void drain() {}
};

}  // namespace sglang_symm
