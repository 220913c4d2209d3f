// A group's NCCL communicator: made collectively, never waited for without end.
//
//   call      puts NCCL's kernels into a stream; returns once NCCL has done so (it may connect to peers first)
//   watch     a thread looks every few milliseconds: is the group broken, has a kernel not ended within the deadline,
//             does NCCL report an error? Then the group is broken for everybody and the communicator is aborted.
//
// Aborting sets the flag that NCCL's waiting kernels look at, so they leave, in a graph's replay too. NCCL frees its
// memory when the last graph that uses it is destroyed; it waits for that in a thread of its own.
//
// NCCL's symmetric kernels (those that a window brings) look at no flag: nothing but the end of the process ends one
// that waits for a dead peer. (Read in the sources of 2.28.9 and 2.30.7.) So a window is made when it is asked for
// only.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "base/clock.h"
#include "collective/library_nccl.h"
#include "signal/pad_cuda.h"
#include "signal/signal_cpu.h"

namespace sglang_symm {

class CommunicatorNccl {
 public:
  struct Members {
    std::string group;
    int rank, world_size, device;
  };
  // Words in host memory that the kernels around a call write (collective/bracket_cuda.h).
  struct Words {
    uint32_t begun, ended, one;
  };

  // Collective, with rank 0's nccl::UniqueId on all ranks. Raises ErrorKind::communication when it does not come up
  // within the first call's deadline, or NCCL refuses. `pad`: this device's.
  CommunicatorNccl(const Members& members, const nccl::UniqueId& id, SignalCpu& signal, PadCuda* pad);
  // Aborts: kernels in flight leave.
  ~CommunicatorNccl();
  CommunicatorNccl(const CommunicatorNccl&) = delete;
  CommunicatorNccl& operator=(const CommunicatorNccl&) = delete;

  // Collective: `memory` becomes a window of all ranks. Raises when there is no window afterwards.
  void register_window(void* memory, size_t bytes);

  // `enqueue` makes NCCL calls, between group_start and group_end, on the communicator that it is given.
  void call(const Descriptor& descriptor, bool captured, const std::function<int(nccl::Comm)>& enqueue);

  Words* words() const { return words_; }

 private:
  // Waits until NCCL has done what it was asked for with this `result`. Raises, having aborted, for an error, a broken
  // group or the deadline.
  void settle(int result, const std::string& what, const Deadline& deadline);
  void require(int result, const std::string& what);
  void watch();
  // With mutex_ held. The group is broken already, or ends. wait: for NCCL to have freed its memory, some seconds.
  void abort(bool wait);

  Members members_;
  const nccl::Library& nccl_;
  SignalCpu& signal_;
  PadCuda* pad_;
  Words* words_ = nullptr;
  cudaStream_t stream_ = nullptr;
  bool captured_ = false;  // by some graph, which may be alive still
  Descriptor last_;        // of the calls that this process has made

  std::mutex mutex_;
  nccl::Comm comm_ = nullptr;  // null: aborted

  std::mutex stop_mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;
  std::thread watcher_;
};

}  // namespace sglang_symm
