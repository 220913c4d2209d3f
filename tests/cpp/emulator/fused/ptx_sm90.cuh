// csrc/fused/ptx_sm90.cuh for the emulator: the same names.
#pragma once

#include "collective/vector_cuda.cuh"
#include "hopper.h"

namespace sglang_symm::device {

constexpr uint64_t kEvictNormal = 0, kEvictFirst = 0, kEvictLast = 0;

inline uint32_t shared_address(const void* p) {
  return emulator::shared_address(p);
}

inline void barrier_init(uint64_t* barrier, int arrivals) {
  emulator::barrier_init(barrier, arrivals);
}
inline void barrier_init_visible() {}
inline void barrier_expect(uint64_t* barrier, int bytes) {
  emulator::barrier_arrive(*emulator::self().cta, barrier, bytes);
}
inline void barrier_arrive(uint64_t* barrier) {
  emulator::barrier_arrive(*emulator::self().cta, barrier);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  emulator::barrier_wait(barrier, parity);
}

inline void barrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  emulator::barrier_wait(barrier, parity);
}

inline bool elect_one() {
  emulator::sync(emulator::self().cta->warps[emulator::self().thread / emulator::kWarp].barrier, emulator::kWarp);
  return emulator::self().thread % emulator::kWarp == 0;
}

inline uint32_t cluster_rank() {
  const emulator::Cta& cta = *emulator::self().cta;
  return cta.block.x % cta.grid.cluster;
}
inline void cluster_sync() {
  emulator::cluster_sync();
}
inline void cluster_arrive() {
  emulator::cluster_arrive();
}
inline void cluster_wait() {
  emulator::cluster_wait();
}
inline void barrier_arrive_at(uint64_t* barrier, uint32_t cta) {
  emulator::barrier_arrive(emulator::cta_of_cluster(cta), static_cast<uint64_t*>(emulator::in_cta(barrier, cta)));
}

inline void store_shared_at(uint32_t to, const float* v, uint64_t* barrier, uint32_t cta) {
  emulator::store_shared_at(to, v, 4 * sizeof *v, barrier, cta);
}

inline void load_box(uint32_t to, const CUtensorMap* map, int column, int row, uint64_t* barrier, uint64_t) {
  emulator::load_box(to, *map, column, row, barrier, 1u << cluster_rank());
}
inline void load_box_to_all(uint32_t to, const CUtensorMap* map, int column, int row, uint64_t* barrier, uint16_t ctas,
                            uint64_t) {
  emulator::load_box(to, *map, column, row, barrier, ctas);
}
inline void prefetch_map(const CUtensorMap*) {}
inline void fence_for_copies() {
  emulator::fence_for_copies();
}
inline void copy_out(void* to, uint32_t from, int bytes) {
  emulator::copy_out(to, from, bytes);
}
inline void copies_commit() {
  emulator::copies_commit();
}
inline void copies_read() {
  emulator::copies_wait(false);
}
inline void copies_arrived() {
  emulator::copies_wait(true);
}

inline void store_shared(uint32_t to, uint4 v) {
  emulator::store_shared(to, &v, sizeof v);
}
inline uint4 load_shared(uint32_t from) {
  if (emulator::Machine::now().draw(16) == 0) emulator::yield();
  uint4 v;
  std::memcpy(&v, emulator::shared_at(*emulator::self().cta, from, sizeof v), sizeof v);
  return v;
}
inline float moved(float v) {
  return v;
}
inline void raise(uint32_t* counter, uint32_t to) {
  if (emulator::Machine::now().draw(4) == 0) emulator::yield();
  *counter = to;
}
inline uint32_t raised(const uint32_t* counter) {
  return *counter;
}

inline void store_slot(void* p, uint4 v) {
  store_sys(p, v);
}
inline uint4 load_slot(const void* p) {
  return load_sys(p);
}

// Rounded once: the sum in double is exact, or so near to the larger one that it rounds to it.
template <class Type>
uint32_t add_halves(uint16_t a, uint16_t b) {
  constexpr bool kWide = std::is_same_v<Type, BFloat16>;
  constexpr int kDigits = kWide ? 8 : 11, kLeast = kWide ? -133 : -24;
  const double sum = static_cast<double>(Type::load(a)) + static_cast<double>(Type::load(b));
  if (sum != sum) return 0x7FFF;
  int exponent = 0;
  std::frexp(sum, &exponent);
  const int step = std::max(exponent - kDigits, kLeast);
  const bool finite = !std::isinf(sum) && sum != 0;
  const auto f = static_cast<float>(finite ? std::ldexp(std::nearbyint(std::ldexp(sum, -step)), step) : sum);
  const float pair[2] = {f, f};  // exact, or infinite
  return Type::round(pair) & 0xFFFF;
}
template <class Type>
uint32_t add_pairs(uint32_t a, uint32_t b) {
  return add_halves<Type>(static_cast<uint16_t>(a), static_cast<uint16_t>(b)) |
         add_halves<Type>(static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16)) << 16;
}
template <class Type>
uint32_t larger_or_nan(uint32_t a, uint32_t b) {
  const auto half = [](uint16_t x, uint16_t y) -> uint32_t {
    const float f = Type::load(x), g = Type::load(y);
    return f != f || g != g ? 0x7FFF : f > g ? x : y;
  };
  return half(static_cast<uint16_t>(a), static_cast<uint16_t>(b)) |
         half(static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16)) << 16;
}

inline void wgmma_fence() {}
inline void wgmma_commit() {
  emulator::products_commit();
}
inline void wgmma_wait_all() {
  emulator::products_wait(0);
}
inline void wgmma_wait_previous() {
  emulator::products_wait(1);
}
template <class Type, int N>
struct Wgmma {
  static void add(float (&d)[N / 2], uint64_t a, uint64_t b) { emulator::multiply(d, N, a, b, &Type::load); }
};

inline uint32_t transpose_8x8(uint32_t word) {
  const uint32_t* all = emulator::exchange(word);
  const unsigned lane = emulator::self().thread % emulator::kWarp, row = lane / 4, column = 2 * (lane % 4);
  const auto of = [&](unsigned r, unsigned c) { return all[4 * r + c / 2] >> 16 * (c % 2) & 0xFFFFu; };
  return of(column, row) | of(column + 1, row) << 16;
}

}  // namespace sglang_symm::device
