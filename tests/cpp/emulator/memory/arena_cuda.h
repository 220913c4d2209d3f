// csrc/memory/arena_cuda.h for the emulator: an arena in shared memory of the host, mapped by each rank at an address
// of its own. Streams have no say in when a block is free.
#pragma once

#include <memory>
#include <utility>

#include "base/driver_cuda.h"
#include "memory/arena.h"

namespace sglang_symm {

class ArenaCuda final : public Arena {
 public:
  ArenaCuda(std::unique_ptr<Segment> own, const ArenaLayout& layout, int rank) : Arena(std::move(own), layout, rank) {}
  void keep_for(const CaptureCuda&) {}
};

}  // namespace sglang_symm
