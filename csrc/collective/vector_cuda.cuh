// Arithmetic of the native sums on GPUs, 16 bytes at a time: the device twin of sum.h, with the same bits.
// fp32 accumulation in rank order, one rounding to nearest even, one canonical NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "signal/pad_cuda.cuh"

namespace sglang_symm::device {

// Each: elements a chunk of 16 bytes, the canonical NaN filling a word, conversions of a word.
struct Float32 {
  using Storage = uint32_t;
  static constexpr int kElements = 4;
  static constexpr uint32_t kNanWord = 0x7FC00000u;
  static __device__ __forceinline__ void unpack(uint32_t word, float* f) { f[0] = __uint_as_float(word); }
  static __device__ __forceinline__ uint32_t round(const float* f) { return __float_as_uint(f[0]); }
  static __device__ __forceinline__ bool has_nan(uint32_t word) {
    return __uint_as_float(word) != __uint_as_float(word);
  }
  static __device__ __forceinline__ uint32_t canonical(uint32_t word) { return has_nan(word) ? kNanWord : word; }
  static __device__ __forceinline__ float load(uint32_t bits) { return __uint_as_float(bits); }
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr int kElements = 8;
  static constexpr uint32_t kNanWord = 0x7FC07FC0u;
  static __device__ __forceinline__ void unpack(uint32_t word, float* f) {
    f[0] = __uint_as_float(word << 16);
    f[1] = __uint_as_float(word & 0xFFFF0000u);
  }
  // The instruction rounds to nearest even as the integer formula does; only its NaN (0x7FFF) differs.
  static __device__ __forceinline__ uint32_t round(const float* f) { return bfloat16_pair(f[0], f[1]); }
  static __device__ __forceinline__ bool has_nan(uint32_t word) {
    const auto pair = *reinterpret_cast<const __nv_bfloat162*>(&word);
    return !__hbeq2(pair, pair);
  }
  static __device__ __forceinline__ uint32_t canonical(uint32_t word) {
    if ((word & 0x7FFFu) > 0x7F80u) word = (word & 0xFFFF0000u) | 0x7FC0u;
    if ((word & 0x7FFF0000u) > 0x7F800000u) word = (word & 0x0000FFFFu) | 0x7FC00000u;
    return word;
  }
  static __device__ __forceinline__ float load(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr int kElements = 8;
  static constexpr uint32_t kNanWord = 0x7E007E00u;
  static __device__ __forceinline__ void unpack(uint32_t word, float* f) {
    f[0] = load(static_cast<uint16_t>(word));
    f[1] = load(static_cast<uint16_t>(word >> 16));
  }
  static __device__ __forceinline__ uint32_t round(const float* f) { return float16_pair(f[0], f[1]); }
  static __device__ __forceinline__ bool has_nan(uint32_t word) {
    const auto pair = *reinterpret_cast<const __half2*>(&word);
    return !__hbeq2(pair, pair);
  }
  static __device__ __forceinline__ uint32_t canonical(uint32_t word) {
    if ((word & 0x7FFFu) > 0x7C00u) word = (word & 0xFFFF0000u) | 0x7E00u;
    if ((word & 0x7FFF0000u) > 0x7C000000u) word = (word & 0x0000FFFFu) | 0x7E000000u;
    return word;
  }
  static __device__ __forceinline__ float load(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
};

__device__ __forceinline__ uint4 all_bits_set() {
  return make_uint4(kSentinel, kSentinel, kSentinel, kSentinel);
}
// Whether each of the four words has come.
__device__ __forceinline__ bool is_data(uint4 v) {
  return v.x != kSentinel && v.y != kSentinel && v.z != kSentinel && v.w != kSentinel;
}
// What is sent never equals the sentinel: only a NaN does, and any NaN makes the same sum.
template <class Type>
__device__ __forceinline__ uint4 sendable(uint4 v) {
  if (is_data(v)) return v;
  v.x = v.x == kSentinel ? Type::kNanWord : v.x;
  v.y = v.y == kSentinel ? Type::kNanWord : v.y;
  v.z = v.z == kSentinel ? Type::kNanWord : v.z;
  v.w = v.w == kSentinel ? Type::kNanWord : v.w;
  return v;
}

// A tensor of `count` elements in chunks of 16 bytes; `aligned` when its address is a multiple of 16. Plain: it is, and
// the count is whole chunks; then there is no code for elements, and large kernels fit the instruction cache.
template <class Type, bool Plain = false>
__device__ __forceinline__ uint4 load_chunk(const void* in, size_t chunk, size_t count, bool aligned) {
  if constexpr (Plain) return static_cast<const uint4*>(in)[chunk];
  const size_t begin = chunk * Type::kElements;
  const auto* source = static_cast<const typename Type::Storage*>(in) + begin;
  if (aligned && begin + Type::kElements <= count) return *reinterpret_cast<const uint4*>(source);
  uint32_t word[4] = {};
#pragma unroll
  for (int i = 0; i < Type::kElements; i++) {
    constexpr int kInWord = Type::kElements / 4;
    if (begin + i < count) word[i / kInWord] |= uint32_t{source[i]} << (16 * (i % kInWord));
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

template <class Type, bool Plain = false>
__device__ __forceinline__ void store_chunk(void* out, size_t chunk, size_t count, bool aligned, uint4 v) {
  if constexpr (Plain) {
    static_cast<uint4*>(out)[chunk] = v;
    return;
  }
  const size_t begin = chunk * Type::kElements;
  auto* target = static_cast<typename Type::Storage*>(out) + begin;
  if (aligned && begin + Type::kElements <= count) {
    *reinterpret_cast<uint4*>(target) = v;
    return;
  }
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < Type::kElements; i++) {
    constexpr int kInWord = Type::kElements / 4;
    if (begin + i < count) target[i] = static_cast<typename Type::Storage>(word[i / kInWord] >> (16 * (i % kInWord)));
  }
}

// Not inlined: it runs when there is a NaN, and the hot path should fit the instruction cache.
template <class Type>
__device__ __noinline__ uint4 canonical_chunk(uint4 v) {
  return make_uint4(Type::canonical(v.x), Type::canonical(v.y), Type::canonical(v.z), Type::canonical(v.w));
}

struct Bias {
  const void* data;  // [length], or nullptr
  size_t length;
  size_t start;  // index of the tensor's element 0
};

// round(v[0] + v[1] + ... + v[world - 1] (+ bias)) with `own` in the place of v[rank] (rank -1: in no place); Max
// bounds world at compile time. (Storing own into v[rank] would index registers by a variable, hence move them to local
// memory.)
template <class Type, bool Plain, int Max>
__device__ __forceinline__ uint4 sum_in_rank_order(const uint4 (&v)[Max], uint4 own, int rank, int world,
                                                   const Bias& bias, size_t chunk) {
  constexpr int kInWord = Type::kElements / 4;
  float sum[Type::kElements];
  if constexpr (Max == 2) {  // a world of 2: of two numbers either order has the same bits
    const uint4 first = rank < 0 ? v[0] : own;
    const uint4 second = rank < 0 ? v[1] : v[0];
    const uint32_t a[4] = {first.x, first.y, first.z, first.w};
    const uint32_t b[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
      float f[kInWord];
      Type::unpack(a[w], sum + kInWord * w);
      Type::unpack(b[w], f);
#pragma unroll
      for (int i = 0; i < kInWord; i++) sum[kInWord * w + i] = __fadd_rn(sum[kInWord * w + i], f[i]);
    }
  }
#pragma unroll
  for (int r = 0; r < (Max == 2 ? 0 : Max); r++) {
    if (r >= world) continue;
    const bool mine = r == rank;
    const uint32_t word[4] = {mine ? own.x : v[r].x, mine ? own.y : v[r].y, mine ? own.z : v[r].z,
                              mine ? own.w : v[r].w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
      float f[kInWord];
      Type::unpack(word[w], f);
#pragma unroll
      for (int i = 0; i < kInWord; i++) {
        float& total = sum[kInWord * w + i];
        total = r == 0 ? f[i] : __fadd_rn(total, f[i]);
      }
    }
  }
  if (!Plain && bias.data != nullptr) {
    size_t column = (bias.start + chunk * Type::kElements) % bias.length;
#pragma unroll
    for (int i = 0; i < Type::kElements; i++) {
      sum[i] = __fadd_rn(sum[i], Type::load(static_cast<const typename Type::Storage*>(bias.data)[column]));
      if (++column == bias.length) column = 0;
    }
  }
  uint4 out = make_uint4(Type::round(sum), Type::round(sum + kInWord), Type::round(sum + 2 * kInWord),
                         Type::round(sum + 3 * kInWord));
  if (Type::has_nan(out.x) || Type::has_nan(out.y) || Type::has_nan(out.z) || Type::has_nan(out.w)) {
    out = canonical_chunk<Type>(out);
  }
  return out;
}

}  // namespace sglang_symm::device
