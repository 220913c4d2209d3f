// Ranks with an emulated GPU each: CollectivesCuda and its kernels over arenas in shared memory.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "collective/collectives_cuda.h"
#include "collective/sum.h"
#include "emulator.h"
#include "memory/segment_cpu.h"
#include "ranks.h"

namespace sglang_symm::testing {

// How many seeds a randomised test takes.
inline uint64_t seeds(int few) {
  return static_cast<uint64_t>(repetitions(few));
}

struct Gpu {
  std::unique_ptr<SignalCpu> signal;
  std::shared_ptr<ArenaCuda> arena;
  std::unique_ptr<CollectivesCuda> collectives;
  emulator::Stream stream;

  // Of the arena's heap: tensors that peers may be told of.
  template <class T>
  T* inside(size_t count) {
    return static_cast<T*>(arena->allocate(count * sizeof(T) + 1));
  }
};

// Whose arena `rank` maps as that of `peer`.
using Mapping = std::function<int(int rank, int peer)>;

class Gpus {
 public:
  // For kernels `seconds` is the emulator's time: 10,000 steps each. With a `mapping` that is wrong there are errors
  // and no collectives.
  explicit Gpus(int size, uint64_t seed, double seconds = 1e6, int max_ctas = 2, size_t arena_bytes = 4 << 20,
                const Mapping& mapping = {})
      : machine(seed), errors(static_cast<size_t>(size)) {
    const LayoutCuda layout = LayoutCuda::of(arena_bytes, size);
    for (int r = 0; r < size; r++) {
      Gpu& gpu = *gpus_.emplace_back(std::make_unique<Gpu>());
      gpu.signal = std::make_unique<SignalCpu>("g", r, size, Deadlines{seconds, seconds});
      gpu.arena = std::make_shared<ArenaCuda>(SegmentCpu::create(arena_bytes, "gpu"),
                                              ArenaLayout{layout.heap, arena_bytes, 512}, r);
    }
    for (int r = 0; r < size; r++) {
      for (int peer = 0; peer < size; peer++) {
        if (peer == r) continue;
        (*this)[r].signal->attach(peer, Fd(dup((*this)[peer].signal->fd())));
        const int mapped = mapping ? mapping(r, peer) : peer;
        (*this)[r].arena->attach(peer, SegmentCpu::import(Fd(dup((*this)[mapped].arena->fd())), arena_bytes));
      }
    }
    std::vector<std::thread> threads;  // they prove their windows to each other
    for (int r = 0; r < size; r++) {
      threads.emplace_back([&, r] {
        Gpu& gpu = (*this)[r];
        try {
          gpu.collectives =
              std::make_unique<CollectivesCuda>("g", gpu.arena, *gpu.signal, 0, r, size, layout, max_ctas);
          if ((seed >> (r % 16) & 1) != 0) gpu.collectives->let_peers_read();  // a rank's own affair
        } catch (const Error& error) {
          errors[static_cast<size_t>(r)] = error.what();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::string& error : errors) {
      if (!mapping && !error.empty()) throw std::runtime_error(error);
    }
  }

  int size() const { return static_cast<int>(gpus_.size()); }
  Gpu& operator[](int rank) { return *gpus_[static_cast<size_t>(rank)]; }
  PadCuda& pad(int rank) { return *reinterpret_cast<PadCuda*>((*this)[rank].arena->base()); }
  const LayoutCuda& layout() { return gpus_[0]->collectives->layout(); }
  void run(uint64_t most = 10'000'000) { machine.run(most); }

  emulator::Machine machine;
  std::vector<std::string> errors;  // of the ranks, when they proved their windows

 private:
  std::vector<std::unique_ptr<Gpu>> gpus_;
};

// Bits of a number that is exact in every dtype, so that each wrong or missing addend shows.
inline uint32_t bits_of(float value, DType dtype) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return dtype == DType::float32 ? bits : from_float(value, dtype);
}

inline float to_float32(const std::byte* data, size_t i, DType dtype) {
  if (dtype == DType::float32) {
    float f;
    std::memcpy(&f, data + 4 * i, 4);
    return f;
  }
  uint16_t bits;
  std::memcpy(&bits, data + 2 * i, 2);
  return to_float(bits, dtype);
}

// Elements of one dtype with bytes around them that nobody may touch.
class Buffer {
 public:
  Buffer(size_t count, DType dtype, size_t misalignment = 0)
      : bytes_(count * element_size(dtype)), start_(32 + misalignment), memory_(bytes_ + 96, std::byte{0x5A}) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    start_ += (16 - address % 16) % 16;
  }
  std::byte* data() { return memory_.data() + start_; }
  size_t bytes() const { return bytes_; }
  bool untouched_around() const {
    for (size_t i = 0; i < memory_.size(); i++) {
      if ((i < start_ || i >= start_ + bytes_) && memory_[i] != std::byte{0x5A}) return false;
    }
    return true;
  }
  friend bool operator==(const Buffer& a, const Buffer& b) {
    return a.bytes_ == b.bytes_ && std::memcmp(a.memory_.data() + a.start_, b.memory_.data() + b.start_, a.bytes_) == 0;
  }

 private:
  size_t bytes_, start_;
  std::vector<std::byte> memory_;
};

// Random floats, a few infinities and NaNs of all kinds among them.
inline void fill_at_random(std::byte* data, size_t count, DType dtype, std::mt19937_64& random) {
  for (size_t i = 0; i < count; i++) {
    uint64_t draw = random();
    uint32_t bits = bits_of(static_cast<float>(static_cast<int64_t>(draw % 2001) - 1000) / 8.0f, dtype);
    if (draw >> 40 & 1) bits ^= static_cast<uint32_t>(random()) & (dtype == DType::float32 ? 0x7FFFFFu : 0x3Fu);
    if ((draw >> 50) % 97 == 0) bits = static_cast<uint32_t>(random());
    if ((draw >> 50) % 89 == 0) bits = 0xFFFFFFFFu;  // what slots rest at
    std::memcpy(data + i * element_size(dtype), &bits, element_size(dtype));
  }
}

// For all CTAs of all kernels to come.
inline void expect_broken(const PadCuda& pad) {
  for (int i = 0; i < kGates; i++) EXPECT_EQ(pad.gate[i].broken, 1u) << "gate " << i;
}

// What every call leaves behind: equal epochs, slots that hold the sentinel.
inline void expect_at_rest(Gpus& gpus) {
  for (int r = 0; r < gpus.size(); r++) {
    const PadCuda& pad = gpus.pad(r);
    for (int i = 0; i < kGates; i++) EXPECT_EQ(pad.gate[i].broken, 0u) << "rank " << r << ", gate " << i;
    for (int c = 1; c < kMaxCtas; c++) ASSERT_EQ(pad.epoch(c), pad.epoch(0)) << "rank " << r << ", CTA " << c;
    EXPECT_EQ(pad.epoch(0), gpus.pad(0).epoch(0)) << "rank " << r;
    const auto* word = reinterpret_cast<const uint32_t*>(gpus[r].arena->base() + gpus.layout().slots);
    for (size_t i = 0; i < 2 * gpus.layout().slot_bytes / 4; i++) {
      ASSERT_EQ(word[i], kSentinel) << "rank " << r << ", word " << i << " of the slots";
    }
  }
}

}  // namespace sglang_symm::testing
