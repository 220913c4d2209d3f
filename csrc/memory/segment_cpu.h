// Shared memory of CPU processes of one host. Linux only. A forked child shares it, it does not copy it.
#pragma once

#include <memory>
#include <string>

#include "memory/segment.h"

namespace sglang_symm {

class SegmentCpu final : public Segment {
 public:
  // A zero-filled memfd, sealed against growing and shrinking. A host without enough memory is an error here
  // (posix_fallocate), not a SIGBUS at some later store. `label` shows in /proc/<pid>/maps.
  static std::unique_ptr<SegmentCpu> create(size_t bytes, const std::string& label);
  // Maps a peer's segment. Refuses a descriptor that is no sealed memfd of exactly `bytes`. A segment that this process
  // has mapped already (ranks that are threads, in unit tests) is not mapped twice: so ThreadSanitizer sees every
  // access.
  static std::unique_ptr<SegmentCpu> import(Fd fd, size_t bytes);

  // Populates the page tables of [offset, offset + bytes), so that the first call is no slower than the next. Best
  // effort.
  void prefault(size_t offset, size_t bytes);

 private:
  struct Mapping;
  SegmentCpu() = default;
  void map(int fd, size_t bytes);

  std::shared_ptr<Mapping> mapping_;
};

}  // namespace sglang_symm
