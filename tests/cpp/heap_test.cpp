#include "memory/heap.h"

#include <gtest/gtest.h>

#include <map>
#include <random>

#include "base/error.h"

namespace sglang_symm {
namespace {

// The obvious allocator: a map of used bytes.
struct Model {
  std::map<size_t, size_t> blocks;  // offset -> rounded bytes
  bool overlaps(size_t offset, size_t bytes) const {
    const auto next = blocks.lower_bound(offset);
    if (next != blocks.end() && next->first < offset + bytes) return true;
    return next != blocks.begin() && std::prev(next)->first + std::prev(next)->second > offset;
  }
  size_t largest_gap(size_t begin, size_t end) const {
    size_t largest = 0;
    size_t at = begin;
    for (const auto& [offset, bytes] : blocks) {
      largest = std::max(largest, offset - at);
      at = offset + bytes;
    }
    return std::max(largest, end - at);
  }
  size_t used() const {
    size_t sum = 0;
    for (const auto& [offset, bytes] : blocks) sum += bytes;
    return sum;
  }
};

TEST(Heap, AgreesWithTheNaiveModelOverRandomHistories) {
  constexpr size_t kBegin = 4096, kBytes = 64 << 10, kAlignment = 64;
  for (unsigned seed = 0; seed < 20; seed++) {
    std::mt19937 random(seed);
    Heap heap(kBegin, kBytes, kAlignment);
    Model model;
    size_t peak = 0;
    for (int step = 0; step < 3000; step++) {
      const bool free_one = !model.blocks.empty() && random() % 5 < 2;
      if (free_one) {
        auto victim = model.blocks.begin();
        std::advance(victim, static_cast<long>(random() % model.blocks.size()));
        heap.free(victim->first);
        model.blocks.erase(victim);
      } else {
        const size_t bytes = random() % (random() % 10 == 0 ? 20000 : 600);
        const size_t rounded = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
        const auto offset = heap.allocate(bytes);
        ASSERT_EQ(offset.has_value(), model.largest_gap(kBegin, kBegin + kBytes) >= rounded) << "seed " << seed;
        if (offset) {
          ASSERT_EQ(*offset % kAlignment, 0u);
          ASSERT_GE(*offset, kBegin);
          ASSERT_LE(*offset + rounded, kBegin + kBytes);
          ASSERT_FALSE(model.overlaps(*offset, rounded)) << "seed " << seed << " step " << step;
          model.blocks[*offset] = rounded;
        }
      }
      peak = std::max(peak, model.used());
      ASSERT_EQ(heap.allocated(), model.used());
      ASSERT_EQ(heap.live_blocks(), model.blocks.size());
      ASSERT_EQ(heap.largest_free(), model.largest_gap(kBegin, kBegin + kBytes));
      ASSERT_EQ(heap.peak(), peak);
    }
  }
}

TEST(Heap, ComesBackWholeWhenAllIsFreed) {
  Heap heap(0, 1 << 16, 64);
  std::vector<size_t> offsets;
  while (const auto offset = heap.allocate(1000)) offsets.push_back(*offset);
  EXPECT_EQ(offsets.size(), (1u << 16) / 1024);
  for (const size_t offset : offsets) heap.free(offset);
  EXPECT_EQ(heap.largest_free(), 1u << 16);
}

TEST(Heap, RefusesWhatIsNoLiveBlockAndSizesThatWouldOverflow) {
  Heap heap(0, 4096, 64);
  EXPECT_THROW(heap.free(0), Error);
  const auto offset = heap.allocate(100);
  heap.free(*offset);
  EXPECT_THROW(heap.free(*offset), Error);
  EXPECT_FALSE(heap.allocate(SIZE_MAX).has_value());
  EXPECT_FALSE(heap.allocate(4097).has_value());
  EXPECT_TRUE(heap.allocate(0).has_value());
}

}  // namespace
}  // namespace sglang_symm
