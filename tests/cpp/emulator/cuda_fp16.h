// float16 as far as csrc/collective/vector_cuda.cuh uses it, for the emulator.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  uint16_t x, y;
};
inline __half __ushort_as_half(uint16_t bits) {
  return {bits};
}
inline float __half2float(__half h) {
  const uint32_t sign = uint32_t{h.bits & 0x8000u} << 16, magnitude = h.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return __uint_as_float(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  // A subnormal float of the same fraction, times 2^112.
  return __uint_as_float(sign | magnitude << 13) * __uint_as_float((127u + 112u) << 23);
}
inline bool __hbeq2(__half2 a, __half2 b) {
  const auto value = [](uint16_t bits) { return __half2float({bits}); };
  return value(a.x) == value(b.x) && value(a.y) == value(b.y);
}
