// Algorithms that touch peers' tensors in their arenas: two-shot direct and large copies.
//
//   CTA 0        | fence, my headers (offsets) |
//   every CTA    | all headers                 | its chunks of every peer | fence, done flags | all peers' done flags |
//
// CTA c of a rank waits for CTA c of its peers: grids are equal on all ranks, and CTA c owns the same chunks
// everywhere.
#include "collective/launch_cuda.cuh"

namespace sglang_symm {

namespace device {

namespace {

struct Offsets {
  uint64_t in[kMaxWorldSize];
  uint64_t out[kMaxWorldSize];
};

// All threads of the CTA. True when all headers have come and agree; then `offsets` holds everybody's.
__device__ __forceinline__ bool meet(const Session& s, Offsets* offsets) {
  const bool speaks = is_signal_warp() && blockIdx.x == 0;
  if (speaks) fence_sys();  // what earlier kernels wrote here, before the header that lets peers read it
  bool fine = __syncthreads_and(s.alive) != 0;  // one answer for the CTA: `broken` may rise in between
  if (!fine) return false;
  if (is_signal_warp()) {
    if (speaks) send_headers(s);
    fine = await_headers(s);
    for (int r = threadIdx.x & (kWarp - 1); r < s.call.world_size; r += kWarp) {
      const HeaderCuda& header = s.own()->header[s.parity()][r];
      // The peer's fence is met by an acquire of its header, not by a fence: that would wait for my headers to arrive.
      if (r != s.call.rank) load_acquire(&header.word[1]);
      offsets->in[r] = r == s.call.rank ? s.call.offset_in : offset_in(header);
      offsets->out[r] = r == s.call.rank ? s.call.offset_out : offset_out(header);
    }
  }
  return __syncthreads_and(fine) != 0;
}

template <class Type, int Max, int Unroll>
__global__ void __launch_bounds__(kMaxWorkers + kWarp, 1) two_shot_direct(const __grid_constant__ SumCuda a) {
  __shared__ Offsets offsets;
  const Session s = begin(a.call);
  const int world = s.call.world_size;
  const uint32_t chunks = chunks_of<Type>(a.count);
  const uint32_t share = (chunks + world - 1) / world;
  const uint32_t mine = static_cast<uint32_t>(s.call.rank) * share;
  const uint32_t end_of_mine = min(chunks, mine + share);
  const Workers w = workers();
  bool fine = meet(s, &offsets);
  if (fine && !is_signal_warp()) {
    for (uint32_t first = mine + w.first; first < end_of_mine; first += Unroll * w.stride) {
      uint4 v[Unroll][Max];
#pragma unroll
      for (int u = 0; u < Unroll; u++) {
#pragma unroll
        for (int r = 0; r < Max; r++) {
          const uint32_t chunk = first + u * w.stride;
          if (r >= world || chunk >= end_of_mine) continue;
          v[u][r] = load_sys(static_cast<const void*>(s.call.window[r] + offsets.in[r] + size_t{chunk} * 16));
        }
      }
#pragma unroll
      for (int u = 0; u < Unroll; u++) {
        const uint32_t chunk = first + u * w.stride;
        if (chunk >= end_of_mine) continue;
        const Bias bias{a.bias, a.bias_length, a.bias_start};
        const uint4 sum = sum_in_rank_order<Type, false>(v[u], uint4{}, -1, world, bias, chunk);
        for (int step = 0; step < world; step++) {
          const int r = s.peer(step);
          store_chunk<Type>(s.call.window[r] + offsets.out[r], chunk, a.count, true, sum);
        }
      }
    }
  }
  if (fine) fine = finish(s);
  const std::byte* result = s.call.window[s.call.rank] + s.call.offset_out;
  if (!fine) {
    if (!is_signal_warp()) fill<Type>(a.out, a.count);
  } else if (result != a.out && !is_signal_warp()) {
    for (int owner = 0; owner < world; owner++) {
      for (uint32_t i = w.first; i < share; i += w.stride) {
        const uint32_t chunk = static_cast<uint32_t>(owner) * share + i;
        if (chunk >= chunks) continue;
        const uint4 v = load_sys(static_cast<const void*>(result + size_t{chunk} * 16));
        store_chunk<Type>(a.out, chunk, a.count, is_aligned(a.out), v);
      }
    }
  }
  end(s);
}

// `bytes` from anywhere to anywhere by the grid's workers, as wide as both addresses allow.
template <class Word>
__device__ __forceinline__ void copy_words(std::byte* to, const std::byte* from, size_t words) {
  const Workers w = workers();
  constexpr int kUnroll = 4;
  for (size_t first = w.first; first < words; first += size_t{kUnroll} * w.stride) {
    Word v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      const size_t i = first + size_t(u) * w.stride;
      if (i < words) v[u] = reinterpret_cast<const Word*>(from)[i];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      const size_t i = first + size_t(u) * w.stride;
      if (i < words) reinterpret_cast<Word*>(to)[i] = v[u];
    }
  }
}

__device__ __forceinline__ void copy_bytes(std::byte* to, const std::byte* from, size_t bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  const size_t width = (bits & 15) == 0 ? 16 : (bits & 3) == 0 ? 4 : 1;
  const size_t whole = bytes / width * width;
  if (width == 16) {
    copy_words<uint4>(to, from, bytes / 16);
  } else if (width == 4) {
    copy_words<uint32_t>(to, from, bytes / 4);
  } else {
    copy_words<uint8_t>(to, from, bytes);
  }
  if (whole != bytes) copy_words<uint8_t>(to + whole, from + whole, bytes - whole);
}

__device__ __forceinline__ void fill_bytes(std::byte* to, size_t bytes) {
  const Workers w = workers();
  for (size_t i = w.first; i < bytes; i += w.stride) to[i] = std::byte{0xFF};
}

// A receiver whose result lies outside of its arena takes the contributions in staging, one `offset_in` apart.
__global__ void __launch_bounds__(kMaxWorkers + kWarp, 1) copy_direct(const __grid_constant__ CopyCuda a) {
  __shared__ Offsets offsets;
  const Session s = begin(a.call);
  const int me = s.call.rank;
  std::byte* out = static_cast<std::byte*>(a.out);
  const std::byte* in = static_cast<const std::byte*>(a.in);
  bool fine = meet(s, &offsets);
  if (fine && !is_signal_warp()) {
    for (int step = 1; step < s.call.world_size; step++) {
      const int peer = s.peer(step);
      const size_t place = offsets.in[peer] == 0 ? a.begin[me] : static_cast<size_t>(me) * offsets.in[peer];
      copy_bytes(s.call.window[peer] + offsets.out[peer] + place, in, a.bytes[me]);
    }
    if (!a.in_place) copy_bytes(out + a.begin[me], in, a.bytes[me]);
  }
  if (fine) fine = finish(s);
  const size_t distance = s.call.offset_in;
  if (fine && distance != 0) {
    // Peers cut their contributions by their own alignment: wait for all of their CTAs, not for mine alone.
    const int flags = (s.call.world_size - 1) * static_cast<int>(gridDim.x);
    for (int i = static_cast<int>(threadIdx.x); i < flags && fine; i += static_cast<int>(blockDim.x)) {
      const int peer = s.peer(1 + i / static_cast<int>(gridDim.x));
      const uint32_t* flag = &s.own()->done[s.parity()][peer][i % static_cast<int>(gridDim.x)];
      fine = wait(
          s, [&] { return load_acquire(flag) == s.epoch; }, [&] { return 1u << peer; });
    }
    fine = __syncthreads_and(fine) != 0;
  }
  if (!is_signal_warp()) {
    for (int step = 1; step < s.call.world_size; step++) {
      const int peer = s.peer(step);
      if (!fine) {
        fill_bytes(out + a.begin[peer], a.bytes[peer]);
      } else if (distance != 0) {
        const std::byte* staged = s.call.window[me] + s.call.offset_out + static_cast<size_t>(peer) * distance;
        copy_bytes(out + a.begin[peer], staged, a.bytes[peer]);
      }
    }
  }
  end(s);
}

}  // namespace

}  // namespace device

void launch_two_shot_direct(const SumCuda& sum, const GridCuda& grid, cudaStream_t stream) {
  using namespace device;
  with_type(sum.call.descriptor.dtype, [&](auto type) {
    with_world(sum.call.world_size, [&](auto max) {
      constexpr int kMax = decltype(max)::value;
      constexpr int kUnroll = kMax == 2 ? 4 : kMax == 4 ? 2 : 1;
      launch(&two_shot_direct<decltype(type), kMax, kUnroll>, sum, grid.ctas, grid.threads + kWarp, stream);
    });
  });
}

void launch_copy_direct(const CopyCuda& copy, int max_ctas, cudaStream_t stream) {
  size_t longest = 0;
  for (int r = 0; r < copy.call.world_size; r++) longest = copy.bytes[r] > longest ? copy.bytes[r] : longest;
  const GridCuda grid = grid_for(longest / 16, max_ctas);
  device::launch(&device::copy_direct, copy, grid.ctas, grid.threads + device::kWarp, stream);
}

}  // namespace sglang_symm
