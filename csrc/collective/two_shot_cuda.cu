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
  const size_t begin = a.slots + s.parity() * a.slot_bytes;
  return {{begin, a.part}, {begin + a.slot_bytes / 2, a.part}};
}

template <class Type, bool Plain, int Max, int Unroll>
__global__ void __launch_bounds__(kMaxWorkers + kWarp, 1) two_shot(const __grid_constant__ SumCuda a) {
  if (is_signal_warp()) {
    keep_protocol(begin(a.call));
    return;
  }
  const int world = a.call.world_size;
  const int me = a.call.rank;
  const SharesOf<Type, Plain, Max, Unroll> shares(a);
  const uint32_t chunks = shares.chunks;
  const uint32_t share = a.share;
  const uint32_t mine = shares.begin(me);
  const Workers w = workers();
  uint4 x[Unroll][Max];
  const Door door = arrive(a.call);
  shares.load(w.first, x);
  const Session s = enter(a.call, door);
  if (!s.alive) {
    epoch_is_read();
    shares.fill();
    return;
  }
  const auto [partials, results] = halves_of(a, s);
  for (uint32_t first = w.first; first < share;) {
    shares.each(first, [&](int u, int step, int owner, uint32_t i, uint32_t) {
      store_sys(static_cast<void*>(partials.at(s, owner, me, i)), sendable<Type>(x[u][step]));
    });
    first += Unroll * w.stride;
    shares.load(first, x);
  }
  epoch_is_read();
  for (uint32_t first = w.first; first < share && mine + first < chunks; first += Unroll * w.stride) {
    uint4 own[Unroll];
    uint4 v[Unroll][Max];
    bool came[Unroll];
#pragma unroll
    for (int u = 0; u < Unroll; u++) {
      const uint32_t i = first + u * w.stride;
      if (i >= share || mine + i >= chunks) continue;
      own[u] = load_chunk<Type, Plain>(a.in, mine + i, a.count, shares.in_aligned);
      came[u] = look(s, partials, i, v[u]);
    }
#pragma unroll
    for (int u = 0; u < Unroll; u++) {
      const uint32_t i = first + u * w.stride;
      if (i >= share || mine + i >= chunks) continue;
      uint4 sum = all_bits_set();
      if (came[u] || receive(s, partials, i, v[u])) {
        const Bias bias{a.bias, a.bias_length, a.bias_start};
        sum = sum_in_rank_order<Type, Plain>(v[u], own[u], me, world, bias, mine + i);
        // A sum is never the sentinel: its NaN is the canonical one.
#pragma unroll
        for (int step = 1; step < Max; step++) {
          if (step < world) store_sys(static_cast<void*>(results.at(s, s.peer(step), me, i)), sum);
        }
        re_arm<Max>(s, partials, i);
      }
      store_chunk<Type, Plain>(a.out, mine + i, a.count, shares.out_aligned, sum);
    }
  }
  for (uint32_t first = w.first; first < share; first += Unroll * w.stride) {
    uint4 sum[Unroll][Max];
    shares.each(first, [&](int u, int step, int owner, uint32_t i, uint32_t) {
      sum[u][step] = load_sys(static_cast<const void*>(results.at(s, me, owner, i)));
    });
    shares.each(first, [&](int u, int step, int owner, uint32_t i, uint32_t chunk) {
      void* slot = results.at(s, me, owner, i);
      const auto look_again = [&] {
        sum[u][step] = load_sys(static_cast<const void*>(slot));
        return is_data(sum[u][step]);
      };
      if (is_data(sum[u][step]) || wait(s, look_again, [&] { return 1u << owner; })) {
        store_sys(slot, all_bits_set());
      } else {
        sum[u][step] = all_bits_set();
      }
      store_chunk<Type, Plain>(a.out, chunk, a.count, shares.out_aligned, sum[u][step]);
    });
  }
}

template <class Type, int Max>
__global__ void __launch_bounds__(kMaxWorkers + kWarp, 1) reduce_scatter(const __grid_constant__ ScatterCuda a) {
  const Session s = begin(a.call);
  if (is_signal_warp()) {
    keep_protocol(s);
    return;
  }
  if (!s.alive) {
    epoch_is_read();
    fill<Type>(a.out, a.count);
    return;
  }
  const Slots slots = one_shot_slots(a, s);
  const Workers w = workers();
  const auto part_of = [&](int r) { return static_cast<const typename Type::Storage*>(a.in) + a.part_begin[r]; };
  const auto push = [&](uint32_t i) {
    for (int step = 1; step < s.call.world_size; step++) {
      const int owner = s.peer(step);
      const auto* x = part_of(owner);
      const size_t count = a.part_count[owner];
      if (i >= chunks_of<Type>(count)) continue;
      const uint4 v = sendable<Type>(load_chunk<Type>(x, i, count, is_aligned(x)));
      store_sys(static_cast<void*>(slots.at(s, owner, s.call.rank, i)), v);
    }
  };
  const auto* x = part_of(s.call.rank);
  const auto reduce = [&](uint32_t i) {
    uint4 v[Max];
    const uint4 own = load_chunk<Type>(x, i, a.count, is_aligned(x));
    uint4 sum = all_bits_set();
    if (receive(s, slots, i, v)) {
      re_arm<Max>(s, slots, i);
      sum = sum_in_rank_order<Type, true>(v, own, s.call.rank, s.call.world_size, Bias{}, i);
    }
    store_chunk<Type>(a.out, i, a.count, is_aligned(a.out), sum);
  };
  // Sums come two rounds of the grid behind what is sent, 6.5 MB between four ranks: the link and the memory are busy
  // together.
  constexpr uint32_t kBehind = 2;
  uint32_t most = 0;
  for (int r = 0; r < s.call.world_size; r++) most = max(most, chunks_of<Type>(a.part_count[r]));
  uint32_t sent = w.first;
  for (uint32_t round = 0; round < kBehind && sent < most; round++, sent += w.stride) push(sent);
  epoch_is_read();
  for (uint32_t i = w.first; i < most; i += w.stride, sent += w.stride) {
    if (sent < most) push(sent);
    if (i < chunks_of<Type>(a.count)) reduce(i);
  }
}

}  // namespace

}  // namespace device

void launch_two_shot(const SumCuda& sum, const GridCuda& grid, cudaStream_t stream) {
  using namespace device;
  with_type(sum.call.descriptor.dtype, [&](auto type) {
    with_world(sum.call.world_size, [&](auto max) {
      with_plain<decltype(type)>(sum, [&](auto plain) {
        constexpr int kMax = decltype(max)::value;
        constexpr bool kPlain = decltype(plain)::value;
        constexpr int kUnroll = kPlain && kMax == 2 ? 2 : 1;
        launch(&two_shot<decltype(type), kPlain, kMax, kUnroll>, sum, grid.ctas, grid.threads + kWarp, stream);
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
