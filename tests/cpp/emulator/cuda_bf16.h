// bfloat16 as far as csrc/collective/vector_cuda.cuh uses it, for the emulator.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat162 {
  uint16_t x, y;
};
inline bool __hbeq2(__nv_bfloat162 a, __nv_bfloat162 b) {
  const auto value = [](uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); };
  return value(a.x) == value(b.x) && value(a.y) == value(b.y);
}
