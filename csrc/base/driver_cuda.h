// CUDA calls that raise, and the driver's functions found at run time: the library links with no libcuda, so that
// importing it works on a machine without a driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <memory>
#include <new>
#include <string>

#include "base/error.h"

namespace sglang_symm {

// Raises ErrorKind::system (out_of_memory for that code) with the call, the code and the advice.
void check_cuda(cudaError_t code, const char* call, const std::string& advice = "");
void check_driver(CUresult code, const char* call, const std::string& advice = "");

struct Driver {
  decltype(&cuMemGetAllocationGranularity) mem_get_allocation_granularity;
  decltype(&cuMemCreate) mem_create;
  decltype(&cuMemRelease) mem_release;
  decltype(&cuMemExportToShareableHandle) mem_export;
  decltype(&cuMemImportFromShareableHandle) mem_import;
  decltype(&cuMemAddressReserve) mem_address_reserve;
  decltype(&cuMemAddressFree) mem_address_free;
  decltype(&cuMemMap) mem_map;
  decltype(&cuMemUnmap) mem_unmap;
  decltype(&cuMemSetAccess) mem_set_access;
  decltype(&cuGetErrorName) get_error_name;
  decltype(&cuTensorMapEncodeTiled) tensor_map_encode_tiled;
};
// Raises when there is no driver, or one too old.
const Driver& driver();

bool is_hopper(int device);  // compute capability 9.0: sm_90a runs nowhere else

// Makes a device current for a scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  DeviceScope(int device, std::nothrow_t) noexcept;  // for deleters and destructors
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = -1;  // -1: nothing to restore
};

// Lets this thread ask and wait although some other stream is being captured: nothing here belongs to that capture.
class OutsideOfCaptures {
 public:
  OutsideOfCaptures() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideOfCaptures() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideOfCaptures(const OutsideOfCaptures&) = delete;
  OutsideOfCaptures& operator=(const OutsideOfCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Host memory that was registered with cudaHostRegister: no longer, when this goes.
struct Unregister {
  void operator()(void* memory) const {
    (void)cudaHostUnregister(memory);
    (void)cudaGetLastError();
  }
};
using RegisteredHost = std::unique_ptr<void, Unregister>;

// What a stream is being captured into, if it is.
struct CaptureCuda {
  unsigned long long id = 0;  // 0: it is not being captured
  cudaGraph_t graph = nullptr;
  explicit operator bool() const { return id != 0; }
};
CaptureCuda capture_of(cudaStream_t stream);

}  // namespace sglang_symm
