#include "memory/segment_cpu.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>

#include "base/error.h"

namespace sglang_symm {

namespace {
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
}

std::unique_ptr<SegmentCpu> SegmentCpu::create(size_t bytes, const std::string& label) {
  std::unique_ptr<SegmentCpu> segment(new SegmentCpu());
  segment->fd_ = Fd(memfd_create(label.substr(0, 200).c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!segment->fd_) fail_errno("memfd_create");
  if (ftruncate(segment->fd_.get(), static_cast<off_t>(bytes)) != 0) fail_errno(cat("ftruncate to ", bytes, " bytes"));
  int code = EINTR;
  while (code == EINTR) code = posix_fallocate(segment->fd_.get(), 0, static_cast<off_t>(bytes));
  if (code != 0) {
    fail(ErrorKind::out_of_memory, "shared memory of ", bytes, " bytes could not be had (posix_fallocate: error ", code,
         "). Free memory on this host or make the arena smaller (arena_bytes, SGLANG_SYMM_ARENA_BYTES)");
  }
  if (fcntl(segment->fd_.get(), F_ADD_SEALS, kSeals) != 0) fail_errno("fcntl(F_ADD_SEALS)");
  segment->map(segment->fd_.get(), bytes);
  return segment;
}

std::unique_ptr<SegmentCpu> SegmentCpu::import(Fd fd, size_t bytes) {
  struct stat status;
  if (fstat(fd.get(), &status) != 0) fail_errno("fstat of a peer's segment");
  if (static_cast<size_t>(status.st_size) != bytes) {
    fail(ErrorKind::communication, "a peer's segment has ", status.st_size, " bytes, expected ", bytes);
  }
  const int seals = fcntl(fd.get(), F_GET_SEALS);
  // Without the seals a peer could shrink the file and turn our next load into a SIGBUS.
  if (seals < 0 || (seals & kSeals) != kSeals) {
    fail(ErrorKind::communication, "a peer's segment is no sealed memfd (seals ", seals, ", expected ", kSeals, ")");
  }
  std::unique_ptr<SegmentCpu> segment(new SegmentCpu());
  segment->map(fd.get(), bytes);
  return segment;
}

void SegmentCpu::map(int fd, size_t bytes) {
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (address == MAP_FAILED) fail_errno(cat("mmap of ", bytes, " bytes"));
  data_ = static_cast<std::byte*>(address);
  bytes_ = bytes;
}

SegmentCpu::~SegmentCpu() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

void SegmentCpu::prefault([[maybe_unused]] size_t offset, [[maybe_unused]] size_t bytes) {
#ifdef MADV_POPULATE_WRITE
  const size_t page = 4096;
  const size_t begin = offset / page * page;
  (void)madvise(data_ + begin, bytes + offset - begin, MADV_POPULATE_WRITE);
#endif
}

}  // namespace sglang_symm
