// GPU memory that other processes of this host can map: CUDA virtual memory, exported as a POSIX file descriptor.
#pragma once

#include <memory>
#include <string>

#include "memory/segment.h"

namespace sglang_symm {

class SegmentCuda final : public Segment {
 public:
  // `bytes` is rounded up to the device's granularity (2 MiB on today's GPUs).
  static std::unique_ptr<SegmentCuda> create(int device, size_t bytes);
  // Maps rank `peer`'s segment of exactly `bytes` for kernels of `device`. Raises when the two GPUs cannot reach each
  // other.
  static std::unique_ptr<SegmentCuda> import(int device, Fd fd, size_t bytes, int peer);
  static size_t rounded(int device, size_t bytes);
  // Waits for the device: a kernel may still use the mapping.
  ~SegmentCuda() override;

 private:
  explicit SegmentCuda(int device) : device_(device) {}
  void map(unsigned long long handle, size_t bytes, const std::string& advice);

  int device_;
};

}  // namespace sglang_symm
