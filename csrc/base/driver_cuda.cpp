#include "base/driver_cuda.h"

namespace sglang_symm {

namespace {

void raise(bool out_of_memory, const char* call, const char* reason, const std::string& advice) {
  fail(out_of_memory ? ErrorKind::out_of_memory : ErrorKind::system, call, ": ", reason, advice.empty() ? "" : ". ",
       advice);
}

template <class Function>
void find(const char* name, Function* function) {
  constexpr unsigned kVersion = 12000;  // the functions below have not changed since
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t code = cudaGetDriverEntryPointByVersion(name, &address, kVersion, cudaEnableDefault, &found);
  if (code != cudaSuccess || found != cudaDriverEntryPointSuccess || address == nullptr) {
    (void)cudaGetLastError();
    fail(ErrorKind::system, "the CUDA driver has no ", name, " (", cudaGetErrorString(code),
         "). Symmetric memory on GPUs needs a driver of CUDA 12 or newer");
  }
  *function = reinterpret_cast<Function>(address);
}

Driver load() {
  Driver d;
  find("cuMemGetAllocationGranularity", &d.mem_get_allocation_granularity);
  find("cuMemCreate", &d.mem_create);
  find("cuMemRelease", &d.mem_release);
  find("cuMemExportToShareableHandle", &d.mem_export);
  find("cuMemImportFromShareableHandle", &d.mem_import);
  find("cuMemAddressReserve", &d.mem_address_reserve);
  find("cuMemAddressFree", &d.mem_address_free);
  find("cuMemMap", &d.mem_map);
  find("cuMemUnmap", &d.mem_unmap);
  find("cuMemSetAccess", &d.mem_set_access);
  find("cuGetErrorName", &d.get_error_name);
  find("cuTensorMapEncodeTiled", &d.tensor_map_encode_tiled);
  return d;
}

}  // namespace

void check_cuda(cudaError_t code, const char* call, const std::string& advice) {
  if (code == cudaSuccess) return;
  (void)cudaGetLastError();  // it is told here; the next caller's calls are not to blame
  raise(code == cudaErrorMemoryAllocation, call, cudaGetErrorString(code), advice);
}

void check_driver(CUresult code, const char* call, const std::string& advice) {
  if (code == CUDA_SUCCESS) return;
  const char* name = nullptr;
  if (driver().get_error_name(code, &name) != CUDA_SUCCESS || name == nullptr) name = "unknown error";
  raise(code == CUDA_ERROR_OUT_OF_MEMORY, call, name, advice);
}

const Driver& driver() {
  static const Driver loaded = load();
  return loaded;
}

bool is_hopper(int device) {
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return major == 9 && minor == 0;
}

DeviceScope::DeviceScope(int device) {
  int current = -1;
  check_cuda(cudaGetDevice(&current), "cudaGetDevice");
  if (current == device) return;
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
  before_ = current;
}

DeviceScope::DeviceScope(int device, std::nothrow_t) noexcept {
  int current = -1;
  if (cudaGetDevice(&current) == cudaSuccess && current != device && cudaSetDevice(device) == cudaSuccess) {
    before_ = current;
  }
}

DeviceScope::~DeviceScope() {
  if (before_ >= 0) (void)cudaSetDevice(before_);
}

CaptureCuda capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  CaptureCuda capture;
  const cudaError_t code =
      cudaStreamGetCaptureInfo(stream, &status, &capture.id, &capture.graph, nullptr, nullptr, nullptr);
  // The legacy default stream cannot be asked while another stream is captured; it is not captured itself.
  if (code == cudaErrorStreamCaptureImplicit) {
    (void)cudaGetLastError();
    return {};
  }
  check_cuda(code, "cudaStreamGetCaptureInfo");
  if (status != cudaStreamCaptureStatusActive) return {};
  return capture;
}

}  // namespace sglang_symm
