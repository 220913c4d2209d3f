// Which algorithm a call takes: a pure function of what all ranks know to be equal. Where a tensor lies, its alignment
// or strides never enter: they change how a rank touches its own memory, not the algorithm.
//
//   algorithm         bytes read a rank    bytes written a rank   waits
//   one_shot          (P-1) n + own        n + own                1 (headers)
//   two_shot          2 (P-1)/P n          2 (P-1)/P n + staging  2 (headers, done)
//   two_shot_direct   2 (P-1)/P n          2 (P-1)/P n            2 (headers, done)
//   process_group     theirs               theirs                 1 (headers) + theirs
#pragma once

#include <cstddef>
#include <optional>
#include <string>

#include "signal/descriptor.h"

namespace sglang_symm {

// Measured by `tune`; one table a kind of machine. Part of what ranks compare at creation.
// The defaults are the CPU's.
struct Tuning {
  size_t one_shot_bytes = 16 << 10;              // up to this many bytes at P = 2 one_shot wins
  size_t one_shot_bytes_many = 8 << 10;          // the same at P > 2
  size_t two_shot_bytes = 0;                     // above one_shot, up to here two_shot through slots; beyond it `large`
  Algorithm large = Algorithm::two_shot_direct;  // of reductions beyond two_shot_bytes
  size_t copy_one_shot_bytes = 64 << 10;         // all_gather, broadcast, reduce_scatter: through slots up to here
};

// Configuration exchanged and compared when the group is created.
struct Agreed {
  std::optional<Algorithm> forced;  // SGLANG_SYMM_ALGO
  bool pinned = false;              // the same bits whatever the number of tokens: process_group is excluded
  Tuning tuning;
};

// `bytes`: one rank's contribution. Throws ErrorKind::argument when pinned mode forbids the only algorithm there is.
Algorithm choose(OpCode op, DType dtype, ReduceOp reduce_op, size_t bytes, int world_size, const Agreed& agreed);

std::string to_string(const Agreed& agreed);
std::optional<Algorithm> parse_algorithm(const std::string& name);  // "auto" -> nothing

}  // namespace sglang_symm
