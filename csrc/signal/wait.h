// Waiting on the CPU: spin a few microseconds, then yield, then sleep, so that more ranks than cores still progress.
// Pure spinning costs two scheduler ticks (8 ms) a call as soon as ranks outnumber cores; a yield 0.3 us.
#pragma once

#include <sched.h>
#include <time.h>

#include <cstdint>

#include "base/clock.h"

namespace sglang_symm {

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct WaitPolicy {
  int spins;                     // before the first yield
  int64_t yield_ns = 2'000'000;  // before the first sleep
  int64_t sleep_ns = 50'000;
  // Ranks that outnumber the cores gain nothing by spinning: the peer may be waiting for this very core.
  static WaitPolicy for_ranks(int world_size, int cores) { return {world_size <= cores ? 400 : 4}; }
};

// Calls ready() until it is true (-> true) or give_up() is (-> false). ready() is asked first and last: data that
// arrived counts although an abort arrived as well. give_up() is asked only once spinning has ended and may be slow.
template <class Ready, class GiveUp>
bool wait_until(const WaitPolicy& policy, const Ready& ready, const GiveUp& give_up) {
  for (int i = 0; i < policy.spins; i++) {
    if (ready()) return true;
    cpu_pause();
  }
  const int64_t start = now_ns();
  for (;;) {
    if (ready()) return true;
    if (give_up()) return ready();
    if (now_ns() - start < policy.yield_ns) {
      sched_yield();
    } else {
      const timespec nap{0, policy.sleep_ns};
      nanosleep(&nap, nullptr);
    }
  }
}

}  // namespace sglang_symm
