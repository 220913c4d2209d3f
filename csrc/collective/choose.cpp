#include "collective/choose.h"

#include "base/error.h"

namespace sglang_symm {

namespace {

bool reduces(OpCode op) {
  return op == OpCode::all_reduce || op == OpCode::reduce_scatter || op == OpCode::row_parallel_linear ||
         op == OpCode::all_reduce_add_rms_norm || op == OpCode::row_parallel_linear_add_rms_norm;
}

}  // namespace

Algorithm choose(OpCode op, DType dtype, ReduceOp reduce_op, size_t bytes, int world_size, const Agreed& agreed) {
  if (op == OpCode::barrier || op == OpCode::rendezvous) return Algorithm::one_shot;  // headers are all there is
  if (reduces(op) && !natively_reduced(dtype, reduce_op)) {
    if (agreed.pinned) {
      fail(ErrorKind::argument, name(op), " of ", name(dtype), " with ", name(reduce_op),
           " needs the process group, which pinned mode excludes. Use float32, bfloat16 or float16 with sum, or "
           "pinned=False");
    }
    return Algorithm::process_group;
  }
  if (agreed.forced && !(agreed.pinned && *agreed.forced == Algorithm::process_group)) return *agreed.forced;
  const bool copies = !reduces(op) || op == OpCode::reduce_scatter;
  const size_t limit = copies           ? agreed.tuning.copy_one_shot_bytes
                       : world_size > 2 ? agreed.tuning.one_shot_bytes_many
                                        : agreed.tuning.one_shot_bytes;
  if (bytes <= limit) return Algorithm::one_shot;
  if (copies) return Algorithm::two_shot_direct;
  return bytes <= agreed.tuning.two_shot_bytes ? Algorithm::two_shot : agreed.tuning.large;
}

std::string to_string(const Agreed& agreed) {
  return cat("algo=", agreed.forced ? name(*agreed.forced) : "auto", " pinned=", agreed.pinned ? 1 : 0,
             " one_shot_bytes=", agreed.tuning.one_shot_bytes, "/", agreed.tuning.one_shot_bytes_many, "/",
             agreed.tuning.two_shot_bytes, "/", name(agreed.tuning.large), "/", agreed.tuning.copy_one_shot_bytes);
}

std::optional<Algorithm> parse_algorithm(const std::string& text) {
  if (text.empty() || text == "auto") return std::nullopt;
  std::string known = "auto";
  for (int i = 0; i < kAlgorithms; i++) {
    const auto algorithm = static_cast<Algorithm>(i);
    if (text == name(algorithm)) return algorithm;
    known += cat(", ", name(algorithm));
  }
  fail(ErrorKind::argument, "algorithm '", text, "', expected one of ", known, " (algo=, SGLANG_SYMM_ALGO)");
}

}  // namespace sglang_symm
