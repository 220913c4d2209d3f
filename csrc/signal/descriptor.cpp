#include "signal/descriptor.h"

#include "base/error.h"

namespace sglang_symm {

const char* name(OpCode op) {
  constexpr const char* names[] = {"nothing",
                                   "all_reduce",
                                   "reduce_scatter",
                                   "all_gather",
                                   "broadcast",
                                   "barrier",
                                   "rendezvous",
                                   "row_parallel_linear",
                                   "all_reduce_add_rms_norm",
                                   "row_parallel_linear_add_rms_norm"};
  const auto index = static_cast<size_t>(op);
  return index < sizeof names / sizeof *names ? names[index] : "unknown op";
}

const char* name(Algorithm algorithm) {
  constexpr const char* names[] = {"one_shot", "two_shot", "two_shot_direct", "process_group", "nccl"};
  const auto index = static_cast<size_t>(algorithm);
  return index < sizeof names / sizeof *names ? names[index] : "unknown algorithm";
}

std::string to_string(const Descriptor& d) {
  const char* op = name(d.op);
  switch (d.op) {
    case OpCode::none:
    case OpCode::barrier:
      return cat(op, "()");
    case OpCode::rendezvous:
      return cat(op, "(", name(d.dtype), ", ", d.count, " elements)");
    case OpCode::all_reduce_add_rms_norm:
      return cat(op, "(", name(d.dtype), ", ", d.count, " elements in rows of ", d.aux,
                 (d.flags & Descriptor::kNormed) != 0 ? ", fused" : "", ")");
    case OpCode::broadcast:
      return cat(op, "(", name(d.dtype), ", ", d.count, " elements, src ", d.aux, ")");
    case OpCode::all_gather:
      return cat(op, "(", name(d.dtype), ", ", d.count, " elements in all, cut by layout ", d.aux,
                 ": a digest of dim and sizes)");
    case OpCode::reduce_scatter:
      return cat(op, "(", name(d.dtype), ", ", d.count, " elements in all, ", name(d.reduce_op()), ", cut by layout ",
                 d.aux, ": a digest of dim and sizes)");
    case OpCode::row_parallel_linear:
    case OpCode::row_parallel_linear_add_rms_norm:
      return cat(op, "(", name(d.dtype), ", y [", d.count, ", ", d.aux, "]",
                 (d.flags & Descriptor::kHasBias) != 0 ? ", bias" : ", no bias",
                 (d.flags & Descriptor::kFused) != 0    ? ", fused"
                 : (d.flags & Descriptor::kNormed) != 0 ? ", fused with the norm"
                                                        : "",
                 ")");
    default:
      return cat(op, "(", name(d.dtype), ", ", d.count, " elements, ", name(d.reduce_op()), ")");
  }
}

}  // namespace sglang_symm
