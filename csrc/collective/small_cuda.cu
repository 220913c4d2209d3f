// Small copies, and calls that are nothing but headers.
//
// A copy must carry any bits, so there is no sentinel: every 8 bytes travel as {data, epoch, data, epoch}. The slots
// rest at an old epoch, hence nothing is put back.
#include <algorithm>

#include "collective/launch_cuda.cuh"

namespace sglang_symm {

namespace device {

namespace {

__device__ __forceinline__ uint2 load_unit(const std::byte* from, size_t unit, size_t bytes) {
  const std::byte* p = from + 8 * unit;
  if ((reinterpret_cast<uintptr_t>(p) & 7) == 0 && 8 * unit + 8 <= bytes) return *reinterpret_cast<const uint2*>(p);
  uint32_t word[2] = {};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (8 * unit + i < bytes) word[i / 4] |= static_cast<uint32_t>(p[i]) << (8 * (i % 4));
  }
  return make_uint2(word[0], word[1]);
}

__device__ __forceinline__ void store_unit(std::byte* to, size_t unit, size_t bytes, uint2 v) {
  std::byte* p = to + 8 * unit;
  if ((reinterpret_cast<uintptr_t>(p) & 7) == 0 && 8 * unit + 8 <= bytes) {
    *reinterpret_cast<uint2*>(p) = v;
    return;
  }
  const uint32_t word[2] = {v.x, v.y};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (8 * unit + i < bytes) p[i] = static_cast<std::byte>(word[i / 4] >> (8 * (i % 4)) & 0xFF);
  }
}

__global__ void __launch_bounds__(kMaxWorkers + kWarp, 1) copy_small(const __grid_constant__ CopyCuda a) {
  if (is_signal_warp()) {
    keep_protocol(begin(a.call));
    return;
  }
  const int me = a.call.rank;
  const auto units_of = [&](int r) { return static_cast<uint32_t>((a.bytes[r] + 7) / 8); };
  const auto load = [&](uint32_t i) { return load_unit(static_cast<const std::byte*>(a.in), i, a.bytes[me]); };
  std::byte* out = static_cast<std::byte*>(a.out);
  const Workers w = workers();
  const Door door = arrive(a.call);
  uint2 v{};
  if (w.first < units_of(me)) v = load(w.first);  // while the epoch comes
  const Session s = enter(a.call, door);
  const auto slot = [&](int rank, int source, uint32_t unit) {
    const size_t part = 2 * a.small_bytes;
    const size_t parity = s.parity() * static_cast<size_t>(s.call.world_size) * part;
    return s.call.window[rank] + a.small + parity + static_cast<size_t>(source) * part + size_t{unit} * 16;
  };
  for (uint32_t i = w.first; i < units_of(me); i += w.stride) {
    if (i != w.first) v = load(i);
    if (s.alive) {
      for (int step = 1; step < s.call.world_size; step++) {
        store_sys(static_cast<void*>(slot(s.peer(step), me, i)), make_uint4(v.x, s.epoch, v.y, s.epoch));
      }
    }
    if (!a.in_place) store_unit(out + a.begin[me], i, a.bytes[me], v);
  }
  epoch_is_read();
  for (int step = 1; step < s.call.world_size; step++) {
    const int peer = s.peer(step);
    for (uint32_t i = w.first; i < units_of(peer); i += w.stride) {
      const void* from = slot(me, peer, i);
      uint4 got = all_bits_set();
      const auto came = [&] {
        got = load_sys(from);
        return got.y == s.epoch && got.w == s.epoch;
      };
      if (!s.alive || !wait(s, came, [&] { return 1u << peer; })) got = all_bits_set();
      store_unit(out + a.begin[peer], i, a.bytes[peer], make_uint2(got.x, got.z));
    }
  }
}

__global__ void __launch_bounds__(kWarp) headers(const __grid_constant__ CallCuda call) {
  const Session s = begin(call);
  if (__all_sync(kAllLanes, s.alive)) {
    // A barrier orders memory too: what this rank wrote before it, peers may read after it.
    __threadfence_system();
    send_headers(s);
    await_headers(s);
    __threadfence_system();
  }
  end(s);
}

}  // namespace

}  // namespace device

void launch_copy_small(const CopyCuda& copy, int max_ctas, cudaStream_t stream) {
  size_t longest = 0;
  for (int r = 0; r < copy.call.world_size; r++) longest = std::max(longest, copy.bytes[r]);
  const GridCuda grid = grid_for((longest + 7) / 8, max_ctas);
  device::launch(&device::copy_small, copy, grid.ctas, grid.threads + device::kWarp, stream);
}

void launch_headers(const CallCuda& call, cudaStream_t stream) {
  device::launch(&device::headers, call, 1, device::kWarp, stream);
}

}  // namespace sglang_symm
