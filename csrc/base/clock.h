// Monotonic time and deadlines. Every wait in the library is bounded by a Deadline.
#pragma once

#include <time.h>

#include <cstdint>

namespace sglang_symm {

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

class Deadline {
 public:
  explicit Deadline(double seconds) : seconds_(seconds), end_ns_(now_ns() + static_cast<int64_t>(seconds * 1e9)) {}
  bool passed() const { return now_ns() >= end_ns_; }
  double seconds() const { return seconds_; }  // the whole span, for messages
  // What is left, for poll(2): at least 0, at most an hour.
  int left_ms() const {
    const int64_t left = (end_ns_ - now_ns()) / 1'000'000;
    return left < 0 ? 0 : left > 3'600'000 ? 3'600'000 : static_cast<int>(left);
  }

 private:
  double seconds_;
  int64_t end_ns_;
};

}  // namespace sglang_symm
