// Algorithms that write into peers' tensors in their arenas: two-shot direct and large copies.
//
//   two_shot_direct
//   CTA 0        | my header (where my result lies, and my x if it is to be read there) |
//   every CTA    | its chunks of every share -> staging of their owners | arrived flags, headers out and in |
//                | sums of its chunks of my share -> everybody's result | done flags out and in |
//   copy_direct
//   CTA 0        | fence, my header |
//   every CTA    | all headers      | its chunks -> everybody's result   | done flags out and in |
//
// CTA c of a rank waits for CTA c of its peers: grids are equal on all ranks, and CTA c takes the same chunks
// everywhere. Staging memory needs no parities: a rank's next call begins when all peers have sent it their done flags,
// hence have read what it had sent.
#include "collective/launch_cuda.cuh"

namespace sglang_symm {

namespace device {

namespace {

// All threads of the CTA, when they have their epoch and have sent what they send unasked. Then the signal warp sends
// this rank's header (CTA 0's) and advances the epochs, which would hold the kernel up at its end.
__device__ __forceinline__ bool open(const Session& s) {
  const bool fine = __syncthreads_and(s.alive) != 0;  // one answer for the CTA: `broken` may rise in between
  if (is_signal_warp()) {
    if (fine && blockIdx.x == 0) send_headers(s);
    advance_epochs(s, threadIdx.x & (kWarp - 1), kWarp);
  }
  return fine;
}

// What earlier kernels wrote here, before the header that lets peers read it or write over it. Called while the epoch
// is on its way: the header waits for both.
__device__ __forceinline__ void fence_before_header() {
  if (is_signal_warp() && blockIdx.x == 0) fence_sys();
}

// The peers', by rank.
struct Places {
  const std::byte* in[kMaxWorldSize];  // my share of x
  std::byte* out[kMaxWorldSize];       // the result
};

// The signal warp, when the CTA's contributions are on their way: true when its peers' are here and all headers agree;
// then `places` is filled. Headers first: who calls something else sends no contributions.
__device__ __forceinline__ bool meet_with_contributions(const SumCuda& a, const Session& s, Offsets* offsets,
                                                        Places* places) {
  const int lane = static_cast<int>(threadIdx.x & (kWarp - 1));
  const int me = s.call.rank;
  const bool has_peer = lane < s.call.world_size && lane != me;
  if (has_peer && s.call.offset_in == kNoOffset) raise_flag(s, lane, &PadCuda::arrived);
  if (!await_headers(s, offsets)) return false;
  bool fine = true;
  if (has_peer) {
    const uint64_t in = offsets->in[lane], mine = uint64_t{a.share} * 16 * static_cast<uint32_t>(me);
    if (in == kNoOffset) {
      places->in[lane] = Slots{a.slots, a.part}.at(s, me, lane, 0);
      fine = await_flag(s, lane, &PadCuda::arrived);
    } else {
      places->in[lane] = s.call.window[lane] + in + mine;
    }
    places->out[lane] = s.call.window[lane] + offsets->out[lane];
  }
  return __all_sync(kAllLanes, fine) != 0;
}

// Chunk i of my share of everybody's x; v[r] is valid for all r but the own.
template <int Max>
__device__ __forceinline__ void gather(const Session& s, const Places& places, uint32_t i, uint4 (&v)[Max]) {
#pragma unroll
  for (int r = 0; r < (Max == 2 ? 1 : Max); r++) {
    const int from = Max == 2 ? s.peer(1) : r;
    const bool comes = Max == 2 || (r < s.call.world_size && r != s.call.rank);
    v[r] = comes ? load_sys(static_cast<const void*>(places.in[from] + size_t{i} * 16)) : make_uint4(0, 0, 0, 0);
  }
}

template <class Type, bool Plain, int Max, int Unroll>
__global__ void __launch_bounds__(kMaxWorkers + kWarp, 1) two_shot_direct(const __grid_constant__ SumCuda a) {
  __shared__ Offsets offsets;
  __shared__ Places places;
  const bool works = !is_signal_warp();
  const bool pushes = a.call.offset_in == kNoOffset;
  const int world = a.call.world_size;
  const int me = a.call.rank;
  const SharesOf<Type, Plain, Max, Unroll> shares(a);
  const Workers w = workers();
  uint4 x[Unroll][Max];
  const Door door = arrive(a.call);
  if (works && pushes) shares.load(w.first, x);
  const Session s = enter(a.call, door);
  if (!pushes) fence_before_header();
  if (works && pushes && s.alive) {
    const Slots staging{a.slots, a.part};
    for (uint32_t first = w.first; first < a.share;) {
      shares.each(first, [&](int u, int step, int owner, uint32_t i, uint32_t) {
        store_sys(static_cast<void*>(staging.at(s, owner, me, i)), x[u][step]);
      });
      first += Unroll * w.stride;
      shares.load(first, x);
    }
  }
  bool fine = open(s);
  if (fine && !works) fine = meet_with_contributions(a, s, &offsets, &places);
  fine = __syncthreads_and(fine) != 0;
  const uint32_t mine = shares.begin(me);
  if (fine && works) {
    for (uint32_t first = w.first; first < a.share && mine + first < shares.chunks; first += Unroll * w.stride) {
      uint4 own[Unroll];
      uint4 v[Unroll][Max];
#pragma unroll
      for (int u = 0; u < Unroll; u++) {
        const uint32_t i = first + u * w.stride;
        if (i >= a.share || mine + i >= shares.chunks) continue;
        own[u] = load_chunk<Type, Plain>(a.in, mine + i, a.count, shares.in_aligned);
        gather(s, places, i, v[u]);
      }
#pragma unroll
      for (int u = 0; u < Unroll; u++) {
        const uint32_t i = first + u * w.stride;
        if (i >= a.share || mine + i >= shares.chunks) continue;
        const Bias bias{a.bias, a.bias_length, a.bias_start};
        const uint4 sum = sum_in_rank_order<Type, Plain>(v[u], own[u], me, world, bias, mine + i);
        for (int step = 1; step < world; step++) {
          store_chunk<Type, Plain>(places.out[s.peer(step)], mine + i, a.count, true, sum);
        }
        store_chunk<Type, Plain>(a.out, mine + i, a.count, shares.out_aligned, sum);
      }
    }
  }
  if (fine) fine = finish(s);
  const std::byte* result = s.call.window[me] + s.call.offset_out;
  if (works && !fine) shares.fill();
  if (works && fine && result != a.out) {
    for (uint32_t first = w.first; first < a.share; first += Unroll * w.stride) {
      uint4 v[Unroll][Max];
      shares.each(first, [&](int u, int step, int, uint32_t, uint32_t chunk) {
        v[u][step] = load_sys(static_cast<const void*>(result + size_t{chunk} * 16));
      });
      shares.each(first, [&](int u, int step, int, uint32_t, uint32_t chunk) {
        store_chunk<Type>(a.out, chunk, a.count, shares.out_aligned, v[u][step]);
      });
    }
  }
}

// Where bytes go: to all of them at once, so that they are loaded once. In shared memory: an array that a thread
// indexes would lie in memory otherwise.
struct Destinations {
  std::byte* at[kMaxWorldSize];
  int count;

