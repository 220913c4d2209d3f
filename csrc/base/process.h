// What the core asks of the process around it: has it forked, has the user interrupted it.
#pragma once

#include <cstdint>

namespace sglang_symm {

// Grows in a forked child: what was made under another generation belongs to the parent.
uint64_t fork_generation();

// Asked now and then by code that waits for peers: true once when the user wants the wait to end (Ctrl-C). The core
// knows no interpreter, so whoever embeds it says how to find out; without a hook the answer is no.
using InterruptHook = bool (*)();
void set_interrupt_hook(InterruptHook hook);
bool interrupted();

}  // namespace sglang_symm
