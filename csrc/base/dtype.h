// Element types that travel in descriptors. The values are part of the protocol.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sglang_symm {

enum class DType : uint8_t {
  bytes = 0,  // copies only: the type does not matter
  float32 = 1,
  bfloat16 = 2,
  float16 = 3,
  float64 = 4,
  int8 = 5,
  uint8 = 6,
  int16 = 7,
  int32 = 8,
  int64 = 9,
  boolean = 10,
  complex64 = 11,
  complex128 = 12,
  uint16 = 13,
  uint32 = 14,
  uint64 = 15,
  float8_e4m3fn = 16,
  float8_e5m2 = 17,
  float8_e4m3fnuz = 18,
  float8_e5m2fnuz = 19,
  float8_e8m0fnu = 20,
  complex32 = 21,
  unnamed = 64,  // 64 + PyTorch's number of any other type: ranks that differ are still told apart
};

enum class ReduceOp : uint8_t { sum = 0, product = 1, min = 2, max = 3, avg = 4 };

constexpr int kMaxWorldSize = 16;

inline const char* name(DType dtype) {
  constexpr const char* names[] = {
      "bytes",           "float32",         "bfloat16",       "float16",  "float64",       "int8",
      "uint8",           "int16",           "int32",          "int64",    "bool",          "complex64",
      "complex128",      "uint16",          "uint32",         "uint64",   "float8_e4m3fn", "float8_e5m2",
      "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "complex32"};
  const auto index = static_cast<size_t>(dtype);
  return index < sizeof names / sizeof *names ? names[index] : "a dtype without a name";
}

inline const char* name(ReduceOp op) {
  constexpr const char* names[] = {"sum", "product", "min", "max", "avg"};
  const auto index = static_cast<size_t>(op);
  return index < sizeof names / sizeof *names ? names[index] : "unknown reduction";
}

// Reductions that the library computes itself: fp32 accumulation, fixed rank order, one rounding.
inline bool natively_reduced(DType dtype, ReduceOp op) {
  return op == ReduceOp::sum && (dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16);
}

// Reductions that a process group does for us, be it PyTorch's Gloo or its NCCL: both take these and no others.
inline bool reduced_by_process_group(DType dtype, ReduceOp op) {
  switch (dtype) {
    case DType::float32:
    case DType::bfloat16:
    case DType::float16:
    case DType::float64:
    case DType::int8:
    case DType::uint8:
    case DType::int32:
    case DType::int64:
    case DType::boolean:
      return true;
    case DType::complex64:
    case DType::complex128:
      return op == ReduceOp::sum || op == ReduceOp::avg;  // there is no order, and its product is not elementwise
    default:
      return false;
  }
}

// Reductions that a communicator of our own (NCCL) does for us on GPUs. The mean is a sum and a division.
inline bool reduced_by_nccl(DType dtype, ReduceOp op) {
  if (op == ReduceOp::avg) return false;
  switch (dtype) {
    case DType::float32:
    case DType::bfloat16:
    case DType::float16:
    case DType::float64:
    case DType::int8:
    case DType::uint8:
    case DType::int32:
    case DType::uint32:
    case DType::int64:
    case DType::uint64:
    case DType::boolean:
      return true;
    case DType::complex64:
    case DType::complex128:
      return op == ReduceOp::sum;
    default:
      return false;
  }
}

inline size_t element_size(DType dtype) {
  switch (dtype) {
    case DType::complex128:
      return 16;
    case DType::float64:
    case DType::int64:
    case DType::uint64:
    case DType::complex64:
      return 8;
    case DType::float32:
    case DType::int32:
    case DType::uint32:
      return 4;
    case DType::bfloat16:
    case DType::float16:
    case DType::int16:
    case DType::uint16:
      return 2;
    default:
      return 1;
  }
}

}  // namespace sglang_symm
