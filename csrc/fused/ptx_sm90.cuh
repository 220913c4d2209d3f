// The instructions of Hopper that the fused kernels are made of, by name: barriers in shared memory, the bulk tensor
// copy engine (TMA), the asynchronous matrix product of a warpgroup (wgmma).
#pragma once

#include <cuda.h>

#include <type_traits>

#include "collective/vector_cuda.cuh"

namespace sglang_symm::device {

// How long L2 keeps a line: weights are read once, tokens and slots soon again.
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
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

// What a CTA of the cluster has stored with the barrier is then seen.
__device__ __forceinline__ void barrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again_%=:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@!done bra "
      "again_%=;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// One lane of the warp, all of which must be here. Unlike lane == 0 the assembler knows that it is one: without that
// each fetch of the copy engine is a loop over lanes, of 60 cycles.
__device__ __forceinline__ bool elect_one() {
  uint32_t chosen;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(chosen));
  return chosen != 0;
}

// ---- clusters ----

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same in two halves, once a kernel, all threads each: the other CTAs have come so far, and their barriers are
// initialized (barrier_init_visible). A release is a fence, which waits for what has been asked of memory: 1.2 us a
// call when the first weights had been.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Arrives at the barrier of the same name in a CTA of the cluster. With the scope of a CTA: nothing but reads goes
// before, and a release to the cluster would be a fence of the whole GPU (3 times the time of a step of k).
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, uint32_t cta) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(cta)
      : "memory");
}

// 16 bytes to the same place in a CTA of the cluster, whose barrier of the same name counts them. That CTA must not
// have left; this one may leave at once.
__device__ __forceinline__ void store_shared_at(uint32_t to, const float* v, uint64_t* barrier, uint32_t cta) {
  asm volatile(
      "{\n.reg .b32 there, counts;\nmapa.shared::cluster.u32 there, %0, %6;\nmapa.shared::cluster.u32 counts, %1, %6;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%2, %3, %4, %5}, [counts];\n}" ::"r"(
          to),
      "r"(shared_address(barrier)), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(cta)
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
// The same to every CTA of the cluster in `ctas`, at the same place of each, counted by the barrier of each.
__device__ __forceinline__ void load_box_to_all(uint32_t to, const CUtensorMap* map, int column, int row,
                                                uint64_t* barrier, uint16_t ctas, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(ctas), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Bytes of shared memory to any GPU's memory, by the copy engine. What threads stored must pass fence_for_copies first.
__device__ __forceinline__ void fence_for_copies() {
  asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void copy_out(void* to, uint32_t from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// This thread's copies have read their source; have arrived.
__device__ __forceinline__ void copies_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void copies_arrived() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// ---- shared memory ----

__device__ __forceinline__ void store_shared(uint32_t to, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ uint4 load_shared(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
// A counter that a warp raises for other warps of its CTA: what it did before is seen by who sees the counter.
__device__ __forceinline__ void raise(uint32_t* counter, uint32_t to) {
  asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(shared_address(counter)), "r"(to) : "memory");
}
__device__ __forceinline__ uint32_t raised(const uint32_t* counter) {
  uint32_t v;
  asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared_address(counter)) : "memory");
  return v;
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

// ---- two 16-bit numbers a word ----

// Sums, rounded once to nearest even: of two numbers the same bits as a sum in fp32 that is rounded then, since fp32
// has 24 digits, 2 more than twice as many as they (tests of tests/cpp/kernels for the formula, of tests/gpu for this).
// A NaN is 0x7FFF.
template <class Type>
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
  uint32_t sums;
  if constexpr (std::is_same_v<Type, BFloat16>) {
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sums) : "r"(a), "r"(b));
  } else {
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sums) : "r"(a), "r"(b));
  }
  return sums;
}
// NaN where a or b is NaN, else the larger one.
template <class Type>
__device__ __forceinline__ uint32_t larger_or_nan(uint32_t a, uint32_t b) {
  uint32_t larger;
  if constexpr (std::is_same_v<Type, BFloat16>) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  }
  return larger;
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
// All but the last committed group.
__device__ __forceinline__ void wgmma_wait_previous() {
  asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}

// d[64 x N] += a[64 x 16] b[N x 16]^T in fp32. A thread holds rows warp * 16 + lane / 4 (+ 8) and, of every 8 columns,
// 2 * (lane % 4) (+ 1): d[4 j + 2 h + i] is row + 8 h, column 8 j + i.
template <class Type, int N>
struct Wgmma;

