// The device twin of pad.h: the words that GPUs write to each other. It lies at the beginning of every CUDA arena.
//
//   word                      written by                        read by     at rest            scope
//   header[p][s]              rank s, in call e, p = e & 1      the owner   e of an old call   each half holds its e
//   arrived[p][s][c]          CTA c of rank s, when its         the owner   e of an old call   release / acquire
//                             contributions are in staging
//   done[p][s][c]             CTA c of rank s, when it no       the owner   e of an old call   release / acquire
//                             longer touches a peer's memory
//   proof[s]                  rank s, once, at creation         the owner   0                  a host barrier
//   gate: epoch of CTA c      this rank's kernels, when their   CTA c       e of the last call end of a kernel
//                             CTA c has read it
//   gate: broken; claimed     this rank's kernels, once         its kernels 0                  relaxed
//   looked, left              this rank's kernels, when they    its kernels 0                  relaxed
//                             have waited long
//   slots                     rank s, one-shot and two-shot     the owner   kSentinel          each word is data or not
//   small slots               rank s, small copies              the owner   e of an old call   each half holds its e
//
// A word of 8 bytes carries 4 bytes of data and 4 of epoch, and arrives whole (16 bytes may not): so a header, and a
// small copy, need no flag. A float sum's slots rest at a value that no sender sends, so its data needs no flag either.
// The reader puts the sentinel back at once; two parities are enough for the reason that pad.h gives: a kernel ends
// only when it holds every peer's header of its epoch.
//
// Epochs lie in device memory, so a CUDA graph replays. A kernel of g CTAs advances the counters b, b + g, b + 2 g ...
// by its CTA b, all alike whatever g; CTA b reads counter b only, so nothing is read that a neighbour writes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "signal/pad.h"

namespace sglang_symm {

constexpr int kMaxCtas = 256;
constexpr uint32_t kSentinel = 0xFFFFFFFFu;

struct alignas(64) HeaderCuda {
  uint32_t word[16];  // data, epoch, data, epoch, ...: 4 words of Descriptor, 2 of offset_in, 2 of offset_out
};

// What every warp reads first, in several places: two thousand that read one word at the same time wait for each other
// in L2. CTA c reads gate c % kGates.
constexpr int kGates = 16;
struct alignas(128) GateCuda {
  uint32_t broken;  // no call of this group does anything any more
  uint32_t epoch[kMaxCtas / kGates];
};

using FlagsCuda = uint32_t[2][kMaxWorldSize][kMaxCtas];

struct PadCuda {
  HeaderCuda header[2][kMaxWorldSize];
  FlagsCuda arrived;
  FlagsCuda done;
  uint32_t proof[kMaxWorldSize];
  // This rank's alone.
  GateCuda gate[kGates];
  uint32_t claimed;           // somebody writes the device's record
  unsigned long long looked;  // when a thread of this device looked at the hosts last, ns
  uint32_t left;              // what it saw there: bit r, rank r said bye

  constexpr uint32_t& epoch(int cta) { return gate[cta % kGates].epoch[cta / kGates]; }
  constexpr const uint32_t& epoch(int cta) const { return gate[cta % kGates].epoch[cta / kGates]; }
};

constexpr size_t kMaxSlots = 64 << 20;    // of a parity: one-shot calls of 32 MiB between two ranks in one kernel
constexpr size_t kMaxStaging = 32 << 20;  // larger calls that need it go in rounds

// Where things lie in a CUDA arena; the same on all ranks.
struct LayoutCuda {
  size_t small;        // [2 parities][rank][2 * small_bytes]
  size_t small_bytes;  // of data, a rank a parity
  size_t slots;        // [2 parities][slot_bytes]
  size_t slot_bytes;   // a parity, for all ranks together
  size_t staging_in;   // staging_bytes each: what peers contribute to sums of mine
  size_t staging_out;  // a result that peers write, and that lies outside of the arena
  size_t staging_bytes;
  size_t heap;

  static LayoutCuda of(size_t arena_bytes, int world_size);
};

// From the host, when no kernel runs: for graphs that may be replayed.
void mark_broken(PadCuda* pad);

// What every kernel of a group is given.
struct CallCuda {
  std::byte* window[kMaxWorldSize];  // the ranks' arenas as this device sees them
  int rank;
  int world_size;
  Descriptor descriptor;
  uint64_t offset_in;
  uint64_t offset_out;
  // Host memory that the device can reach, read in slow polls only.
  const uint32_t* abort_state;  // of the record that all ranks raise from
  const uint32_t* left;         // bit r: rank r said bye
  AbortRecord* record;          // this device's own, written once
  double first_seconds;         // how long the first call waits
  double seconds;
};

}  // namespace sglang_symm
