// Instructions that CUDA C++ has no name for, by name. Kernels hold no assembler beside this file and
// fused/ptx_sm90.cuh: so tests/cpp/emulator, which has functions of the same names, runs them on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace sglang_symm::device {

// ---- memory accesses that another GPU takes part in ----

__device__ __forceinline__ void store_sys(void* p, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ uint4 load_sys(const void* p) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_sys(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.sys.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ uint32_t load_sys(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.global.b32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.sys.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.sys.global.b32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_acquire(const void* p) {  // each word of it
  uint4 v;
  asm volatile("ld.acquire.sys.global.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ void fence_sys() {
  asm volatile("fence.acq_rel.sys;" ::: "memory");
}
__device__ __forceinline__ uint64_t time_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

// ---- programmatic launch ----

// The kernel before this one has ended, and all that it wrote is seen.
__device__ __forceinline__ void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
// The kernel behind may be brought in once all CTAs have said so: it runs up to its own wait.
__device__ __forceinline__ void let_next_kernel_in() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// What is made before wait_for_previous_kernel() costs no time after it, because the kernel before this one still
// runs. But the assembler moves arithmetic to behind the wait, unless an instruction before it uses the result: this
// one does, and almost never runs.
__device__ __forceinline__ void make_now(uint32_t bits) {
  asm volatile("{ .reg .pred p; setp.eq.u32 p, %0, 0x9E3779B9; @p nanosleep.u32 0; }" ::"r"(bits));
}

// ---- named barriers of a CTA ----

template <int Barrier>
__device__ __forceinline__ void named_barrier_arrive(uint32_t threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"n"(Barrier), "r"(threads) : "memory");
}
template <int Barrier>
__device__ __forceinline__ void named_barrier_sync(uint32_t threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"n"(Barrier), "r"(threads) : "memory");
}
// All lanes of each warp together.
template <int Barrier>
__device__ __forceinline__ void named_barrier_sync_warps(uint32_t threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"n"(Barrier), "r"(threads) : "memory");
}

// ---- conversions, to nearest even; a NaN becomes 0x7FFF ----

__device__ __forceinline__ uint32_t bfloat16_pair(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ uint32_t float16_pair(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// The shared memory that the launch asked for.
__device__ __forceinline__ std::byte* dynamic_shared_memory() {
  extern __shared__ std::byte memory[];
  return memory;
}

}  // namespace sglang_symm::device
