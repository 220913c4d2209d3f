// Which algorithm a call takes: a pure function of what all ranks know to be equal. Where a tensor lies, its alignment
// or strides never enter: they change how a rank touches its own memory, not the algorithm.
//
//   algorithm         bytes read a rank    bytes written a rank   waits
//   one_shot          (P-1) n + own        n + own                1 (headers)
//   two_shot          2 (P-1)/P n          2 (P-1)/P n + staging  2 (headers, done)
//   two_shot_direct   2 (P-1)/P n          2 (P-1)/P n            2 (headers, done); GPUs that push: 3 (arrived too)
//   process_group     theirs               theirs                 1 (headers) + theirs
//   nccl              theirs               theirs                 1 (headers) + theirs
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "signal/descriptor.h"

namespace sglang_symm {

// One way up to so many bytes of a rank's contribution, then the next.
struct Step {
  size_t up_to;
  Algorithm algorithm;
  friend bool operator==(const Step&, const Step&) = default;
};
using Ladder = std::vector<Step>;  // ascending; the last step has no end

// A ladder an op, measured by `tune` on one kind of machine at one world size. The norm variants use their op's.
//
//   all_reduce            in the arena and outside of it, in place and into a new tensor: what is bad nowhere
//   row_parallel_linear   partial results lie in the arena
struct Tuning {
  Ladder all_reduce, row_parallel_linear, reduce_scatter, all_gather, broadcast;

  // What is used where no table was measured.
  static Tuning built_in(bool cuda, int world_size);
  // "all_reduce:one_shot<=16384,two_shot_direct;row_parallel_linear:...": all five, in this order. Throws
  // ErrorKind::argument for anything else.
  static Tuning parse(const std::string& text);
  const Ladder& of(OpCode op) const;
};
std::string to_string(const Tuning& tuning);  // what parse reads

// Configuration exchanged and compared when the group is created.
struct Agreed {
  std::optional<Algorithm> forced;  // SGLANG_SYMM_ALGO
  bool pinned = false;              // the same bits whatever the number of tokens: process_group, nccl are excluded
  bool nccl = false;                // the group owns an NCCL communicator
  Tuning tuning = Tuning::built_in(false, 2);
};

// `bytes`: one rank's contribution. Throws ErrorKind::argument when pinned mode forbids the only algorithm there is.
Algorithm choose(OpCode op, DType dtype, ReduceOp reduce_op, size_t bytes, const Agreed& agreed);

// Whether choose() leads to somebody who does this reduction.
bool reducible(DType dtype, ReduceOp reduce_op, const Agreed& agreed);

std::string to_string(const Agreed& agreed);                        // short: the tuning by its digest
std::optional<Algorithm> parse_algorithm(const std::string& name);  // "auto" -> nothing

}  // namespace sglang_symm
