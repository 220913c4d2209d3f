#include "memory/arena.h"

#include <algorithm>

#include "base/error.h"

namespace sglang_symm {

Arena::Arena(std::unique_ptr<Segment> own, const ArenaLayout& layout, int rank)
    : heap_(layout.fixed_bytes, layout.arena_bytes - layout.fixed_bytes, layout.alignment),
      own_(std::move(own)),
      layout_(layout) {
  windows_[static_cast<size_t>(rank)] = own_->data();
}

void Arena::attach(int peer, std::unique_ptr<Segment> segment) {
  windows_[static_cast<size_t>(peer)] = segment->data();
  peers_[static_cast<size_t>(peer)] = std::move(segment);
}

void* Arena::allocate(size_t bytes, Stream) {
  const std::lock_guard lock(mutex_);
  const auto offset = heap_.allocate(bytes);
  return offset ? at(*offset) : nullptr;
}

void Arena::free(void* pointer) {
  const std::lock_guard lock(mutex_);
  heap_.free(offset(pointer));
}

void Arena::retire() {
  const std::lock_guard lock(mutex_);
  retired_ = true;
}

bool Arena::finished() const {
  const std::lock_guard lock(mutex_);
  return retired_ && heap_.live_blocks() == 0;
}

bool Arena::contains(const void* pointer, size_t bytes) const {
  const auto* p = static_cast<const std::byte*>(pointer);
  return p >= base() && p <= base() + this->bytes() && bytes <= static_cast<size_t>(base() + this->bytes() - p);
}

std::optional<size_t> Arena::offset_of(const void* pointer, size_t bytes) const {
  if (!contains(pointer, bytes)) return std::nullopt;
  return static_cast<size_t>(static_cast<const std::byte*>(pointer) - base());
}

ArenaStats Arena::stats() const {
  const std::lock_guard lock(mutex_);
  return {bytes(),
          heap_.bytes(),
          heap_.allocated(),
          heap_.peak(),
          heap_.free_bytes(),
          heap_.largest_free(),
          heap_.live_blocks()};
}

ArenaRegistry& ArenaRegistry::instance() {
  static auto* registry = new ArenaRegistry();
  return *registry;
}

void ArenaRegistry::add(std::shared_ptr<Arena> arena) {
  const std::unique_lock lock(mutex_);
  const auto place = std::upper_bound(arenas_.begin(), arenas_.end(), arena,
                                      [](const auto& a, const auto& b) { return a->base() < b->base(); });
  arenas_.insert(place, std::move(arena));
}

void ArenaRegistry::retire(const Arena* arena) {
  std::shared_ptr<Arena> found;
  {
    const std::shared_lock lock(mutex_);
    for (const auto& a : arenas_) {
      if (a.get() == arena) found = a;
    }
  }
  if (found == nullptr) return;
  found->retire();
  collect();
}

void ArenaRegistry::collect() {
  std::vector<std::shared_ptr<Arena>> finished;  // unmapped after the lock is released
  const std::unique_lock lock(mutex_);
  for (auto& arena : arenas_) {
    if (arena->finished()) finished.push_back(std::move(arena));
  }
  arenas_.erase(std::remove(arenas_.begin(), arenas_.end(), nullptr), arenas_.end());
}

bool ArenaRegistry::free(void* pointer) {
  const std::shared_ptr<Arena> arena = find(pointer);
  if (arena == nullptr) return false;
  arena->free(pointer);
  if (arena->finished()) collect();
  return true;
}

std::shared_ptr<Arena> ArenaRegistry::find(const void* pointer) const {
  const std::shared_lock lock(mutex_);
  const auto* p = static_cast<const std::byte*>(pointer);
  const auto above = std::upper_bound(arenas_.begin(), arenas_.end(), p,
                                      [](const std::byte* address, const auto& a) { return address < a->base(); });
  if (above == arenas_.begin()) return nullptr;
  const auto& arena = *std::prev(above);
  return p < arena->base() + arena->bytes() ? arena : nullptr;
}

size_t ArenaRegistry::size() const {
  const std::shared_lock lock(mutex_);
  return arenas_.size();
}

}  // namespace sglang_symm
