// CUDA's language and runtime as far as the library's kernels and their launches use it, for the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>

#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __shared__ static thread_local

// Objects, not macros: a launch's configuration has members of the same names.
namespace emulator {
template <unsigned (*value)()>
struct BuiltIn {
  struct X {
    operator unsigned() const { return value(); }
  } x;
};
inline unsigned thread_index() {
  return self().thread;
}
inline unsigned block_index() {
  return self().cta->block.x;
}
inline unsigned block_dim() {
  return self().cta->grid.block_dim.x;
}
inline unsigned grid_dim() {
  return self().cta->grid.dim.x;
}
}  // namespace emulator
inline constexpr emulator::BuiltIn<emulator::thread_index> threadIdx{};
inline constexpr emulator::BuiltIn<emulator::block_index> blockIdx{};
inline constexpr emulator::BuiltIn<emulator::block_dim> blockDim{};
inline constexpr emulator::BuiltIn<emulator::grid_dim> gridDim{};

// ---- vectors ----

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

using std::max;
using std::min;

// ---- arithmetic ----

inline float __uint_as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline uint32_t __float_as_uint(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}

// ---- threads ----

inline void __syncthreads() {
  emulator::Cta& cta = *emulator::self().cta;
  emulator::sync(cta.everybody, cta.live);
}
inline int __syncthreads_and(int value) {
  emulator::Cta& cta = *emulator::self().cta;
  return emulator::sync(cta.everybody, cta.live, value != 0);
}
inline void __syncwarp(uint32_t = 0xFFFFFFFFu) {
  emulator::exchange(0);
}
inline int __all_sync(uint32_t, int value) {
  const uint32_t* all = emulator::exchange(value != 0);
  return std::all_of(all, all + emulator::kWarp, [](uint32_t v) { return v != 0; });
}
inline int __any_sync(uint32_t, int value) {
  const uint32_t* all = emulator::exchange(value != 0);
  return std::any_of(all, all + emulator::kWarp, [](uint32_t v) { return v != 0; });
}
inline uint32_t __ballot_sync(uint32_t, int value) {
  const uint32_t* all = emulator::exchange(value != 0);
  uint32_t bits = 0;
  for (int lane = 0; lane < emulator::kWarp; lane++) bits |= all[lane] << lane;
  return bits;
}
inline uint32_t __reduce_or_sync(uint32_t, uint32_t value) {
  const uint32_t* all = emulator::exchange(value);
  uint32_t bits = 0;
  for (int lane = 0; lane < emulator::kWarp; lane++) bits |= all[lane];
  return bits;
}
template <class T>
T __shfl_sync(uint32_t, T value, int lane) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t taken = emulator::exchange(bits)[lane & (emulator::kWarp - 1)];
  std::memcpy(&value, &taken, sizeof value);
  return value;
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return __shfl_sync(mask, value, static_cast<int>(emulator::self().thread % emulator::kWarp) ^ lanes);
}
inline void __nanosleep(unsigned) {
  emulator::yield(true);
}
inline void __threadfence_system() {
  emulator::fence();
}
template <class T>
T atomicCAS(T* place, T expected, T desired) {
  emulator::fence();
  const T before = *place;
  if (before == expected) *place = desired;
  return before;
}

// ---- the runtime ----

using cudaError_t = int;
using cudaStream_t = emulator::Stream*;
constexpr cudaError_t cudaSuccess = 0;

// Memory is the host's, and what is not a kernel happens at once, but for a copy in a stream.
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
constexpr unsigned cudaHostRegisterMapped = 1, cudaHostRegisterPortable = 2, cudaEventDisableTiming = 4;
using cudaEvent_t = void*;
inline cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  auto grid = std::make_unique<emulator::Grid>();
  grid->kernel = [=] { std::memcpy(to, from, bytes); };
  grid->dim = grid->block_dim = {1, 1, 1};
  emulator::Machine::now().launch(stream, std::move(grid));
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}
inline cudaError_t cudaHostRegister(void*, size_t, unsigned) {
  return cudaSuccess;
}
inline cudaError_t cudaHostUnregister(void*) {
  return cudaSuccess;
}
inline cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned) {
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t) {
  return cudaSuccess;
}

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization,
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed = 0;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  auto grid = std::make_unique<emulator::Grid>();
  // What a kernel changes of its arguments, it changes for itself: they are copied for the grid, and constant.
  const auto copies = std::make_shared<const std::tuple<std::remove_cvref_t<Parameters>...>>(arguments...);
  grid->kernel = [kernel, copies] { std::apply(kernel, *copies); };
  grid->dim = {config->gridDim.x, 1, 1};
  grid->block_dim = {config->blockDim.x, 1, 1};
  grid->shared_bytes = config->dynamicSmemBytes;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      grid->cluster = attribute.val.clusterDim.x;
    } else {
      grid->programmatic = attribute.val.programmaticStreamSerializationAllowed != 0;
    }
  }
  emulator::Machine::now().launch(config->stream, std::move(grid));
  return cudaSuccess;
}
