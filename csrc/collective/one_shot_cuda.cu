// One-shot all-reduce: every rank pushes all of x into its slot on every peer and sums all slots in rank order.
//
//   workers      | load x, push | look until all words have come | sum, round, store, re-arm |
//   signal warp  | my headers   | epochs | all headers, compared                             |
//
// A slot's word is data as soon as it differs from the sentinel, so nothing else is sent and nothing is fenced.
#include "collective/launch_cuda.cuh"

namespace sglang_symm {

namespace device {

namespace {

// The slots of one chunk in parity 0: where it goes, in the order of pushing, and where the peers' arrive.
template <int Max>
struct Route {
  std::byte* to[Max - 1];
  std::byte* from;  // rank 0's
};

template <int Max>
__device__ __forceinline__ Route<Max> route_of(const SumCuda& a, uint32_t chunk) {
  const Slots slots{a.slots, a.part};
  Route<Max> route;
#pragma unroll
  for (int step = 1; step < Max; step++) {
    const int peer = Max == 2 || step < a.call.world_size ? peer_of(a.call, step) : a.call.rank;
    route.to[step - 1] = slots.at(a.call, peer, a.call.rank, chunk);
  }
  route.from = slots.at(a.call, a.call.rank, 0, chunk);
  uint32_t bits = bits_of(route.from);
#pragma unroll
  for (int step = 1; step < Max; step++) bits ^= bits_of(route.to[step - 1]);
  make_now(bits);
  return route;
}

// From parity 0 to the call's.
__device__ __forceinline__ size_t shift_of(const SumCuda& a, const Session& s) {
  return s.parity() * a.slot_bytes;
}

template <class Type, int Max>
__device__ __forceinline__ uint4 push(const Session& s, const Route<Max>& route, size_t shift, uint4 own) {
  own = sendable<Type>(own);
#pragma unroll
  for (int step = 1; step < Max; step++) {
    if (Max == 2 || step < s.call.world_size) store_sys(static_cast<void*>(route.to[step - 1] + shift), own);
  }
  return own;
}

template <class Type, bool Plain, int Max>
__device__ __forceinline__ void reduce(const SumCuda& a, const Session& s, uint32_t chunk, std::byte* from, uint4 own,
                                       bool came, uint4 (&v)[Max]) {
  if (!came) {
    store_chunk<Type, Plain>(a.out, chunk, a.count, is_aligned(a.out), all_bits_set());
    return;
  }
  const Bias bias{a.bias, a.bias_length, a.bias_start};
  const uint4 sum = sum_in_rank_order<Type, Plain>(v, own, s.call.rank, s.call.world_size, bias, chunk);
  store_chunk<Type, Plain>(a.out, chunk, a.count, is_aligned(a.out), sum);
  re_arm<Max>(s, from, a.part);  // after the result: 0.1 us sooner
}

// Small: one chunk a thread. All addresses are made before the kernel before this one has ended, and x and the epoch
// are loaded at the same time.
template <class Type, bool Plain, int Max>
__global__ void __launch_bounds__(kMaxWorkers + kWarp, 1) one_shot(const __grid_constant__ SumCuda a) {
  if (is_signal_warp()) {
    keep_protocol(begin(a.call));
    return;
  }
  const uint32_t chunk = workers().first;
  const bool active = chunk < chunks_of<Type>(a.count);
  const Route<Max> route = route_of<Max>(a, chunk);
  make_now(bits_of(a.in) ^ bits_of(a.out) ^ static_cast<uint32_t>(a.slot_bytes));
  const Door door = arrive(a.call);
  uint4 own{};
  if (active) own = load_chunk<Type, Plain>(a.in, chunk, a.count, is_aligned(a.in));
  const Session s = enter(a.call, door);
  const size_t shift = shift_of(a, s);
  if (active && s.alive) own = push<Type>(s, route, shift, own);
  epoch_is_read();
  if (!active) return;
  uint4 v[Max];
  const bool came = s.alive && receive(s, route.from + shift, a.part, v);
  reduce<Type, Plain>(a, s, chunk, route.from + shift, own, came, v);
}

// Large: a thread takes `Unroll` chunks at a time and pushes the next ones before it waits for the last, so that the
// link never idles for a round trip. Not earlier, and after a first look at the last: loads queue behind stores that
// the link has not taken yet.
template <class Type, bool Plain, int Max, int Unroll>
__global__ void __launch_bounds__(kMaxWorkers + kWarp, 1) one_shot_stream(const __grid_constant__ SumCuda a) {
  if (is_signal_warp()) {
    keep_protocol(begin(a.call));
    return;
  }
  const uint32_t chunks = chunks_of<Type>(a.count);
  const Workers w = workers();
  const bool aligned = is_aligned(a.in);
  const Route<Max> route = route_of<Max>(a, 0);
  const auto load = [&](uint32_t first, uint4(&x)[Unroll]) {
#pragma unroll
    for (int u = 0; u < Unroll; u++) {
      const uint32_t chunk = first + u * w.stride;
      if (chunk < chunks) x[u] = load_chunk<Type, Plain>(a.in, chunk, a.count, aligned);
    }
  };
  const Door door = arrive(a.call);
  uint4 own[Unroll], next[Unroll];
  load(w.first, own);
  const Session s = enter(a.call, door);
  const size_t shift = shift_of(a, s);
  const auto push_all = [&](uint32_t first, uint4(&x)[Unroll]) {
#pragma unroll
    for (int u = 0; u < Unroll; u++) {
      const uint32_t chunk = first + u * w.stride;
      if (chunk < chunks) x[u] = push<Type>(s, route, shift + size_t{chunk} * 16, x[u]);
    }
  };
  if (s.alive) push_all(w.first, own);
  epoch_is_read();
  if (!s.alive) {
    fill<Type>(a.out, a.count);
    return;
  }
  std::byte* const slot = route.from + shift;
  for (uint32_t first = w.first; first < chunks; first += Unroll * w.stride) {
    load(first + Unroll * w.stride, next);
    uint4 v[Unroll][Max];
    bool came[Unroll];
#pragma unroll
    for (int u = 0; u < Unroll; u++) {
      const uint32_t chunk = first + u * w.stride;
      if (chunk < chunks) came[u] = look(s, slot + size_t{chunk} * 16, a.part, v[u]);
    }
    push_all(first + Unroll * w.stride, next);
#pragma unroll
    for (int u = 0; u < Unroll; u++) {
      const uint32_t chunk = first + u * w.stride;
      if (chunk >= chunks) continue;
      std::byte* from = slot + size_t{chunk} * 16;
      if (!came[u]) came[u] = receive(s, from, a.part, v[u]);
      reduce<Type, Plain>(a, s, chunk, from, own[u], came[u], v[u]);
    }
#pragma unroll
    for (int u = 0; u < Unroll; u++) own[u] = next[u];
  }
}

}  // namespace

}  // namespace device

void launch_one_shot(const SumCuda& sum, const GridCuda& grid, cudaStream_t stream) {
  using namespace device;
  with_type(sum.call.descriptor.dtype, [&](auto type) {
    using Type = decltype(type);
    with_world(sum.call.world_size, [&](auto max) {
      with_plain<Type>(sum, [&](auto plain) {
        constexpr int kMax = decltype(max)::value;
        constexpr bool kPlain = decltype(plain)::value;
        // Measured at P = 2: one chunk at a time is faster up to 8 MB, two beyond.
        constexpr int kUnroll = kPlain && kMax == 2 ? 2 : 1;
        const size_t threads = static_cast<size_t>(grid.ctas) * grid.threads;
        const size_t chunks = chunks_of<Type>(sum.count);
        launch(chunks <= threads       ? &one_shot<Type, kPlain, kMax>
               : chunks <= 8 * threads ? &one_shot_stream<Type, kPlain, kMax, 1>
                                       : &one_shot_stream<Type, kPlain, kMax, kUnroll>,
               sum, grid.ctas, grid.threads + kWarp, stream);
      });
    });
  });
}

}  // namespace sglang_symm
