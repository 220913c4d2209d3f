#include "signal/signal_cpu.h"

#include <sched.h>

#include "base/error.h"
#include "base/process.h"

namespace sglang_symm {

namespace {

constexpr int64_t kAskInterruptNs = 100'000'000;

cpu_set_t usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof set, &set);  // fails on more than CPU_SETSIZE processors: then as if there were none
  return set;
}

std::string ranks_of(uint32_t mask) {
  std::string text;
  for (int r = 0; r < kMaxWorldSize; r++) {
    if ((mask >> r & 1) != 0) text += (text.empty() ? "" : ", ") + std::to_string(r);
  }
  return text;
}

}  // namespace

SignalCpu::SignalCpu(std::string group, int rank, int world_size, const Deadlines& deadlines)
    : group_(std::move(group)),
      rank_(rank),
      world_size_(world_size),
      deadlines_(deadlines),
      cores_(usable_cores()),
      policy_(WaitPolicy::for_ranks(world_size, CPU_COUNT(&cores_))),
      own_(SegmentCpu::create(segment_bytes(), "sglang_symm pad " + group_)) {
  pads_[static_cast<size_t>(rank)] = reinterpret_cast<Pad*>(own_->data());  // zero-filled: epoch 0 was never a call
  own_pad()->cores = cores_;
}

void SignalCpu::attach(int peer, Fd fd) {
  auto& segment = peers_[static_cast<size_t>(peer)];
  segment = SegmentCpu::import(std::move(fd), segment_bytes());
  pads_[static_cast<size_t>(peer)] = reinterpret_cast<Pad*>(segment->data());
  CPU_OR(&cores_, &cores_, &pad(peer)->cores);
  policy_ = WaitPolicy::for_ranks(world_size_, CPU_COUNT(&cores_));
}

Call SignalCpu::start(const Descriptor& descriptor, uint64_t offset_in, uint64_t offset_out) {
  require_healthy();
  const Call call{++epoch_, descriptor};
  end_ns_ = 0;
  for (int step = 1; step < world_size_; step++) {  // the next rank first: not everybody writes to rank 0 at once
    Header& header = pad((rank_ + step) % world_size_)->from[rank_].header[call.parity()];
    header.offset_in = offset_in;
    header.offset_out = offset_out;
    header.descriptor = descriptor;
    header.epoch.store(call.epoch, std::memory_order_release);
  }
  return call;
}

template <class Present>
void SignalCpu::await(const Call& call, const Present& present) {
  for (int step = 1; step < world_size_; step++) {
    const int peer = (rank_ + step) % world_size_;
    bool stop = false;
    const double seconds = call.epoch == 1 ? deadlines_.first_seconds : deadlines_.seconds;
    const auto give_up = [&] {
      if (broken() || (left() >> peer & 1) != 0 || closing_.load(std::memory_order_acquire)) return true;
      const int64_t now = now_ns();
      if (end_ns_ == 0) {
        end_ns_ = now + static_cast<int64_t>(seconds * 1e9);
        ask_ns_ = now + kAskInterruptNs;
      }
      if (now >= ask_ns_) {  // seldom: asking takes the interpreter's lock
        ask_ns_ = now + kAskInterruptNs;
        stop = interrupted();
      }
      return stop || now >= end_ns_;
    };
    if (wait_until(
            policy_, [&] { return present(peer); }, give_up))
      continue;

    if (closing_.load(std::memory_order_acquire)) {
      AbortRecord
          gone{};  // written before this rank raises: a peer that still reads its tensor must not end the call well
      gone.kind = AbortKind::left;
      gone.culprits = 1u << rank_;
      gone.epoch = call.epoch;
      gone.expected = call.descriptor;
      report(gone, rank_);
      fail(ErrorKind::communication, "group '", group_, "' was destroyed by another thread of rank ", rank_,
           " while it waited for rank ", peer, " in call ", call.epoch, ", ", to_string(call.descriptor));
    }
    AbortRecord what{};
    what.kind = (left() >> peer & 1) != 0 ? AbortKind::left : AbortKind::missing;
    for (int r = 0; r < world_size_; r++) {
      const bool counts = what.kind == AbortKind::missing || (left() >> r & 1) != 0;
      if (r != rank_ && counts && !present(r)) what.culprits |= 1u << r;
    }
    if (what.culprits == 0 && !broken()) {  // they came between the last look and this one
      step--;
      continue;
    }
    if (stop) what.kind = AbortKind::interrupted;
    what.epoch = call.epoch;
    what.seconds = seconds;
    what.expected = call.descriptor;
    report(what, rank_);
    check();
  }
}

