#include "base/process.h"

#include <pthread.h>

#include <atomic>

namespace sglang_symm {

namespace {
std::atomic<uint64_t> generation{0};
std::atomic<InterruptHook> interrupt_hook{nullptr};
}  // namespace

uint64_t fork_generation() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { generation.fetch_add(1); });
  (void)registered;
  return generation.load(std::memory_order_relaxed);
}

void set_interrupt_hook(InterruptHook hook) {
  interrupt_hook.store(hook);
}

bool interrupted() {
  const InterruptHook hook = interrupt_hook.load();
  return hook != nullptr && hook();
}

}  // namespace sglang_symm
