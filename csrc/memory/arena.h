// One arena a group a device: this rank's segment, a heap inside it, and the peers' segments as windows.
//
//   0            slots: 2 parities x slot_bytes          fixed, sized at creation
//   heap_offset  heap: blocks that allocate() hands out  the rest
//
// allocate() and free() are local: no collective, no lock shared between ranks. A block may outlive the group: the
// arena stays mapped until its last block is freed (ArenaRegistry below keeps it). ArenaCuda gives blocks back in the
// order of streams.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <vector>

#include "base/dtype.h"
#include "base/stream.h"
#include "memory/heap.h"
#include "memory/segment.h"

namespace sglang_symm {

struct ArenaLayout {
  size_t fixed_bytes;  // everything before the heap
  size_t arena_bytes;
  size_t alignment;
};

struct ArenaStats {
  size_t arena_bytes, heap_bytes, allocated_bytes, peak_bytes, free_bytes, largest_free_bytes, live_blocks;
};

class Arena {
 public:
  Arena(std::unique_ptr<Segment> own, const ArenaLayout& layout, int rank);
  virtual ~Arena() = default;

  // A peer's arena as this process sees it. attach() is called once a peer, before the group's first call.
  void attach(int peer, std::unique_ptr<Segment> segment);
  std::byte* window(int rank) const { return windows_[static_cast<size_t>(rank)]; }

  std::byte* base() const { return own_->data(); }
  size_t bytes() const { return own_->bytes(); }
  int fd() const { return own_->fd(); }
  size_t heap_offset() const { return layout_.fixed_bytes; }

  // A block for work in `stream`; nullptr when full.
  virtual void* allocate(size_t bytes, Stream stream = nullptr);
  virtual void free(void* pointer);
  // The graph that is being captured in `stream`, 0 for none: what a graph allocates is its own for ever.
  virtual uint64_t capture_in(Stream) const { return 0; }
  // The group is gone. From then on finished() tells when nothing lives here any more.
  virtual void retire();
  bool finished() const;
  bool contains(const void* pointer, size_t bytes) const;
  // Offset of a range that lies inside this rank's arena, or nothing.
  std::optional<size_t> offset_of(const void* pointer, size_t bytes) const;
  ArenaStats stats() const;

 protected:
  std::byte* at(size_t offset) const { return base() + offset; }
  size_t offset(const void* pointer) const {
    return static_cast<size_t>(static_cast<const std::byte*>(pointer) - base());
  }
  mutable std::mutex mutex_;
  Heap heap_;             // guarded by mutex_
  bool retired_ = false;  // guarded by mutex_

 private:
  std::unique_ptr<Segment> own_;
  ArenaLayout layout_;
  std::array<std::unique_ptr<Segment>, kMaxWorldSize> peers_;
  std::array<std::byte*, kMaxWorldSize> windows_{};
};

// Finds the arena of an address, for deleters that are given nothing else (PyTorch's raw_deleter).
class ArenaRegistry {
 public:
  static ArenaRegistry& instance();  // never destroyed: tensors may be freed while the process exits
  void add(std::shared_ptr<Arena> arena);
  // The group is gone: the arena is unmapped now, or with its last live block.
  void retire(const Arena* arena);
  // Frees a block of some arena; false when the address is in none.
  bool free(void* pointer);
  // Unmaps the retired arenas in which nothing lives any more.
  void collect();
  std::shared_ptr<Arena> find(const void* pointer) const;
  size_t size() const;

 private:
  mutable std::shared_mutex mutex_;
  std::vector<std::shared_ptr<Arena>> arenas_;  // sorted by base address
};

}  // namespace sglang_symm
