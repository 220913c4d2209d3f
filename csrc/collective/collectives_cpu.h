// Collectives between CPU processes. A call larger than the slots is several calls of the protocol (rounds), whose
// number depends on what all ranks know to be equal; whether a rank's tensor lies in its arena only decides if it is
// staged.
//
//   one_shot          copy x into my slot | headers | sum everybody's slot -> out
//   two_shot(_direct) (stage x)           | headers | sum my share of everybody's x -> everybody's out | done |
//   (unstage)
//
// Shared memory needs one copy of the data, not one a peer: a slot lies in its sender's arena and all peers read it
// there. In two_shot the owner of a share reads it from everybody and writes the result to everybody, so nobody waits
// twice: the done flags say at once that my result is complete and that my input is no longer read.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "collective/collectives.h"
#include "collective/sum.h"
#include "memory/arena.h"
#include "signal/signal_cpu.h"

namespace sglang_symm {

class CollectivesCpu final : public Collectives {
 public:
  CollectivesCpu(Arena& arena, SignalCpu& signal, int rank, int world_size, size_t slot_bytes, CpuPath path);

  void all_reduce(const Descriptor& descriptor, const AllReduceArgs& args, Stream = nullptr) override;
  void reduce_scatter(const Descriptor& descriptor, const void* in, void* out, std::span<const size_t> sizes,
                      Stream = nullptr) override;
  void all_gather(const Descriptor& descriptor, const void* in, void* out, std::span<const size_t> bytes,
                  Stream = nullptr) override;
  void broadcast(const Descriptor& descriptor, void* data, size_t bytes, int src, Stream = nullptr) override;
  void announce(const Descriptor& descriptor, Stream = nullptr) override { exchange(descriptor); }
  std::vector<uint64_t> exchange(const Descriptor& descriptor, uint64_t offset = kNoOffset) override {
    return signal_.exchange(descriptor, offset);
  }

 private:
  std::byte* slot() const;  // this rank's, of the next call's parity
  std::byte* at(const Call& call, int peer, uint64_t offset, size_t bytes) const;
  uint64_t stage(const void* in, size_t bytes, bool direct);
  void one_shot_round(const Descriptor& descriptor, const AllReduceArgs& round, size_t bias_start);
  void two_shot_round(const Descriptor& descriptor, const AllReduceArgs& round, size_t bias_start);

  Arena& arena_;
  SignalCpu& signal_;
  int rank_;
  int world_size_;
  size_t slot_bytes_;
  CpuPath path_;
};

}  // namespace sglang_symm
