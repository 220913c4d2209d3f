// Ranks as threads of one process: the core includes no torch, so its protocol can be tested in milliseconds, and under
// ThreadSanitizer.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <barrier>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "collective/sum.h"
#include "group/group.h"

namespace sglang_symm::testing {

inline GroupConfig small_config(int rank, int world_size) {
  GroupConfig config;
  config.name = "test";
  config.rank = rank;
  config.world_size = world_size;
  config.arena_bytes = 1 << 20;
  config.deadlines = {3, 3};
  return config;
}

using Body = std::function<void(Group&)>;
using Configure = std::function<void(GroupConfig&)>;

// Makes a group of `world_size` threads and runs `body` on each. Returns each rank's error, empty where there was none.
inline std::vector<std::string> run_ranks(int world_size, const Body& body, const Configure& configure = {}) {
  std::vector<std::string> addresses(static_cast<size_t>(world_size));
  std::vector<std::string> errors(static_cast<size_t>(world_size));
  std::barrier together(world_size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world_size; rank++) {
    threads.emplace_back([&, rank] {
      std::unique_ptr<Group> group;
      try {
        GroupConfig config = small_config(rank, world_size);
        if (configure) configure(config);
        group = std::make_unique<Group>(config);
        addresses[static_cast<size_t>(rank)] = group->address();
        together.arrive_and_wait();
        group->connect(addresses);
        body(*group);
      } catch (const std::exception& error) {
        errors[static_cast<size_t>(rank)] = error.what();
      }
      together.arrive_and_wait();  // nobody says bye while others still work
    });
  }
  for (std::thread& thread : threads) thread.join();
  return errors;
}

// How many repetitions a randomised test makes: `few` by default, SGLANG_SYMM_TEST_N when that is set (long runs).
inline int repetitions(int few) {
  const char* text = std::getenv("SGLANG_SYMM_TEST_N");
  return text != nullptr && std::atoi(text) > 0 ? std::atoi(text) : few;
}

inline void expect_no_errors(const std::vector<std::string>& errors) {
  for (size_t r = 0; r < errors.size(); r++) EXPECT_EQ(errors[r], "") << "rank " << r;
}

// Rank r's element i: small integers, so that sums are exact and every wrong or missing addend shows.
inline float value(int rank, size_t i) {
  return static_cast<float>((static_cast<size_t>(rank) * 7 + i * 3) % 61) - 30;
}

inline Descriptor describe(OpCode op, Algorithm algorithm, DType dtype, uint64_t count) {
  Descriptor d;
  d.op = op;
  d.algorithm = algorithm;
  d.dtype = dtype;
  d.count = count;
  return d;
}

inline void all_reduce(Group& group, Algorithm algorithm, std::vector<float>& x) {
  group.collectives().all_reduce(describe(OpCode::all_reduce, algorithm, DType::float32, x.size()),
                                 {x.data(), x.data(), x.size(), DType::float32});
}

}  // namespace sglang_symm::testing
