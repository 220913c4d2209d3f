// The words that ranks write to each other. One table; every writer and reader of a word is named here.
//
//   word                         written by                     read by     at rest            scope
//   from[s].header[p].epoch      rank s, in call e, p = e & 1   the owner   e of an old call   release / acquire
//   from[s].header[p].(others)   rank s, before the epoch       the owner   -                  ordered by the epoch
//   from[s].done                 rank s, when it no longer      the owner   e of an old call   release / acquire
//                                touches any peer's memory
//   abort (rank 0's pad only)    any rank, once (CAS)           every rank  state == empty     acq_rel / acquire
//   device                       the owner's GPU, once          every rank  state == empty     release / acquire
//   left                         the owner's watcher            the owner   0                  release / acquire
//   cores                        the owner, when it is made     every rank  -                  ordered by the
//   rendezvous
//
// Two parities are enough: a call ends only when it holds every peer's header of the same epoch. So a rank in call n +
// 2 knows that each peer has begun n + 1, hence has finished n and reads nothing of parity n any more. docs/protocol.md
// has the whole argument. The pads lie in a segment of their own, in host memory for CPU groups.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

#include "base/dtype.h"
#include "signal/descriptor.h"

namespace sglang_symm {

constexpr uint64_t kNoOffset = ~uint64_t{0};

struct alignas(64) Header {
  std::atomic<uint64_t> epoch;
  uint64_t offset_in;   // where the sender's data lies in its arena, kNoOffset when there is none
  uint64_t offset_out;  // where the sender wants its result
  Descriptor descriptor;
};

struct alignas(128) PadEntry {  // all that one peer writes; 128: x86 fetches cache lines in pairs
  Header header[2];
  alignas(64) std::atomic<uint64_t> done;
};

enum class AbortKind : uint32_t {
  none = 0,
  missing = 1,
  died = 2,
  left = 3,
  disagree = 4,
  damaged = 5,
  interrupted = 6,
  unfinished = 7,  // NCCL's kernel did not end, though every rank had begun the call
  refused = 8,     // NCCL reported an error
  unmade = 9       // a rank failed while the group was made
};

struct alignas(64) AbortRecord {
  // Abandoned: its writer stopped in the middle (a SIGSTOP, say), and a reader lost patience.
  static constexpr uint32_t kEmpty = 0, kBeingWritten = 1, kComplete = 2, kAbandoned = 3;
  std::atomic<uint32_t> state;
  AbortKind kind;
  uint32_t reporter;    // the rank that noticed
  uint32_t culprits;    // bit r: rank r is missing, died, left or disagrees
  uint64_t epoch;       // the reporter's call
  uint64_t pid;         // of the process that died
  double seconds;       // waited, for missing
  Descriptor expected;  // the lowest rank's (disagree) or the reporter's
  Descriptor got;       // the culprit's (disagree)
};

struct Pad {
  AbortRecord abort;
  AbortRecord device;                      // what this rank's kernels found; moved to `abort` by a host
  alignas(64) std::atomic<uint32_t> left;  // bit r: rank r said bye to this rank
  cpu_set_t cores;                         // where its owner may run; written before anybody maps the pad
  PadEntry from[kMaxWorldSize];
};
static_assert(std::atomic<uint64_t>::is_always_lock_free, "pads are shared between processes");

}  // namespace sglang_symm
