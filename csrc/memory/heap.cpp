#include "memory/heap.h"

#include <algorithm>
#include <iterator>

#include "base/error.h"

namespace sglang_symm {

Heap::Heap(size_t begin, size_t bytes, size_t alignment)
    : bytes_(bytes / alignment * alignment), alignment_(alignment) {
  if (bytes_ != 0) insert_free(begin, bytes_);
}

std::optional<size_t> Heap::allocate(size_t bytes) {
  if (bytes > bytes_) return std::nullopt;  // also keeps the rounding below from overflowing
  const size_t rounded = (std::max<size_t>(bytes, 1) + alignment_ - 1) / alignment_ * alignment_;
  const auto fit = free_by_size_.lower_bound({rounded, 0});
  if (fit == free_by_size_.end()) return std::nullopt;
  const auto [block_bytes, offset] = *fit;
  erase_free(free_by_offset_.find(offset));
  if (block_bytes > rounded) insert_free(offset + rounded, block_bytes - rounded);
  live_.emplace(offset, rounded);
  allocated_ += rounded;
  peak_ = std::max(peak_, allocated_);
  return offset;
}

void Heap::free(size_t offset) {
  const auto block = live_.find(offset);
  if (block == live_.end())
    fail(ErrorKind::argument, "free of offset ", offset, ", which is no live block of this arena");
  size_t begin = offset;
  size_t bytes = block->second;
  live_.erase(block);
  allocated_ -= bytes;
  const auto next = free_by_offset_.lower_bound(offset);
  if (next != free_by_offset_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == begin) {
      begin = previous->first;
      bytes += previous->second;
      erase_free(previous);
    }
  }
  if (next != free_by_offset_.end() && begin + bytes == next->first) {
    bytes += next->second;
    erase_free(next);
  }
  insert_free(begin, bytes);
}

void Heap::insert_free(size_t offset, size_t bytes) {
  free_by_offset_.emplace(offset, bytes);
  free_by_size_.emplace(bytes, offset);
}

void Heap::erase_free(std::map<size_t, size_t>::iterator block) {
  free_by_size_.erase({block->second, block->first});
  free_by_offset_.erase(block);
}

}  // namespace sglang_symm
