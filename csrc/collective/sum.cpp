#include "collective/sum.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "base/error.h"

namespace sglang_symm {

namespace {

#define SYMM_INLINE inline __attribute__((always_inline))

// Integer arithmetic throughout: it vectorises, and it does not depend on the thread's rounding or denormal mode.
// A NaN is stored as the one canonical NaN: which operand's sign and payload an addition keeps is the compiler's
// choice.
struct Float32 {
  using Storage = float;
  static SYMM_INLINE float load(float x) { return x; }
  static SYMM_INLINE float store(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    return std::bit_cast<float>((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC00000u : u);
  }
};

struct BFloat16 {
  using Storage = uint16_t;
  static SYMM_INLINE float load(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }
  static SYMM_INLINE uint16_t store(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (u + 0x7FFFu + (u >> 16 & 1u)) >> 16;
    return static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static SYMM_INLINE float load(uint16_t x) {
    const uint32_t sign = uint32_t{x & 0x8000u} << 16;
    const uint32_t magnitude = uint32_t{x & 0x7FFFu} << 13;
    const uint32_t exponent = magnitude & 0x0F800000u;
    const uint32_t normal = magnitude + (112u << 23);
    const uint32_t special = normal + (112u << 23);  // infinity and NaN
    const float subnormal = std::bit_cast<float>(normal + (1u << 23)) - std::bit_cast<float>(113u << 23);
    const uint32_t bits = exponent == 0x0F800000u ? special
                          : exponent == 0         ? std::bit_cast<uint32_t>(subnormal)
                                                  : normal;
    return std::bit_cast<float>(bits | sign);
  }
  static SYMM_INLINE uint16_t store(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    const uint32_t sign = u & 0x80000000u;
    const uint32_t m = u ^ sign;
    const uint32_t normal = (m - (112u << 23) + 0xFFFu + (m >> 13 & 1u)) >> 13;
    const float magic =
        std::bit_cast<float>(126u << 23);  // its addition aligns a subnormal and rounds it to nearest even
    const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(m) + magic) - (126u << 23);
    const uint32_t bits = m >= (143u << 23) ? 0x7C00u : m < (113u << 23) ? subnormal : normal;
    return static_cast<uint16_t>(m > 0x7F800000u ? 0x7E00u : bits | sign >> 16);
  }
};

constexpr size_t kBlock = 2048;  // 8 KiB of fp32: stays in the first-level cache

template <class Type>
SYMM_INLINE void sum_blocks(const SumTask& task) {
  using T = typename Type::Storage;
  alignas(64) float sum[kBlock];
  alignas(64) T rounded[kBlock];
  const auto source = [&](int r) { return static_cast<const T*>(task.sources[r]); };
  for (size_t begin = 0; begin < task.count; begin += kBlock) {
    const size_t n = std::min(kBlock, task.count - begin);
    const T* first = source(0) + begin;
    if (task.world_size == 1) {
      for (size_t i = 0; i < n; i++) sum[i] = Type::load(first[i]);
    } else {
      const T* second = source(1) + begin;
      for (size_t i = 0; i < n; i++) sum[i] = Type::load(first[i]) + Type::load(second[i]);
    }
    for (int r = 2; r < task.world_size; r++) {
      const T* x = source(r) + begin;
      for (size_t i = 0; i < n; i++) sum[i] += Type::load(x[i]);
    }
    if (task.bias != nullptr) {
      const T* bias = static_cast<const T*>(task.bias);
      for (size_t i = 0; i < n;) {
        const size_t column = (task.bias_start + begin + i) % task.bias_length;
        const size_t run = std::min(n - i, task.bias_length - column);
        for (size_t j = 0; j < run; j++) sum[i + j] += Type::load(bias[column + j]);
        i += run;
      }
    }
    for (size_t i = 0; i < n; i++) rounded[i] = Type::store(sum[i]);
    for (int o = 0; o < task.output_count; o++) {
      std::memcpy(static_cast<T*>(task.outputs[o]) + begin, rounded, n * sizeof(T));
    }
  }
}

SYMM_INLINE void sum_any(const SumTask& task) {
  switch (task.dtype) {
    case DType::float32:
      return sum_blocks<Float32>(task);
    case DType::bfloat16:
      return sum_blocks<BFloat16>(task);
    case DType::float16:
      return sum_blocks<Float16>(task);
    default:
      fail(ErrorKind::argument, "a native sum of ", name(task.dtype), ", expected float32, bfloat16 or float16");
  }
}

void sum_portable(const SumTask& task) {
  sum_any(task);
}
#if defined(__x86_64__)
__attribute__((target("avx2"))) void sum_avx2(const SumTask& task) {
  sum_any(task);
}
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) void sum_avx512(const SumTask& task) {
  sum_any(task);
}
#endif

}  // namespace

const char* name(CpuPath path) {
  return path == CpuPath::avx512 ? "avx512" : path == CpuPath::avx2 ? "avx2" : "portable";
}

CpuPath best_cpu_path() {
  CpuPath best = CpuPath::portable;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) best = CpuPath::avx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    best = CpuPath::avx512;
  }
#endif
  const char* wish = std::getenv("SGLANG_SYMM_CPU");
  if (wish == nullptr || *wish == 0) return best;
  for (const CpuPath path : {CpuPath::portable, CpuPath::avx2, CpuPath::avx512}) {
    if (std::string(wish) == name(path)) return std::min(path, best);
  }
  fail(ErrorKind::argument, "SGLANG_SYMM_CPU='", wish, "', expected portable, avx2 or avx512");
}

void sum_in_rank_order(const SumTask& task, [[maybe_unused]] CpuPath path) {
#if defined(__x86_64__)
  if (path == CpuPath::avx512) return sum_avx512(task);
  if (path == CpuPath::avx2) return sum_avx2(task);
#endif
  sum_portable(task);
}

float to_float(uint16_t bits, DType dtype) {
  return dtype == DType::bfloat16 ? BFloat16::load(bits) : Float16::load(bits);
}

uint16_t from_float(float value, DType dtype) {
  return dtype == DType::bfloat16 ? BFloat16::store(value) : Float16::store(value);
}

}  // namespace sglang_symm