void SignalCpu::arrive(const Call& call) {
  await(call, [&](int peer) { return header(call, peer).epoch.load(std::memory_order_acquire) == call.epoch; });
  const auto descriptor_of = [&](int r) { return r == rank_ ? call.descriptor : header(call, r).descriptor; };
  const Descriptor reference = descriptor_of(0);
  for (int r = 1; r < world_size_; r++) {
    if (descriptor_of(r) == reference) continue;
    AbortRecord what{};  // every rank sees the same headers, hence reports the same
    what.kind = AbortKind::disagree;
    what.culprits = 1u << r;
    what.epoch = call.epoch;
    what.expected = reference;
    what.got = descriptor_of(r);
    report(what, rank_);
    check();
  }
}

void SignalCpu::finish(const Call& call) {
  for (int step = 1; step < world_size_; step++) {
    pad((rank_ + step) % world_size_)->from[rank_].done.store(call.epoch, std::memory_order_release);
  }
  await(call, [&](int peer) { return pad(rank_)->from[peer].done.load(std::memory_order_acquire) >= call.epoch; });
  // All done flags are there, but a rank that gave up in this call (a third one had died, or was late) may have raised
  // and reused its tensor while I still read it. It wrote the abort record before it raised.
  require_healthy();
}

void SignalCpu::damaged(const Call& call, int peer) const {
  AbortRecord what{};
  what.kind = AbortKind::damaged;
  what.culprits = 1u << peer;
  what.epoch = call.epoch;
  what.expected = call.descriptor;
  report(what, rank_);
  check();
  fail(ErrorKind::communication, "group '", group_, "': a damaged header of rank ", peer);
}

void SignalCpu::fail_call(AbortKind kind, const Descriptor& descriptor, uint64_t epoch, double seconds) const {
  AbortRecord what{};
  what.kind = kind;
  what.culprits = 1u << rank_;
  what.epoch = epoch;
  what.seconds = seconds;
  what.expected = descriptor;
  report(what, rank_);
}

std::vector<uint64_t> SignalCpu::exchange(const Descriptor& descriptor, uint64_t offset) {
  std::vector<uint64_t> offsets(static_cast<size_t>(world_size_), offset);
  if (world_size_ == 1) return offsets;
  const Call call = start(descriptor, offset, kNoOffset);
  arrive(call);
  for (int r = 0; r < world_size_; r++) {
    if (r != rank_) offsets[static_cast<size_t>(r)] = header(call, r).offset_in;
  }
  return offsets;
}

void SignalCpu::on_peer(int peer, pid_t pid, PeerEvent event) {
  if (event == PeerEvent::left) {
    // No death: an error only for somebody who waits for it.
    own_pad()->left.fetch_or(1u << peer, std::memory_order_release);
    return;
  }
  AbortRecord what{};
  what.kind = AbortKind::died;
  what.culprits = 1u << peer;
  what.pid = static_cast<uint64_t>(pid);
  report(what, rank_);
}

void SignalCpu::report(const AbortRecord& what, int reporter) const {
  AbortRecord& target = record();
  uint32_t state = AbortRecord::kEmpty;
  if (!target.state.compare_exchange_strong(state, AbortRecord::kBeingWritten, std::memory_order_acq_rel)) return;
  target.kind = what.kind;
  target.reporter = static_cast<uint32_t>(reporter);
  target.culprits = what.culprits;
  target.epoch = what.epoch;
  target.pid = what.pid;
  target.seconds = what.seconds;
  target.expected = what.expected;
  target.got = what.got;
  // Fails when a reader has lost patience: then nobody reads these fields, this rank neither.
  state = AbortRecord::kBeingWritten;
  target.state.compare_exchange_strong(state, AbortRecord::kComplete, std::memory_order_acq_rel);
}

