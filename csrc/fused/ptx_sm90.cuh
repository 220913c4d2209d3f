// The instructions of Hopper that the fused kernels are made of, by name: barriers in shared memory, the bulk tensor
// copy engine (TMA), the asynchronous matrix product of a warpgroup (wgmma).
#pragma once

#include <cuda.h>

#include "collective/vector_cuda.cuh"

namespace sglang_symm::device {

// How long L2 keeps a line: weights are read once, tokens and slots soon again.
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mbarrier ----

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
__device__ __forceinline__ void barrier_init_visible() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again_%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again_%=;\n}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- TMA ----

// A box of the tensor that starts at (column, row), to shared memory; the barrier counts its bytes. What lies outside
// of the tensor arrives as zeros, and counts.
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, int column, int row, uint64_t* barrier,
                                         uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- slots ----

__device__ __forceinline__ void store_slot(void* p, uint4 v) {
  asm volatile("st.relaxed.sys.global.L2::cache_hint.v4.b32 [%0], {%1,%2,%3,%4}, %5;" ::"l"(p), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w), "l"(kEvictLast)
               : "memory");
}
__device__ __forceinline__ uint4 load_slot(const void* p) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.L2::cache_hint.v4.b32 {%0,%1,%2,%3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(kEvictLast)
               : "memory");
  return v;
}

// ---- wgmma ----

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_wait_all() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// An operand in shared memory: rows of 128 bytes, swizzled by TMA, the reduced dimension along the row.
__device__ __forceinline__ uint64_t operand(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32, kUnused = 1ull << 16;
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | kUnused | kEightRows | kSwizzle128;
}

// d[64 x N] += a[64 x 16] b[N x 16]^T in fp32. A thread holds rows warp * 16 + lane / 4 (+ 8) and, of every 8 columns,
// 2 * (lane % 4) (+ 1): d[4 j + 2 h + i] is row + 8 h, column 8 j + i.
template <class Type, int N>
struct Wgmma;

#define SGLANG_SYMM_D8(n)                                                                                     \
  "+f"(d[n]), "+f"(d[n + 1]), "+f"(d[n + 2]), "+f"(d[n + 3]), "+f"(d[n + 4]), "+f"(d[n + 5]), "+f"(d[n + 6]), \
      "+f"(d[n + 7])
#define SGLANG_SYMM_WGMMA(Type, text)                                                                             \
  template <>                                                                                                     \
  struct Wgmma<Type, 16> {                                                                                        \
    static __device__ __forceinline__ void add(float (&d)[8], uint64_t a, uint64_t b) {                           \
      asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32." text "." text                                    \
                   " {%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, 1, 1, 1, 0, 0;"                                           \
                   : SGLANG_SYMM_D8(0)                                                                            \
                   : "l"(a), "l"(b));                                                                             \
    }                                                                                                             \
  };                                                                                                              \
  template <>                                                                                                     \
  struct Wgmma<Type, 64> {                                                                                        \
    static __device__ __forceinline__ void add(float (&d)[32], uint64_t a, uint64_t b) {                          \
      asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." text "." text                                    \
                   " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24," \
                   "%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"                                       \
                   : SGLANG_SYMM_D8(0), SGLANG_SYMM_D8(8), SGLANG_SYMM_D8(16), SGLANG_SYMM_D8(24)                 \
                   : "l"(a), "l"(b));                                                                             \
    }                                                                                                             \
  }
SGLANG_SYMM_WGMMA(BFloat16, "bf16");
SGLANG_SYMM_WGMMA(Float16, "f16");
#undef SGLANG_SYMM_WGMMA
#undef SGLANG_SYMM_D8

// ---- fragments ----

// Lane l holds element (l / 4, 2 * (l % 4)) and the next of an 8 x 8 matrix of 16-bit elements; afterwards of its
// transpose.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t word) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(word));
  return transposed;
}

}  // namespace sglang_symm::device
