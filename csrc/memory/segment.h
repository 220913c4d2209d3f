// A stretch of memory that can be handed to another process of this host as a file descriptor.
//
//   segment_cpu   memfd: anonymous, sealed, fully backed at creation; nothing with a name, so nothing survives a kill
//   -9 segment_cuda  CUDA virtual memory: cuMemCreate, exported as a POSIX fd
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory/fd.h"

namespace sglang_symm {

class Segment {
 public:
  virtual ~Segment() = default;
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // What a peer imports; stays owned by the segment. -1 for an imported segment.
  int fd() const { return fd_.get(); }

 protected:
  Segment() = default;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
  Fd fd_;
};

}  // namespace sglang_symm