std::string SignalCpu::failure() const {
  if (pad(0) == nullptr) return "";  // not connected yet
  const AbortRecord& found = record();
  if (found.state.load(std::memory_order_acquire) == AbortRecord::kEmpty) {
    // A device can write only its own rank's record; whichever host sees it first hands it on.
    for (int r = 0; r < world_size_; r++) {
      const Pad* of_rank = pad(r);
      if (of_rank == nullptr || of_rank->device.state.load(std::memory_order_acquire) != AbortRecord::kComplete)
        continue;
      report(of_rank->device, r);
      break;
    }
    if (found.state.load(std::memory_order_acquire) == AbortRecord::kEmpty) return "";
  }
  // Its writer needs nanoseconds. Should it have stopped in between, all ranks agree to read none of it.
  const Deadline patience(1.0);
  while (found.state.load(std::memory_order_acquire) == AbortRecord::kBeingWritten) {
    uint32_t state = AbortRecord::kBeingWritten;
    if (patience.passed()) record().state.compare_exchange_strong(state, AbortRecord::kAbandoned);
    sched_yield();
  }
  return describe(found);
}

void SignalCpu::check() const {
  const std::string sentence = failure();
  if (!sentence.empty()) throw Error(ErrorKind::communication, sentence);
}

std::string SignalCpu::describe(const AbortRecord& found) const {
  const std::string head = cat("sglang_symm: group '", group_, "' (", world_size_, " ranks) is broken: ");
  const std::string tail = ". destroy() the group and create it again to go on";
  if (found.state.load(std::memory_order_acquire) == AbortRecord::kAbandoned) {
    return cat(head, "a rank noticed a failure and stopped or died while it reported it", tail);
  }
  const std::string who = ranks_of(found.culprits);
  switch (found.kind) {
    case AbortKind::disagree:
      return cat(head, "ranks disagree in call ", found.epoch, ": rank 0 called ", to_string(found.expected), ", rank ",
                 who, " called ", to_string(found.got),
                 ". Every rank of a group makes the same calls in the same order", tail);
    case AbortKind::died:
      return cat(head, "rank ", who, " died (process ", found.pid, " ended without destroying the group)", tail);
    case AbortKind::left:
      return cat(head, "rank(s) ", who, " left: destroyed the group or exited before call ", found.epoch, ", ",
                 to_string(found.expected), ", in which rank ", found.reporter, " waits for them", tail);
    case AbortKind::interrupted:
      return cat(head, "rank ", found.reporter, " was interrupted (Ctrl-C) while it waited for rank(s) ", who,
                 " in call ", found.epoch, ", ", to_string(found.expected), tail);
    case AbortKind::damaged:
      return cat(head, "rank ", who, " sent an offset outside of its arena in call ", found.epoch, ", ",
                 to_string(found.expected), ": its memory or the group's was overwritten", tail);
    case AbortKind::unfinished:
      return cat(head, "NCCL's kernel of call ", found.epoch, ", ", to_string(found.expected), ", did not end within ",
                 found.seconds, " s on rank ", found.reporter,
                 ", though every rank had begun the call. Is a rank stopped or stuck?", tail);
    case AbortKind::refused:
      return cat(head, "NCCL failed on rank ", found.reporter,
                 found.epoch == 0 ? " when its communicator was made" : "",
                 found.epoch == 0 ? "" : cat(" after call ", found.epoch, ", ", to_string(found.expected)),
                 "; that rank's exception says why, NCCL_DEBUG=WARN more", tail);
    case AbortKind::unmade:
      return cat(head, "rank ", who, " failed while the group was made; that rank's exception says why", tail);
    default:
      return cat(
          head, "rank(s) ", who, " did not arrive within ", found.seconds, " s in call ", found.epoch, ", ",
          to_string(found.expected), ", in which rank ", found.reporter, " waits for them. Stopped, stuck or on ",
          "another code path? A longer deadline: timeout=, SGLANG_SYMM_TIMEOUT, SGLANG_SYMM_FIRST_TIMEOUT", tail);
  }
}

}  // namespace sglang_symm
