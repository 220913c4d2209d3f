// What a call is, in 16 readable bytes: every rank sends it with every call, and all must be equal.
#pragma once

#include <cstdint>
#include <string>

#include "base/dtype.h"

namespace sglang_symm {

enum class OpCode : uint8_t {
  none = 0,
  all_reduce = 1,
  reduce_scatter = 2,
  all_gather = 3,
  broadcast = 4,
  barrier = 5,
  rendezvous = 6,
  row_parallel_linear = 7,
  all_reduce_add_rms_norm = 8,
  row_parallel_linear_add_rms_norm = 9,
};

enum class Algorithm : uint8_t {
  one_shot = 0,         // everybody's data through slots, everybody sums all of it
  two_shot = 1,         // through slots, each rank sums its share and writes it to everybody
  two_shot_direct = 2,  // as two_shot, sums straight into tensors in the arena
  process_group = 3,    // Gloo or NCCL through torch.distributed
  nccl = 4,             // the NCCL communicator that the group owns
};
constexpr int kAlgorithms = 5;

struct Descriptor {
  OpCode op = OpCode::none;
  DType dtype = DType::bytes;
  Algorithm algorithm = Algorithm::one_shot;
  uint8_t flags = 0;   // bits 0-2 ReduceOp, 3 has_bias, 4 residual, 5 fused, 6 normed
  uint32_t aux = 0;    // broadcast: src. all_gather, reduce_scatter: digest of sizes. row_parallel_linear: columns N
  uint64_t count = 0;  // elements; rows M for row_parallel_linear

  static constexpr uint8_t kHasBias = 8;
  static constexpr uint8_t kResidual = 16;
  static constexpr uint8_t kFused = 32;   // the reduction is one kernel with its GEMM
  static constexpr uint8_t kNormed = 64;  // or with the norm behind it
  ReduceOp reduce_op() const { return static_cast<ReduceOp>(flags & 7); }
  friend bool operator==(const Descriptor&, const Descriptor&) = default;
};
static_assert(sizeof(Descriptor) == 16);

const char* name(OpCode op);
const char* name(Algorithm algorithm);
// "all_reduce(float32, 1024 elements, sum)"
std::string to_string(const Descriptor& descriptor);

}  // namespace sglang_symm
