#include "memory/segment_cpu.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include "base/error.h"
#include "memory/arena.h"

namespace sglang_symm {
namespace {

TEST(SegmentCpu, IsZeroFilledAndSealed) {
  const auto segment = SegmentCpu::create(1 << 16, "test");
  for (size_t i = 0; i < segment->bytes(); i++) ASSERT_EQ(segment->data()[i], std::byte{0});
  EXPECT_EQ(ftruncate(segment->fd(), 4096), -1) << "a peer could shrink it under our feet";
  EXPECT_EQ(ftruncate(segment->fd(), 1 << 20), -1);
}

TEST(SegmentCpu, ShowsWritesThroughAnImportedMapping) {
  const auto segment = SegmentCpu::create(4096, "test");
  const auto imported = SegmentCpu::import(Fd(dup(segment->fd())), 4096);
  segment->data()[17] = std::byte{42};
  EXPECT_EQ(imported->data()[17], std::byte{42});
}

TEST(SegmentCpu, RefusesAWrongSizeAnUnsealedFileAndAnImpossibleSize) {
  const auto segment = SegmentCpu::create(4096, "test");
  EXPECT_THROW(SegmentCpu::import(Fd(dup(segment->fd())), 8192), Error);
  Fd unsealed(memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(ftruncate(unsealed.get(), 4096), 0);
  EXPECT_THROW(SegmentCpu::import(std::move(unsealed), 4096), Error);
  EXPECT_THROW(SegmentCpu::create(size_t{1} << 60, "test"), Error);
}

std::shared_ptr<Arena> make_arena(size_t bytes) {
  return std::make_shared<Arena>(SegmentCpu::create(bytes, "test"), ArenaLayout{4096, bytes, 64}, 0);
}

TEST(Arena, KnowsItsOwnAddresses) {
  const auto arena = make_arena(1 << 16);
  void* block = arena->allocate(100);
  EXPECT_EQ(arena->offset_of(block, 100), 4096u);
  EXPECT_FALSE(arena->offset_of(block, 1 << 20).has_value()) << "a range that leaves the arena is not inside it";
  EXPECT_FALSE(arena->contains(&arena, 1));
  EXPECT_EQ(arena->allocate(1 << 20), nullptr);
}

TEST(ArenaRegistry, KeepsARetiredArenaUntilItsLastBlockIsFreed) {
  ArenaRegistry& registry = ArenaRegistry::instance();
  const size_t before = registry.size();
  std::weak_ptr<Arena> watch;
  void* block = nullptr;
  {
    auto arena = make_arena(1 << 16);
    watch = arena;
    registry.add(arena);
    block = arena->allocate(64);
    registry.retire(arena.get());
  }
  ASSERT_FALSE(watch.expired()) << "a live block lost its memory";
  *static_cast<char*>(block) = 1;
  EXPECT_TRUE(registry.free(block));
  EXPECT_TRUE(watch.expired());
  EXPECT_EQ(registry.size(), before);
  int elsewhere = 0;
  EXPECT_FALSE(registry.free(&elsewhere));
}

}  // namespace
}  // namespace sglang_symm
