// A pure offset allocator: best fit, immediate coalescing. It touches no memory and talks to nobody,
// so each rank may have its own allocation history: a call's header carries the sender's offset.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>

namespace sglang_symm {

class Heap {
 public:
  // Offsets lie in [begin, begin + bytes) and are multiples of `alignment` (a power of two), as `begin` must be.
  Heap(size_t begin, size_t bytes, size_t alignment);

  // The offset of a block of at least max(bytes, 1), or nothing when no free block is large enough.
  std::optional<size_t> allocate(size_t bytes);
  // Gives a block back; an offset that is not a live block's is an error.
  void free(size_t offset);

  size_t bytes() const { return bytes_; }
  size_t allocated() const { return allocated_; }  // rounded to the alignment
  size_t peak() const { return peak_; }
  size_t free_bytes() const { return bytes_ - allocated_; }
  size_t largest_free() const { return free_by_size_.empty() ? 0 : free_by_size_.rbegin()->first; }
  size_t live_blocks() const { return live_.size(); }

 private:
  void insert_free(size_t offset, size_t bytes);
  void erase_free(std::map<size_t, size_t>::iterator block);

  size_t bytes_;
  size_t alignment_;
  size_t allocated_ = 0;
  size_t peak_ = 0;
  std::map<size_t, size_t> free_by_offset_;           // offset -> bytes
  std::set<std::pair<size_t, size_t>> free_by_size_;  // (bytes, offset)
  std::unordered_map<size_t, size_t> live_;           // offset -> bytes
};

}  // namespace sglang_symm
