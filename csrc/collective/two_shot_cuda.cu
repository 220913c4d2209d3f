// Two-shot through slots, and its first half, reduce_scatter.
//
//   1  push     chunk i of owner j's share -> slot [me] on j
//   2  reduce   my share: all sources -> sum -> my result, and slot [me] of the second half on every peer
//   3  collect  chunk i of every owner's share -> my result
//
// A thread takes the same i in every share and does each step for all its i before the next: pushes need no answer.
#include "collective/launch_cuda.cuh"

namespace sglang_symm {

namespace device {

namespace {

struct Halves {
  Slots partials;  // [source]
  Slots results;   // [owner]
};

__device__ __forceinline__ Halves halves_of(const SumCuda& a, const Session& s) {
  const size_t half = a.slot_bytes / 2;
  const size_t part = half / static_cast<unsigned>(s.call.world_size) / 128 * 128;
  const size_t begin = a.slots + s.parity() * a.slot_bytes;
  return {{begin, part}, {begin + half, part}};
}

template <class Type, bool Plain, int Max>
__global__ void __launch_bounds__(kMaxWorkers + kWarp, 1) two_shot(const __grid_constant__ SumCuda a) {
  const Session s = begin(a.call);
  if (!s.alive) {
    if (!is_signal_warp()) fill<Type>(a.out, a.count);
  } else if (is_signal_warp()) {
    if (blockIdx.x == 0) {
      send_headers(s);
      await_headers(s);
    }
  } else {
    const auto [partials, results] = halves_of(a, s);
    const int world = s.call.world_size;
    const uint32_t chunks = chunks_of<Type>(a.count);
    const uint32_t share = (chunks + world - 1) / world;
    const uint32_t mine = static_cast<uint32_t>(s.call.rank) * share;
    const Workers w = workers();
    const bool in_aligned = is_aligned(a.in), out_aligned = is_aligned(a.out);
    for (uint32_t i = w.first; i < share; i += w.stride) {
      for (int step = 1; step < world; step++) {
        const int owner = s.peer(step);
        const uint32_t chunk = static_cast<uint32_t>(owner) * share + i;
        if (chunk >= chunks) continue;
        const uint4 x = sendable<Type>(load_chunk<Type, Plain>(a.in, chunk, a.count, in_aligned));
        store_sys(static_cast<void*>(partials.at(s, owner, s.call.rank, i)), x);
      }
    }
    for (uint32_t i = w.first; i < share && mine + i < chunks; i += w.stride) {
      uint4 v[Max];
      const uint4 own = load_chunk<Type, Plain>(a.in, mine + i, a.count, in_aligned);
      uint4 sum = all_bits_set();
      if (receive(s, partials, i, v)) {
        re_arm<Max>(s, partials, i);
        sum =
            sum_in_rank_order<Type, Plain>(v, own, s.call.rank, world, {a.bias, a.bias_length, a.bias_start}, mine + i);
        // A sum is never the sentinel: its NaN is the canonical one.
        for (int step = 1; step < world; step++) {
          store_sys(static_cast<void*>(results.at(s, s.peer(step), s.call.rank, i)), sum);
        }
      }
      store_chunk<Type, Plain>(a.out, mine + i, a.count, out_aligned, sum);
    }
    for (uint32_t i = w.first; i < share; i += w.stride) {
#pragma unroll 1
      for (int step = 1; step < world; step++) {
        const int owner = s.peer(step);
        const uint32_t chunk = static_cast<uint32_t>(owner) * share + i;
        if (chunk >= chunks) continue;
        void* slot = results.at(s, s.call.rank, owner, i);
        uint4 sum;
        const auto came = [&] {
          sum = load_sys(static_cast<const void*>(slot));
          return is_data(sum);
        };
        if (wait(s, came, [&] { return 1u << owner; })) {
          store_sys(slot, all_bits_set());
        } else {
          sum = all_bits_set();
        }
        store_chunk<Type, Plain>(a.out, chunk, a.count, out_aligned, sum);
      }
    }
  }
  end(s);
}

template <class Type, int Max>
__global__ void __launch_bounds__(kMaxWorkers + kWarp, 1) reduce_scatter(const __grid_constant__ ScatterCuda a) {
  const Session s = begin(a.call);
  if (!s.alive) {
    if (!is_signal_warp()) fill<Type>(a.out, a.count);
  } else if (is_signal_warp()) {
    if (blockIdx.x == 0) {
      send_headers(s);
      await_headers(s);
    }
  } else {
    const size_t part = a.slot_bytes / static_cast<unsigned>(s.call.world_size) / 128 * 128;
    const Slots slots{a.slots + s.parity() * a.slot_bytes, part};
    const Workers w = workers();
    const auto part_of = [&](int r) { return static_cast<const typename Type::Storage*>(a.in) + a.part_begin[r]; };
    for (int step = 1; step < s.call.world_size; step++) {
      const int owner = s.peer(step);
      const auto* x = part_of(owner);
      const size_t count = a.part_count[owner];
      for (uint32_t i = w.first; i < chunks_of<Type>(count); i += w.stride) {
        const uint4 v = sendable<Type>(load_chunk<Type>(x, i, count, is_aligned(x)));
        store_sys(static_cast<void*>(slots.at(s, owner, s.call.rank, i)), v);
      }
    }
    const auto* x = part_of(s.call.rank);
    for (uint32_t i = w.first; i < chunks_of<Type>(a.count); i += w.stride) {
      uint4 v[Max];
      const uint4 own = load_chunk<Type>(x, i, a.count, is_aligned(x));
      uint4 sum = all_bits_set();
      if (receive(s, slots, i, v)) {
        re_arm<Max>(s, slots, i);
        sum = sum_in_rank_order<Type, true>(v, own, s.call.rank, s.call.world_size, Bias{}, i);
      }
      store_chunk<Type>(a.out, i, a.count, is_aligned(a.out), sum);
    }
  }
  end(s);
}

}  // namespace

}  // namespace device

void launch_two_shot(const SumCuda& sum, const GridCuda& grid, cudaStream_t stream) {
  using namespace device;
  with_type(sum.call.descriptor.dtype, [&](auto type) {
    with_world(sum.call.world_size, [&](auto max) {
      with_plain<decltype(type)>(sum, [&](auto plain) {
        launch(&two_shot<decltype(type), decltype(plain)::value, decltype(max)::value>, sum, grid.ctas,
               grid.threads + kWarp, stream);
      });
    });
  });
}

void launch_reduce_scatter(const ScatterCuda& sum, const GridCuda& grid, cudaStream_t stream) {
  using namespace device;
  with_type(sum.call.descriptor.dtype, [&](auto type) {
    with_world(sum.call.world_size, [&](auto max) {
      launch(&device::reduce_scatter<decltype(type), decltype(max)::value>, sum, grid.ctas, grid.threads + kWarp,
             stream);
    });
  });
}

}  // namespace sglang_symm
