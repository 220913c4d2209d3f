#include "collective/choose.h"

#include <cstdint>
#include <cstdio>
#include <limits>

#include "base/error.h"

namespace sglang_symm {

namespace {

bool reduces(OpCode op) {
  return op == OpCode::all_reduce || op == OpCode::reduce_scatter || op == OpCode::row_parallel_linear ||
         op == OpCode::all_reduce_add_rms_norm || op == OpCode::row_parallel_linear_add_rms_norm;
}

constexpr size_t kNoEnd = std::numeric_limits<size_t>::max();

struct Member {
  OpCode op;
  Ladder Tuning::*ladder;
};
constexpr Member kMembers[] = {
    {OpCode::all_reduce, &Tuning::all_reduce},         {OpCode::row_parallel_linear, &Tuning::row_parallel_linear},
    {OpCode::reduce_scatter, &Tuning::reduce_scatter}, {OpCode::all_gather, &Tuning::all_gather},
    {OpCode::broadcast, &Tuning::broadcast},
};

[[noreturn]] void wrong_tuning(const std::string& text, const std::string& got) {
  fail(ErrorKind::argument, "tuning='", text, "': got ", got,
       "; expected 'op:algorithm<=bytes,...,algorithm' of all_reduce, row_parallel_linear, reduce_scatter, all_gather "
       "and broadcast, joined by ';', bytes ascending");
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t end = text.find(separator); end != std::string::npos; end = text.find(separator, begin)) {
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  parts.push_back(text.substr(begin));
  return parts;
}

size_t parse_bytes(const std::string& text) {
  if (text.empty() || text.size() > 18 || text.find_first_not_of("0123456789") != std::string::npos) {
    fail(ErrorKind::argument, "tuning: expected a number of bytes, got '", text, "'");
  }
  return static_cast<size_t>(std::stoull(text));
}

}  // namespace

Algorithm choose(OpCode op, DType dtype, ReduceOp reduce_op, size_t bytes, const Agreed& agreed) {
  if (op == OpCode::barrier || op == OpCode::rendezvous) return Algorithm::one_shot;  // headers are all there is
  if (reduces(op) && !natively_reduced(dtype, reduce_op)) {
    if (agreed.pinned) {
      fail(ErrorKind::argument, name(op), " of ", name(dtype), " with ", name(reduce_op),
           " needs the process group, which pinned mode excludes. Use float32, bfloat16 or float16 with sum, or "
           "pinned=False");
    }
    return agreed.nccl && reduced_by_nccl(dtype, reduce_op) ? Algorithm::nccl : Algorithm::process_group;
  }
  const auto allowed = [&](Algorithm algorithm) {
    const bool ours = algorithm != Algorithm::process_group && algorithm != Algorithm::nccl;
    return (ours || !agreed.pinned) && (algorithm != Algorithm::nccl || agreed.nccl);
  };
  if (agreed.forced && allowed(*agreed.forced)) return *agreed.forced;
  Algorithm native = Algorithm::two_shot_direct;  // of the last step that is allowed
  for (const Step& step : agreed.tuning.of(op)) {
    if (!allowed(step.algorithm)) continue;
    native = step.algorithm;
    if (bytes <= step.up_to) break;
  }
  return native;
}

bool reducible(DType dtype, ReduceOp reduce_op, const Agreed& agreed) {
  return natively_reduced(dtype, reduce_op) || reduced_by_process_group(dtype, reduce_op) ||
         (agreed.nccl && reduced_by_nccl(dtype, reduce_op));
}

const Ladder& Tuning::of(OpCode op) const {
  switch (op) {
    case OpCode::reduce_scatter:
      return reduce_scatter;
    case OpCode::all_gather:
      return all_gather;
    case OpCode::broadcast:
      return broadcast;
    case OpCode::row_parallel_linear:
    case OpCode::row_parallel_linear_add_rms_norm:
      return row_parallel_linear;
    default:
      return all_reduce;
  }
}

Tuning Tuning::built_in(bool cuda, int world_size) {
  using enum Algorithm;
  constexpr size_t K = 1024;
  Tuning tuning;
  if (!cuda) {
    const size_t all_reduce_once = world_size <= 2 ? 2 * K : world_size == 3 ? 8 * K : 4 * K;
    tuning.all_reduce = {{all_reduce_once, one_shot}, {kNoEnd, two_shot_direct}};
    tuning.reduce_scatter = {{64 * K, one_shot}, {kNoEnd, two_shot_direct}};
  } else if (world_size <= 2) {
    tuning.all_reduce = {{kNoEnd, one_shot}};
    tuning.reduce_scatter = {{kNoEnd, one_shot}};
  } else {
    tuning.all_reduce = {
        {128 * K, one_shot}, {world_size <= 4 ? 512 * K : 256 * K, two_shot}, {kNoEnd, two_shot_direct}};
    tuning.reduce_scatter = {{kNoEnd, one_shot}};
  }
  tuning.row_parallel_linear = tuning.all_reduce;
  tuning.all_gather = {{cuda && world_size <= 4 ? 128 * K : 64 * K, one_shot}, {kNoEnd, two_shot_direct}};
  tuning.broadcast = tuning.all_gather;
  return tuning;
}

std::string to_string(const Tuning& tuning) {
  std::string text;
  for (const Member& member : kMembers) {
    text += cat(text.empty() ? "" : ";", name(member.op), ":");
    const char* comma = "";
    for (const Step& step : tuning.*member.ladder) {
      text += cat(comma, name(step.algorithm), step.up_to == kNoEnd ? "" : cat("<=", step.up_to));
      comma = ",";
    }
  }
  return text;
}

Tuning Tuning::parse(const std::string& text) {
  Tuning tuning;
  const std::vector<std::string> parts = split(text, ';');
  if (parts.size() != std::size(kMembers)) wrong_tuning(text, cat(parts.size(), " ops"));
  for (size_t i = 0; i < parts.size(); i++) {
    const std::string prefix = cat(name(kMembers[i].op), ":");
    if (parts[i].rfind(prefix, 0) != 0) wrong_tuning(text, cat("'", parts[i], "' for ", prefix, "..."));
    Ladder& ladder = tuning.*kMembers[i].ladder;
    for (const std::string& step : split(parts[i].substr(prefix.size()), ',')) {
      const size_t end = step.find("<=");
      const auto algorithm = parse_algorithm(step.substr(0, end));
      const size_t up_to = end == std::string::npos ? kNoEnd : parse_bytes(step.substr(end + 2));
      if (!algorithm || (!ladder.empty() && up_to <= ladder.back().up_to)) {
        wrong_tuning(text, cat("the step '", step, "' of ", prefix, "..."));
      }
      ladder.push_back({up_to, *algorithm});
    }
    if (ladder.back().up_to != kNoEnd) wrong_tuning(text, cat("no last step without an end in '", parts[i], "'"));
  }
  return tuning;
}

std::string to_string(const Agreed& agreed) {
  uint64_t hash = 14695981039346656037u;  // FNV-1a: as sglang_symm/tuning.py shows it
  for (const char c : to_string(agreed.tuning)) hash = (hash ^ static_cast<uint8_t>(c)) * 1099511628211u;
  char digest[17];
  std::snprintf(digest, sizeof digest, "%016llx", static_cast<unsigned long long>(hash));
  return cat("algo=", agreed.forced ? name(*agreed.forced) : "auto", " pinned=", agreed.pinned ? 1 : 0,
             " nccl=", agreed.nccl ? 1 : 0, " tuning=", digest);
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