// Accumulators d[n] .. d[n + 7] as operands; the names of the first N / 2 operands.
#define SGLANG_SYMM_D8(n)                                                                                     \
  "+f"(d[n]), "+f"(d[n + 1]), "+f"(d[n + 2]), "+f"(d[n + 3]), "+f"(d[n + 4]), "+f"(d[n + 5]), "+f"(d[n + 6]), \
      "+f"(d[n + 7])
#define SGLANG_SYMM_D16(n) SGLANG_SYMM_D8(n), SGLANG_SYMM_D8(n + 8)
#define SGLANG_SYMM_D32(n) SGLANG_SYMM_D16(n), SGLANG_SYMM_D16(n + 16)
#define SGLANG_SYMM_D64(n) SGLANG_SYMM_D32(n), SGLANG_SYMM_D32(n + 32)
#define SGLANG_SYMM_D128(n) SGLANG_SYMM_D64(n), SGLANG_SYMM_D64(n + 64)
#define SGLANG_SYMM_NAMES16 "%0,%1,%2,%3,%4,%5,%6,%7"
#define SGLANG_SYMM_NAMES32 SGLANG_SYMM_NAMES16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define SGLANG_SYMM_NAMES64 SGLANG_SYMM_NAMES32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SGLANG_SYMM_NAMES128                                         \
  SGLANG_SYMM_NAMES64                                                \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
  ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define SGLANG_SYMM_NAMES256                                                     \
  SGLANG_SYMM_NAMES128                                                           \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"             \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"             \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define SGLANG_SYMM_WGMMA_OF(Type, text, n, names, operands, ...)                                            \
  template <>                                                                                                \
  struct Wgmma<Type, n> {                                                                                    \
    static __device__ __forceinline__ void add(float (&d)[n / 2], uint64_t a, uint64_t b) {                  \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." text "." text " {" names "}, " operands \
                   ", 1, 1, 1, 0, 0;"                                                                        \
                   : __VA_ARGS__                                                                             \
                   : "l"(a), "l"(b));                                                                        \
    }                                                                                                        \
  }
#define SGLANG_SYMM_WGMMA(Type, text)                                                          \
  SGLANG_SYMM_WGMMA_OF(Type, text, 16, SGLANG_SYMM_NAMES16, "%8, %9", SGLANG_SYMM_D8(0));      \
  SGLANG_SYMM_WGMMA_OF(Type, text, 32, SGLANG_SYMM_NAMES32, "%16, %17", SGLANG_SYMM_D16(0));   \
  SGLANG_SYMM_WGMMA_OF(Type, text, 64, SGLANG_SYMM_NAMES64, "%32, %33", SGLANG_SYMM_D32(0));   \
  SGLANG_SYMM_WGMMA_OF(Type, text, 128, SGLANG_SYMM_NAMES128, "%64, %65", SGLANG_SYMM_D64(0)); \
  SGLANG_SYMM_WGMMA_OF(Type, text, 256, SGLANG_SYMM_NAMES256, "%128, %129", SGLANG_SYMM_D128(0))
SGLANG_SYMM_WGMMA(BFloat16, "bf16");
SGLANG_SYMM_WGMMA(Float16, "f16");
#undef SGLANG_SYMM_WGMMA
#undef SGLANG_SYMM_WGMMA_OF
#undef SGLANG_SYMM_NAMES16
#undef SGLANG_SYMM_NAMES32
#undef SGLANG_SYMM_NAMES64
#undef SGLANG_SYMM_NAMES128
#undef SGLANG_SYMM_NAMES256
#undef SGLANG_SYMM_D8
#undef SGLANG_SYMM_D16
#undef SGLANG_SYMM_D32
#undef SGLANG_SYMM_D64
#undef SGLANG_SYMM_D128

// In a register of its own, whatever the compiler would do.
__device__ __forceinline__ float moved(float v) {
  float to;
  asm volatile("mov.b32 %0, %1;" : "=f"(to) : "f"(v));
  return to;
}

// ---- fragments ----

// Lane l holds element (l / 4, 2 * (l % 4)) and the next of an 8 x 8 matrix of 16-bit elements; afterwards of its
// transpose.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t word) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(word));
  return transposed;
}

}  // namespace sglang_symm::device
