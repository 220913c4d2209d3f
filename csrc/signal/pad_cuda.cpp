#include "signal/pad_cuda.h"

#include <cuda_runtime_api.h>

#include <algorithm>

namespace sglang_symm {

namespace {

constexpr size_t kMaxSmall = 64 << 10;
constexpr size_t kUnit = 4096;

size_t share(size_t bytes, size_t parts, size_t most) {
  return std::clamp(bytes / parts / kUnit * kUnit, kUnit, most);
}

}  // namespace

LayoutCuda LayoutCuda::of(size_t arena_bytes, int world_size) {
  const size_t world = static_cast<size_t>(world_size);
  LayoutCuda layout;
  layout.small_bytes = share(arena_bytes, 256 * world, kMaxSmall);
  layout.slot_bytes = std::max(share(arena_bytes, 8, kMaxSlots), world * kUnit);
  layout.staging_bytes = share(arena_bytes, 16, kMaxStaging);
  layout.small = (sizeof(PadCuda) + kUnit - 1) / kUnit * kUnit;
  layout.slots = layout.small + 2 * world * 2 * layout.small_bytes;
  layout.staging_in = layout.slots + 2 * layout.slot_bytes;
  layout.staging_out = layout.staging_in + layout.staging_bytes;
  layout.heap = layout.staging_out + layout.staging_bytes;
  return layout;
}

void mark_broken(PadCuda* pad) {
  const uint32_t broken = 1;
  for (GateCuda& gate : pad->gate) (void)cudaMemcpy(&gate.broken, &broken, sizeof broken, cudaMemcpyHostToDevice);
}

}  // namespace sglang_symm
