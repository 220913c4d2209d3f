// A group: an ordered set of ranks that communicate. It has a name, an arena, pads, a watcher, counters.
//
//   listen()   this rank's arena, pad and socket        ->  an address, exchanged through the store (in Python)
//   connect()  collective: peers' segments are mapped, the watcher starts
//   calls      serialised by `order`; a group's calls are ordered
//   ~Group     says `bye`; the arena lives on until its last tensor is freed
//
// A group of communicator `process_group` has none of these but the name: its ops fall back to torch.distributed.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/process.h"
#include "collective/choose.h"
#include "collective/collectives.h"
#include "group/backend.h"
#include "memory/arena.h"
#include "rendezvous/peers.h"
#include "signal/signal_cpu.h"

namespace sglang_symm {

struct GroupConfig {
  std::string name;
  std::string device = "cpu";
  int rank = 0;
  int world_size = 1;
  size_t arena_bytes = 0;
  std::string process_group;           // c10d name, for fallbacks; empty for none
  bool process_group_on_host = false;  // Gloo with a GPU's tensors
  bool symmetric = true;               // communicator: symm or process_group
  bool strict = false;                 // a full arena is an error instead of ordinary memory
  bool nccl_window = false;            // the arena becomes a window of the group's NCCL communicator (agreed.nccl)
  Deadlines deadlines;
  Agreed agreed;
  bool tuned = false;  // agreed.tuning was given; else the built-in one of the device goes there

  // Reads "key=value" pairs: timeout, first_timeout, algo, pinned, strict, tuning, nccl. An unknown key or a bad value
  // is an error.
  void apply(const std::vector<std::string>& settings);
};

struct Counters {
  std::atomic<uint64_t> calls{0};
  std::array<std::atomic<uint64_t>, kAlgorithms> by_algorithm{};
  std::atomic<uint64_t> outputs_inside{0};
  std::atomic<uint64_t> outputs_outside{0};
  std::atomic<uint64_t> fused{0};   // of `calls`: the reduction in one kernel with a GEMM
  std::atomic<uint64_t> normed{0};  // of `calls`: in one kernel with a norm
  std::atomic<bool> warned_full{false};
  std::atomic<size_t> warned_arena{0};   // bytes: calls that need no more are not told of again
  std::atomic<bool> warned_none{false};  // that there are calls for which no arena is large enough
};

class Group {
 public:
  explicit Group(const GroupConfig& config);
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  std::string address() const;
  // nccl_id: rank 0's, in a group with agreed.nccl.
  void connect(const std::vector<std::string>& addresses, const std::string& nccl_id = "");

  const GroupConfig& config() const { return config_; }
  bool symmetric() const { return config_.symmetric; }
  int rank() const { return config_.rank; }
  int world_size() const { return config_.world_size; }
  const std::shared_ptr<Arena>& arena() const { return arena_; }
  Collectives& collectives();  // raises before connect() and for process_group
  // The sentence of the group's failure, empty while it is healthy.
  std::string failure() const;
  // The process group failed under a call of this group: breaks it for this rank and raises.
  [[noreturn]] void fail_process_group(const Descriptor& descriptor, const std::string& reason);
  void check() const;

  // One call at a time; held for the whole of a call.
  std::mutex order;
  Counters counters;

  // This process made it and is no fork of the one that did: a child shares the arena, its calls would corrupt it.
  bool owned_by_this_process() const { return generation_ == fork_generation(); }
  // A call of another thread that waits for peers raises: the group is about to be destroyed.
  void close();

  // A block for an op's output, or nullptr when it must be ordinary memory (full, or no arena). Counts it. In strict
  // mode, in a graph capture, and for `required`, a full arena raises ErrorKind::out_of_memory instead.
  void* allocate_output(size_t bytes, bool required, Stream stream = nullptr);
  // The sentence of a full arena.
  std::string describe_full(size_t bytes) const;
  std::string agreed_text() const;  // what all members must agree on
  std::string info_json() const;

 private:
  const uint64_t generation_ = fork_generation();
  mutable std::mutex failed_mutex_;
  std::string failed_;  // by the process group
  std::atomic<bool> process_group_failed_{false};
  GroupConfig config_;
  std::unique_ptr<Backend> backend_;
  std::shared_ptr<Arena> arena_;
  std::unique_ptr<SignalCpu> signal_;
  std::unique_ptr<Rendezvous> rendezvous_;
  std::unique_ptr<Watcher> watcher_;  // calls signal_: destroyed first, hence declared after it
  std::unique_ptr<Collectives> collectives_;
};

// The groups of this process by name.
class GroupRegistry {
 public:
  static GroupRegistry& instance();
  void add(std::shared_ptr<Group> group);
  // Raises for a name that is none, naming the groups that there are, and for a group of a process that this one was
  // forked from.
  std::shared_ptr<Group> find(const std::string& name) const;
  std::shared_ptr<Group> remove(const std::string& name);

 private:
  std::shared_ptr<Group> find_any(const std::string& name) const;

  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<Group>> groups_;
};

}  // namespace sglang_symm
