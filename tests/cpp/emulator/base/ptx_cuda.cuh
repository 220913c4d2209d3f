// csrc/base/ptx_cuda.cuh for the emulator: the same names.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace sglang_symm::device {

inline void store_sys(void* p, uint4 v) {
  emulator::store(p, &v, sizeof v);
}
inline uint4 load_sys(const void* p) {
  uint4 v;
  emulator::load(&v, p, sizeof v);
  return v;
}
inline void store_sys(uint32_t* p, uint32_t v) {
  emulator::store(p, &v, sizeof v);
}
inline uint32_t load_sys(const uint32_t* p) {
  uint32_t v;
  emulator::load(&v, p, sizeof v);
  return v;
}
inline void store_release(uint32_t* p, uint32_t v) {
  emulator::fence();
  emulator::store(p, &v, sizeof v);
}
inline uint32_t load_acquire(const uint32_t* p) {
  return load_sys(p);
}
inline uint4 load_acquire(const void* p) {
  return load_sys(p);
}
inline void fence_sys() {
  emulator::fence();
}
inline uint64_t time_ns() {
  return emulator::Machine::now().time_ns();
}

inline void wait_for_previous_kernel() {
  emulator::Grid& grid = emulator::self().cta->grid;
  if (grid.stream->grids.front().get() == &grid) return;
  grid.waiting_for_previous.push_back(&emulator::self());
  emulator::block();
}
inline void let_next_kernel_in() {
  bool& lets = emulator::self().cta->lets_next_in;
  if (!lets) emulator::Machine::now().grids_changed();
  lets = true;
}
inline void make_now(uint32_t) {}

template <int Barrier>
inline void named_barrier_arrive(uint32_t threads) {
  emulator::arrive(emulator::self().cta->named[Barrier], threads);
}
template <int Barrier>
inline void named_barrier_sync(uint32_t threads) {
  emulator::sync(emulator::self().cta->named[Barrier], threads);
}
template <int Barrier>
inline void named_barrier_sync_warps(uint32_t threads) {
  named_barrier_sync<Barrier>(threads);
}

// To nearest even by integers, as csrc/collective/sum.cpp does; NaN is 0x7FFF, as the instruction gives it.
inline uint32_t bfloat16_bits(float f) {
  const uint32_t bits = __float_as_uint(f);
  if (f != f) return 0x7FFFu;
  return (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
}
inline uint32_t float16_bits(float f) {
  if (f != f) return 0x7FFFu;
  const uint32_t sign = __float_as_uint(f) >> 16 & 0x8000u;
  const float magnitude = std::fabs(f);
  if (magnitude >= 65520.0f) return sign | 0x7C00u;
  // Neighbours lie 2^step apart; 2^-24 below 2^-14.
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int step = magnitude < 0x1p-14f ? -24 : exponent - 11;
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -step)));
  return sign | (units + (static_cast<uint32_t>(step + 24) << 10));
}
inline uint32_t bfloat16_pair(float low, float high) {
  return bfloat16_bits(low) | bfloat16_bits(high) << 16;
}
inline uint32_t float16_pair(float low, float high) {
  return float16_bits(low) | float16_bits(high) << 16;
}

inline std::byte* dynamic_shared_memory() {
  return emulator::self().cta->shared.data();
}

}  // namespace sglang_symm::device
