#include "collective/bracket_cuda.h"

#include <algorithm>

#include "collective/launch_cuda.cuh"

namespace sglang_symm {

namespace device {

namespace {

constexpr int kThreads = 512;
constexpr size_t kBytesACta = 64 << 10;
constexpr size_t kMostCtas = 128;

__global__ void __launch_bounds__(kWarp) open(const __grid_constant__ BracketCuda a) {
  const Session s = begin(a.call);
  bool fine = __all_sync(kAllLanes, s.alive) != 0;
  if (fine) {
    send_headers(s);
    fine = await_headers(s);
  }
  if (fine && threadIdx.x == 0) store_sys(a.begun, s.epoch);
  end(s);
}

__global__ void __launch_bounds__(kThreads) close(const __grid_constant__ BracketCuda a) {
  wait_for_previous_kernel();
  let_next_kernel_in();
  const PadCuda* pad = reinterpret_cast<const PadCuda*>(a.call.window[a.call.rank]);
  if (load_sys(&pad->gate[0].broken) == 0) {
    if (blockIdx.x == 0 && threadIdx.x == 0) store_sys(a.ended, load_sys(&pad->epoch(0)));
    return;
  }
  auto* out = static_cast<uint8_t*>(a.out);
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < a.bytes; i += stride) out[i] = 0xFF;
}

}  // namespace

}  // namespace device

void launch_open(const BracketCuda& bracket, cudaStream_t stream) {
  device::launch(&device::open, bracket, 1, device::kWarp, stream);
}

void launch_close(const BracketCuda& bracket, cudaStream_t stream) {
  const size_t ctas = std::clamp<size_t>(bracket.bytes / device::kBytesACta, 1, device::kMostCtas);
  device::launch(&device::close, bracket, static_cast<int>(ctas), device::kThreads, stream);
}

}  // namespace sglang_symm
