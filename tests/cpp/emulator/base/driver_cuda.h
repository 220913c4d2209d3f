// csrc/base/driver_cuda.h for the emulator: what collectives and launches need of it.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <memory>
#include <new>
#include <string>

#include "base/error.h"

namespace sglang_symm {

inline void check_cuda(cudaError_t code, const char* call, const std::string& = "") {
  if (code != cudaSuccess) fail(ErrorKind::system, call, " failed");
}
inline void check_driver(CUresult code, const char* call, const std::string& = "") {
  if (code != CUDA_SUCCESS) fail(ErrorKind::system, call, " failed");
}

struct Driver {
  decltype(&cuTensorMapEncodeTiled) tensor_map_encode_tiled = &cuTensorMapEncodeTiled;
};
inline const Driver& driver() {
  static const Driver functions;
  return functions;
}

struct DeviceScope {
  explicit DeviceScope(int) {}
  DeviceScope(int, std::nothrow_t) {}
};

struct Unregister {
  void operator()(void* memory) const { (void)cudaHostUnregister(memory); }
};
using RegisteredHost = std::unique_ptr<void, Unregister>;

// Nothing is ever captured: a graph's replay is the same launches again, with the same arguments.
struct CaptureCuda {
  unsigned long long id = 0;
  explicit operator bool() const { return id != 0; }
};
inline CaptureCuda capture_of(cudaStream_t) {
  return {};
}

}  // namespace sglang_symm