  __device__ __forceinline__ std::byte* operator[](int d) const { return at[d]; }
};
struct Destination {
  std::byte* at;
  static constexpr int count = 1;

  __device__ __forceinline__ std::byte* operator[](int) const { return at; }
};

template <class Word, class To>
__device__ __forceinline__ void copy_words(const To& to, size_t begin, const std::byte* from, size_t words) {
  const Workers w = workers();
  constexpr int kUnroll = 4;
  for (size_t first = w.first; first < words; first += size_t{kUnroll} * w.stride) {
    Word v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      const size_t i = first + size_t(u) * w.stride;
      if (i < words) v[u] = reinterpret_cast<const Word*>(from + begin)[i];
    }
#pragma unroll 1
    for (int d = 0; d < to.count; d++) {
      Word* const at = reinterpret_cast<Word*>(to[d] + begin);
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        const size_t i = first + size_t(u) * w.stride;
        if (i < words) at[i] = v[u];
      }
    }
  }
}

// `bytes` from anywhere to anywhere by the grid's workers, as wide as all addresses allow.
template <class To>
__device__ __forceinline__ void copy_bytes(const To& to, const std::byte* from, size_t bytes) {
  auto bits = reinterpret_cast<uintptr_t>(from);
  for (int d = 0; d < to.count; d++) bits |= reinterpret_cast<uintptr_t>(to[d]);
  const size_t width = (bits & 15) == 0 ? 16 : (bits & 3) == 0 ? 4 : 1;
  const size_t whole = bytes / width * width;
  if (width == 16) {
    copy_words<uint4>(to, 0, from, bytes / 16);
  } else if (width == 4) {
    copy_words<uint32_t>(to, 0, from, bytes / 4);
  } else {
    copy_words<uint8_t>(to, 0, from, bytes);
  }
  if (whole != bytes) copy_words<uint8_t>(to, whole, from, bytes - whole);
}

// By this CTA alone: how the bytes are spread over CTAs is the senders' affair, each by its own alignment.
__device__ __forceinline__ void fill_bytes(std::byte* to, size_t bytes) {
  for (size_t i = threadIdx.x; i < bytes; i += blockDim.x - kWarp) to[i] = std::byte{0xFF};
}

// A receiver whose result lies outside of its arena takes the contributions in staging, one `offset_in` apart.
__global__ void __launch_bounds__(kMaxWorkers + kWarp, 1) copy_direct(const __grid_constant__ CopyCuda a) {
  __shared__ Offsets offsets;
  __shared__ Destinations to;
  const Session s = begin(a.call);
  fence_before_header();
  const int me = s.call.rank;
  const std::byte* in = static_cast<const std::byte*>(a.in);
  std::byte* out = static_cast<std::byte*>(a.out);
  std::byte* const mine = out + a.begin[me];
  const bool beside = !a.in_place && is_aligned(mine);  // else the peers' copies would be as narrow as this rank's
  bool fine = open(s);
  if (fine && is_signal_warp()) {
    fine = await_headers(s, &offsets);
    const int step = 1 + static_cast<int>(threadIdx.x & (kWarp - 1));  // this rank last
    if (fine && step < s.call.world_size) {
      const int peer = s.peer(step);
      const size_t place = offsets.in[peer] == 0 ? a.begin[me] : static_cast<size_t>(me) * offsets.in[peer];
      to.at[step - 1] = s.call.window[peer] + offsets.out[peer] + place;
    } else if (step == s.call.world_size) {
      to.at[step - 1] = mine;
      to.count = beside ? step : step - 1;
    }
  }
  fine = __syncthreads_and(fine) != 0;
  if (fine && !is_signal_warp()) {
    copy_bytes(to, in, a.bytes[me]);
    if (!beside && !a.in_place) copy_bytes(Destination{mine}, in, a.bytes[me]);
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
  if (!fine && !is_signal_warp()) {
    for (int r = 0; r < s.call.world_size; r++) {
      if (r != me || !a.in_place) fill_bytes(out + a.begin[r], a.bytes[r]);
    }
  } else if (distance != 0 && !is_signal_warp()) {
    for (int step = 1; step < s.call.world_size; step++) {
      const int peer = s.peer(step);
      const std::byte* staged = s.call.window[me] + s.call.offset_out + static_cast<size_t>(peer) * distance;
      copy_bytes(Destination{out + a.begin[peer]}, staged, a.bytes[peer]);
    }
  }
}

}  // namespace

}  // namespace device

void launch_two_shot_direct(const SumCuda& sum, const GridCuda& grid, cudaStream_t stream) {
  using namespace device;
  with_type(sum.call.descriptor.dtype, [&](auto type) {
    with_world(sum.call.world_size, [&](auto max) {
      with_plain<decltype(type)>(sum, [&](auto plain) {
        constexpr int kMax = decltype(max)::value;
        constexpr bool kPlain = decltype(plain)::value;
        constexpr int kUnroll = kMax == 2 ? 4 : kMax == 4 ? 2 : 1;
        launch(&two_shot_direct<decltype(type), kPlain, kMax, kUnroll>, sum, grid.ctas, grid.threads + kWarp, stream);
      });
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
