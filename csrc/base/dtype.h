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
  other = 13,
};

enum class ReduceOp : uint8_t { sum = 0, product = 1, min = 2, max = 3, avg = 4 };

constexpr int kMaxWorldSize = 16;

inline const char* name(DType dtype) {
  constexpr const char* names[] = {"bytes", "float32", "bfloat16", "float16", "float64",   "int8",       "uint8",
                                   "int16", "int32",   "int64",    "bool",    "complex64", "complex128", "other dtype"};
  const auto index = static_cast<size_t>(dtype);
  return index < sizeof names / sizeof *names ? names[index] : "unknown dtype";
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

inline size_t element_size(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return 4;
    case DType::bfloat16:
    case DType::float16:
      return 2;
    default:
      return 1;
  }
}

}  // namespace sglang_symm
