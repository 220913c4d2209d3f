// The protocol of a call between CPU processes: headers, done flags, the abort record.
//
//   start     write my header into every peer's pad        (raises first if the group is broken)
//   arrive    wait for every peer's header, compare descriptors with the lowest rank's
//   finish    tell every peer that I touch its memory no more, wait until all have said so (two-shot, direct);
//             raises if the group broke meanwhile: a rank that gave up may have reused what was read from it
//
// Any wait that fails writes the abort record: the first to do so wins, and every rank raises the same sentence from
// it.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "memory/segment_cpu.h"
#include "rendezvous/peers.h"
#include "signal/pad.h"
#include "signal/wait.h"

namespace sglang_symm {

struct Deadlines {
  double first_seconds = 600;  // a group's first call: peers may still be importing or compiling
  double seconds = 60;
};

struct Call {
  uint64_t epoch;
  Descriptor descriptor;
  int parity() const { return static_cast<int>(epoch & 1); }
};

class SignalCpu {
 public:
  SignalCpu(std::string group, int rank, int world_size, const Deadlines& deadlines);
  int fd() const { return own_->fd(); }
  static size_t segment_bytes() { return (sizeof(Pad) + 4095) / 4096 * 4096; }
  void attach(int peer, Fd fd);

  Call start(const Descriptor& descriptor, uint64_t offset_in, uint64_t offset_out);
  void arrive(const Call& call);
  void finish(const Call& call);
  // Headers only: nobody returns before all have come. Returns every rank's offset.
  std::vector<uint64_t> exchange(const Descriptor& descriptor, uint64_t offset = kNoOffset);
  // A peer's header of this call; valid after arrive().
  const Header& header(const Call& call, int peer) const { return pad(rank_)->from[peer].header[call.parity()]; }

  // This rank's pad, and the record that all ranks raise from: for devices that poll and write host memory.
  Pad* own_pad() const { return pad(rank_); }
  const AbortRecord* abort_record() const { return &record(); }
  const Deadlines& deadlines() const { return deadlines_; }

  // From the watcher's thread.
  void on_peer(int peer, pid_t pid, PeerEvent event);
  // The sentence of the group's failure, empty while it is healthy.
  std::string failure() const;
  void check() const;  // raises failure()
  // One load: somebody has written the abort record.
  bool broken() const { return record().state.load(std::memory_order_acquire) != AbortRecord::kEmpty; }
  void require_healthy() const {
    if (broken()) check();
  }
  // The group is being destroyed by another thread of this rank: a call that waits raises.
  void close() { closing_.store(true, std::memory_order_release); }
  // A call that NCCL does for the group did not end well on this rank: breaks the group.
  void fail_call(AbortKind kind, const Descriptor& descriptor, uint64_t epoch, double seconds) const;
  // A header of this call cannot be true: breaks the group and raises.
  [[noreturn]] void damaged(const Call& call, int peer) const;
  // Cores that the attached ranks may run on, together: fewer than ranks, and waiting yields at once.
  int cores() const { return CPU_COUNT(&cores_); }
  int next_parity() const { return static_cast<int>((epoch_ + 1) & 1); }

 private:
  Pad* pad(int rank) const { return pads_[static_cast<size_t>(rank)]; }
  AbortRecord& record() const { return pad(0)->abort; }
  template <class Present>
  void await(const Call& call, const Present& present);
  void report(const AbortRecord& what, int reporter) const;
  uint32_t left() const { return pad(rank_)->left.load(std::memory_order_acquire); }
  std::string describe(const AbortRecord& record) const;

  std::string group_;
  int rank_;
  int world_size_;
  Deadlines deadlines_;
  cpu_set_t cores_{};  // of all ranks together: each may be bound to its own
  WaitPolicy policy_;
  std::unique_ptr<SegmentCpu> own_;
  std::array<std::unique_ptr<SegmentCpu>, kMaxWorldSize> peers_;
  std::array<Pad*, kMaxWorldSize> pads_{};
  std::atomic<bool> closing_{false};
  uint64_t epoch_ = 0;
  int64_t ask_ns_ = 0;  // when to ask next whether the user interrupts
  int64_t end_ns_ = 0;  // of the current call's waits together; 0 before the first that no longer spins
};

}  // namespace sglang_symm
