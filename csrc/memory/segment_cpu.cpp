#include "memory/segment_cpu.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <mutex>
#include <utility>

#include "base/error.h"

namespace sglang_symm {

namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

// Bytes that this process may still take: the host's available memory, and its control group's limit if it has one.
// A memfd has no size limit of its own: backing more than there is would wake the OOM killer instead of failing.
size_t available_bytes() {
  size_t available = SIZE_MAX;
  std::ifstream meminfo("/proc/meminfo");
  for (std::string line; std::getline(meminfo, line);) {
    unsigned long kib = 0;
    if (sscanf(line.c_str(), "MemAvailable: %lu kB", &kib) == 1) available = size_t{kib} * 1024;
  }
  size_t limit = 0, used = 0;
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit && std::ifstream("/sys/fs/cgroup/memory.current") >> used) {
    available = std::min(available, limit > used ? limit - used : 0);
  }
  return available;
}

}  // namespace

std::unique_ptr<SegmentCpu> SegmentCpu::create(size_t bytes, const std::string& label) {
  if (const size_t available = available_bytes(); bytes > available) {
    fail(ErrorKind::out_of_memory, "shared memory of ", bytes, " bytes, but this host has ", available,
         " bytes to give. Make the arena smaller (arena_bytes, SGLANG_SYMM_ARENA_BYTES)");
  }
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

struct SegmentCpu::Mapping {
  Mapping(int fd, size_t bytes_mapped)
      : data(mmap(nullptr, bytes_mapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)), bytes(bytes_mapped) {
    if (data == MAP_FAILED) fail_errno(cat("mmap of ", bytes, " bytes"));
  }
  ~Mapping() { munmap(data, bytes); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  void* data;
  size_t bytes;
};

void SegmentCpu::map(int fd, size_t bytes) {
  struct Known {
    std::mutex mutex;
    std::map<std::pair<dev_t, ino_t>, std::weak_ptr<Mapping>> mappings;
  };
  static auto* known = new Known();  // never destroyed: arenas may be unmapped while the process exits
  struct stat status;
  if (fstat(fd, &status) != 0) fail_errno("fstat of a segment");
  const std::lock_guard lock(known->mutex);
  std::erase_if(known->mappings, [](const auto& entry) { return entry.second.expired(); });
  auto& entry = known->mappings[{status.st_dev, status.st_ino}];
  mapping_ = entry.lock();
  if (!mapping_) {
    mapping_ = std::make_shared<Mapping>(fd, bytes);
    entry = mapping_;
  }
  data_ = static_cast<std::byte*>(mapping_->data);
  bytes_ = bytes;
}

void SegmentCpu::prefault([[maybe_unused]] size_t offset, [[maybe_unused]] size_t bytes) {
#ifdef MADV_POPULATE_WRITE
  const size_t page = 4096;
  const size_t begin = offset / page * page;
  (void)madvise(data_ + begin, bytes + offset - begin, MADV_POPULATE_WRITE);
#endif
}

}  // namespace sglang_symm
