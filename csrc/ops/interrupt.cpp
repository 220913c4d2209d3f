// Ctrl-C while an op waits for its peers. The library has no Python in it, so the three functions that it needs (all of
// the stable ABI) are looked up in the process; where there is no Python, nothing is interrupted.
#include <dlfcn.h>

#include "base/process.h"
#include "ops/ops.h"

namespace sglang_symm::ops {

namespace {

struct Python {
  int (*ensure_gil)() = nullptr;
  void (*release_gil)(int) = nullptr;
  int (*interrupt_occurred)() = nullptr;
  void (*set_interrupt)() = nullptr;

  Python() {
    ensure_gil = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Ensure"));
    release_gil = reinterpret_cast<void (*)(int)>(dlsym(RTLD_DEFAULT, "PyGILState_Release"));
    interrupt_occurred = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyOS_InterruptOccurred"));
    set_interrupt = reinterpret_cast<void (*)()>(dlsym(RTLD_DEFAULT, "PyErr_SetInterrupt"));
  }
  bool found() const { return ensure_gil && release_gil && interrupt_occurred && set_interrupt; }
};

bool python_was_interrupted() {
  static const Python python;
  if (!python.found()) return false;
  const int state = python.ensure_gil();
  const bool yes = python.interrupt_occurred() != 0;  // true in the main thread only, and clears the signal:
  if (yes) python.set_interrupt();                    // KeyboardInterrupt is to come once the op has raised
  python.release_gil(state);
  return yes;
}

}  // namespace

void install_interrupt_hook() {
  set_interrupt_hook(&python_was_interrupted);
}

}  // namespace sglang_symm::ops
