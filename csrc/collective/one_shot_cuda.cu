// One-shot all-reduce: every rank pushes all of x into its slot on every peer and sums all slots in rank order.
//
//   workers      | load x, push | look until all words have come | sum, round, store, re-arm |
//   signal warp  | my headers   | all headers, compared                                      | epochs
//
// A slot's word is data as soon as it differs from the sentinel, so nothing else is sent and nothing is fenced.
#include "collective/launch_cuda.cuh"

namespace sglang_symm {

namespace device {

namespace {

template <class Type, int Max>
__device__ __forceinline__ uint4 push(const Session& s, const Slots& slots, uint32_t chunk, uint4 own) {
  own = sendable<Type>(own);
#pragma unroll
  for (int step = 1; step < Max; step++) {
    if (step >= s.call.world_size) break;
    store_sys(static_cast<void*>(slots.at(s, s.peer(step), s.call.rank, chunk)), own);
  }
  return own;
}

template <class Type, bool Plain, int Max>
__device__ __forceinline__ void reduce(const SumCuda& a, const Session& s, const Slots& slots, uint32_t chunk,
                                       uint4 own, bool came, uint4 (&v)[Max]) {
  if (!came) {
    store_chunk<Type, Plain>(a.out, chunk, a.count, is_aligned(a.out), all_bits_set());
    return;
  }
  re_arm<Max>(s, slots, chunk);
  const Bias bias{a.bias, a.bias_length, a.bias_start};
  const uint4 sum = sum_in_rank_order<Type, Plain>(v, own, s.call.rank, s.call.world_size, bias, chunk);
  store_chunk<Type, Plain>(a.out, chunk, a.count, is_aligned(a.out), sum);
}

__device__ __forceinline__ Slots slots_of(const SumCuda& a, const Session& s) {
  const size_t part = a.slot_bytes / static_cast<unsigned>(s.call.world_size) / 128 * 128;
  return {a.slots + s.parity() * a.slot_bytes, part};
}

// Small: one chunk a thread.
template <class Type, bool Plain, int Max>
__global__ void __launch_bounds__(kMaxWorkers + kWarp, 1) one_shot(const __grid_constant__ SumCuda a) {
  const Session s = begin(a.call);
  if (is_signal_warp()) {
    if (blockIdx.x == 0 && s.alive) {
      send_headers(s);
      await_headers(s);
    }
  } else if (const uint32_t chunk = workers().first; chunk < chunks_of<Type>(a.count)) {
    uint4 own = load_chunk<Type, Plain>(a.in, chunk, a.count, is_aligned(a.in));  // before anything waits for the epoch
    const Slots slots = slots_of(a, s);
    uint4 v[Max];
    bool came = false;
    if (s.alive) {
      own = push<Type, Max>(s, slots, chunk, own);
      came = receive(s, slots, chunk, v);
    }
    reduce<Type, Plain>(a, s, slots, chunk, own, came, v);
  }
  end(s);
}

// Large: a thread takes `Unroll` chunks at a time and pushes the next ones before it waits for the last, so that the
// link never idles for a round trip.
template <class Type, bool Plain, int Max, int Unroll>
__global__ void __launch_bounds__(kMaxWorkers + kWarp, 1) one_shot_stream(const __grid_constant__ SumCuda a) {
  const Session s = begin(a.call);
  if (!s.alive) {
    if (!is_signal_warp()) fill<Type>(a.out, a.count);
  } else if (is_signal_warp()) {
    if (blockIdx.x == 0) {
      send_headers(s);
      await_headers(s);
    }
  } else {
    const Slots slots = slots_of(a, s);
    const uint32_t chunks = chunks_of<Type>(a.count);
    const Workers w = workers();
    const bool aligned = is_aligned(a.in);
    const auto push_all = [&](uint32_t first) {
      uint4 own[Unroll];
#pragma unroll
      for (int u = 0; u < Unroll; u++) {
        const uint32_t chunk = first + u * w.stride;
        if (chunk < chunks) own[u] = load_chunk<Type, Plain>(a.in, chunk, a.count, aligned);
      }
#pragma unroll
      for (int u = 0; u < Unroll; u++) {
        const uint32_t chunk = first + u * w.stride;
        if (chunk < chunks) push<Type, Max>(s, slots, chunk, own[u]);
      }
    };
    push_all(w.first);
    for (uint32_t first = w.first; first < chunks; first += Unroll * w.stride) {
      push_all(first + Unroll * w.stride);
      uint4 own[Unroll];
      uint4 v[Unroll][Max];
      bool came[Unroll];
#pragma unroll
      for (int u = 0; u < Unroll; u++) {
        const uint32_t chunk = first + u * w.stride;
        if (chunk >= chunks) continue;
        own[u] = load_chunk<Type, Plain>(a.in, chunk, a.count, aligned);
        came[u] = look(s, slots, chunk, v[u]);
      }
#pragma unroll
      for (int u = 0; u < Unroll; u++) {
        const uint32_t chunk = first + u * w.stride;
        if (chunk >= chunks) continue;
        if (!came[u]) came[u] = receive(s, slots, chunk, v[u]);
        reduce<Type, Plain>(a, s, slots, chunk, own[u], came[u], v[u]);
      }
    }
  }
  end(s);
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
        constexpr int kUnroll = !kPlain ? 1 : kMax == 2 ? 4 : kMax == 4 ? 2 : 1;
        const bool small = chunks_of<Type>(sum.count) <= static_cast<size_t>(grid.ctas) * grid.threads;
        launch(small ? &one_shot<Type, kPlain, kMax> : &one_shot_stream<Type, kPlain, kMax, kUnroll>, sum, grid.ctas,
               grid.threads + kWarp, stream);
      });
    });
  });
}

}  // namespace sglang_symm
