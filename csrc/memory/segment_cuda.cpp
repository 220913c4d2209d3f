#include "memory/segment_cuda.h"

#include "base/driver_cuda.h"

namespace sglang_symm {

namespace {

CUmemAllocationProp properties(int device) {
  CUmemAllocationProp p{};
  p.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  p.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
  p.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return p;
}

}  // namespace

size_t SegmentCuda::rounded(int device, size_t bytes) {
  const CUmemAllocationProp p = properties(device);
  size_t granularity = 0;
  check_driver(driver().mem_get_allocation_granularity(&granularity, &p, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
               "cuMemGetAllocationGranularity");
  return (bytes + granularity - 1) / granularity * granularity;
}

std::unique_ptr<SegmentCuda> SegmentCuda::create(int device, size_t bytes) {
  const DeviceScope scope(device);
  check_cuda(cudaFree(nullptr), "cudaFree(nullptr)");  // makes the device's context
  const CUmemAllocationProp p = properties(device);
  const size_t whole = rounded(device, bytes);
  CUmemGenericAllocationHandle handle = 0;
  check_driver(driver().mem_create(&handle, whole, &p, 0), "cuMemCreate",
               cat("An arena of ", whole, " bytes on cuda:", device,
                   " was asked for: free memory of the GPU or make the arena smaller (arena_bytes, ",
                   "SGLANG_SYMM_ARENA_BYTES)"));
  std::unique_ptr<SegmentCuda> segment(new SegmentCuda(device));
  try {
    int fd = -1;
    check_driver(driver().mem_export(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                 "cuMemExportToShareableHandle");
    segment->fd_ = Fd(fd);
    segment->map(handle, whole, "");
  } catch (...) {
    (void)driver().mem_release(handle);
    throw;
  }
  check_driver(driver().mem_release(handle), "cuMemRelease");  // the mapping keeps the memory
  return segment;
}

std::unique_ptr<SegmentCuda> SegmentCuda::import(int device, Fd fd, size_t bytes, int peer) {
  const DeviceScope scope(device);
  CUmemGenericAllocationHandle handle = 0;
  void* os_handle = reinterpret_cast<void*>(static_cast<intptr_t>(fd.get()));
  check_driver(driver().mem_import(&handle, os_handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
               "cuMemImportFromShareableHandle", cat("The arena of rank ", peer, " could not be imported"));
  std::unique_ptr<SegmentCuda> segment(new SegmentCuda(device));
  try {
    segment->map(handle, bytes,
                 cat("cuda:", device, " cannot use the memory of rank ", peer,
                     "'s GPU: expected GPUs of one host with peer access (NVLink, or PCIe with P2P; nvidia-smi topo ",
                     "-p2p rw shows it). Use communicator='process_group' for this group"));
  } catch (...) {
    (void)driver().mem_release(handle);
    throw;
  }
  check_driver(driver().mem_release(handle), "cuMemRelease");
  return segment;
}

void SegmentCuda::map(unsigned long long handle, size_t bytes, const std::string& advice) {
  CUdeviceptr address = 0;
  check_driver(driver().mem_address_reserve(&address, bytes, 0, 0, 0), "cuMemAddressReserve");
  const CUresult mapped = driver().mem_map(address, bytes, 0, handle, 0);
  if (mapped != CUDA_SUCCESS) {
    (void)driver().mem_address_free(address, bytes);
    check_driver(mapped, "cuMemMap", advice);
  }
  data_ = reinterpret_cast<std::byte*>(address);  // from here on the destructor unmaps
  bytes_ = bytes;
  CUmemAccessDesc access{};
  access.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device_}};
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  check_driver(driver().mem_set_access(address, bytes, &access, 1), "cuMemSetAccess", advice);
}

// Nothing is raised here: at the process's end the driver may be gone already.
SegmentCuda::~SegmentCuda() {
  if (data_ == nullptr) return;
  int before = -1;
  if (cudaGetDevice(&before) != cudaSuccess) return;
  const OutsideOfCaptures outside;
  (void)cudaSetDevice(device_);
  (void)cudaDeviceSynchronize();
  const auto address = reinterpret_cast<CUdeviceptr>(data_);
  (void)driver().mem_unmap(address, bytes_);
  (void)driver().mem_address_free(address, bytes_);
  (void)cudaSetDevice(before);
}

}  // namespace sglang_symm
