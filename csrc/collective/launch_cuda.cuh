// How every kernel of collective/ is launched, and what all of them share.
#pragma once

#include <type_traits>

#include "base/driver_cuda.h"
#include "collective/kernels_cuda.h"
#include "collective/vector_cuda.cuh"

namespace sglang_symm::device {

// The last warp of a CTA keeps the protocol; the others, its workers, move data.
__device__ __forceinline__ bool is_signal_warp() {
  return threadIdx.x >= blockDim.x - kWarp;
}
struct Workers {
  uint32_t first, stride;
};
__device__ __forceinline__ Workers workers() {
  const uint32_t each = blockDim.x - kWarp;
  return {blockIdx.x * each + threadIdx.x, gridDim.x * each};
}

// A kernel's end, spread over its run: a worker says that it has its epoch, and the signal warp advances the counters
// while the workers wait for their peers. So nobody waits for anybody at the end, and no store comes after the
// result's.
constexpr int kEpochBarrier = 1;
__device__ __forceinline__ void epoch_is_read() {
  named_barrier_arrive<kEpochBarrier>(blockDim.x);
}

// The whole of the signal warp's work. Workers must not use the epoch's counter after epoch_is_read().
__device__ __forceinline__ void keep_protocol(const Session& s) {
  const bool speaks = blockIdx.x == 0 && __all_sync(kAllLanes, s.alive);  // `broken` may rise while lanes read it
  if (speaks) send_headers(s);
  named_barrier_sync<kEpochBarrier>(blockDim.x);
  advance_epochs(s, threadIdx.x & (kWarp - 1), kWarp);
  if (speaks) await_headers(s);
}

__device__ __forceinline__ bool is_aligned(const void* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

template <class Type>
__host__ __device__ constexpr uint32_t chunks_of(size_t count) {
  return static_cast<uint32_t>((count + Type::kElements - 1) / Type::kElements);
}

// The slots of one parity, cut into one part a source.
struct Slots {
  size_t offset;  // in every arena
  size_t part;    // bytes

  __device__ std::byte* at(const CallCuda& call, int rank, int source, uint32_t chunk) const {
    return call.window[rank] + offset + static_cast<size_t>(source) * part + size_t{chunk} * 16;
  }
  __device__ std::byte* at(const Session& s, int rank, int source, uint32_t chunk) const {
    return at(s.call, rank, source, chunk);
  }
};

__device__ __forceinline__ Slots one_shot_slots(const SumCuda& a, const Session& s) {
  return {a.slots + s.parity() * a.slot_bytes, a.part};
}

// What cannot be had is NaN in every floating dtype.
template <class Type>
__device__ __forceinline__ void fill(void* out, size_t count) {
  const Workers w = workers();
  for (uint32_t i = w.first; i < chunks_of<Type>(count); i += w.stride) {
    store_chunk<Type>(out, i, count, is_aligned(out), all_bits_set());
  }
}

// Max == 2 is a world of 2: the one peer's slot.
__device__ __forceinline__ std::byte* peer_slot(const CallCuda& call, std::byte* slot, size_t part) {
  return call.rank == 0 ? slot + part : slot;
}

// The others' shares of x, which go to their owners: a thread takes chunk i of every share, for some i. A batch is
// `Unroll` such i: its loads are under way together.
template <class Type, bool Plain, int Max, int Unroll>
struct SharesOf {
  const SumCuda& a;
  const uint32_t chunks = chunks_of<Type>(a.count);
  const bool in_aligned = is_aligned(a.in), out_aligned = is_aligned(a.out);

  __device__ __forceinline__ explicit SharesOf(const SumCuda& sum) : a(sum) {}
  __device__ __forceinline__ uint32_t begin(int owner) const { return static_cast<uint32_t>(owner) * a.share; }

  // f(u, step, owner, i, chunk) for what there is of a batch, the next rank's share first.
  template <class F>
  __device__ __forceinline__ void each(uint32_t first, const F& f) const {
    const uint32_t stride = workers().stride;
#pragma unroll
    for (int u = 0; u < Unroll; u++) {
#pragma unroll
      for (int step = 1; step < Max; step++) {
        const int owner = peer_of(a.call, step);
        const uint32_t i = first + u * stride;
        const uint32_t chunk = begin(owner) + i;
        if (step < a.call.world_size && i < a.share && chunk < chunks) f(u, step, owner, i, chunk);
      }
    }
  }
  __device__ __forceinline__ void load(uint32_t first, uint4 (&x)[Unroll][Max]) const {
    each(first, [&](int u, int step, int, uint32_t, uint32_t chunk) {
      x[u][step] = load_chunk<Type, Plain>(a.in, chunk, a.count, in_aligned);
    });
  }
  // NaN into what this thread would have stored, and nothing else: others may have theirs.
  __device__ __forceinline__ void fill() const {
    const Workers w = workers();
    for (uint32_t i = w.first; i < a.share; i += w.stride) {
      for (int owner = 0; owner < a.call.world_size; owner++) {
        const uint32_t chunk = begin(owner) + i;
        if (chunk < chunks) store_chunk<Type>(a.out, chunk, a.count, out_aligned, all_bits_set());
      }
    }
  }
};

// What has come for one chunk: `slot` is rank 0's, `part` apart from the next. v[r] is valid for all r but the own when
// it returns true. Every v[r] is written, so none is kept in a register while a slow poll calls its functions.
template <int Max>
__device__ __forceinline__ bool look(const Session& s, std::byte* slot, size_t part, uint4 (&v)[Max]) {
  if constexpr (Max == 2) {
    v[0] = v[1] = load_sys(static_cast<const void*>(peer_slot(s.call, slot, part)));
    return is_data(v[0]);
  } else {
    bool all = true;
#pragma unroll
    for (int r = 0; r < Max; r++) {
      const bool comes = r < s.call.world_size && r != s.call.rank;
      v[r] = comes ? load_sys(static_cast<const void*>(slot + r * part)) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int r = 0; r < Max; r++) {
      if (r < s.call.world_size && r != s.call.rank) all &= is_data(v[r]);
    }
    return all;
  }
}
template <int Max>
__device__ __forceinline__ bool look(const Session& s, const Slots& slots, uint32_t chunk, uint4 (&v)[Max]) {
  return look(s, slots.at(s, s.call.rank, 0, chunk), slots.part, v);
}

// The ranks whose word of a chunk has not come.
inline __device__ __noinline__ uint32_t missing_in(const CallCuda& call, const std::byte* slot, size_t part) {
  uint32_t mask = 0;
  for (int r = 0; r < call.world_size; r++) {
    const void* word = slot + static_cast<size_t>(r) * part;
    if (r != call.rank && !is_data(load_sys(word))) mask |= 1u << r;
  }
  return mask;
}

template <int Max>
__device__ __forceinline__ bool receive(const Session& s, std::byte* slot, size_t part, uint4 (&v)[Max]) {
  return wait(
      s, [&] { return look(s, slot, part, v); }, [&] { return missing_in(s.call, slot, part); });
}
template <int Max>
__device__ __forceinline__ bool receive(const Session& s, const Slots& slots, uint32_t chunk, uint4 (&v)[Max]) {
  return receive(s, slots.at(s, s.call.rank, 0, chunk), slots.part, v);
}

template <int Max>
__device__ __forceinline__ void re_arm(const Session& s, std::byte* slot, size_t part) {
  if constexpr (Max == 2) {
    store_sys(static_cast<void*>(peer_slot(s.call, slot, part)), all_bits_set());
  } else {
#pragma unroll
    for (int r = 0; r < Max; r++) {
      if (r >= s.call.world_size || r == s.call.rank) continue;
      store_sys(static_cast<void*>(slot + r * part), all_bits_set());
    }
  }
}
template <int Max>
__device__ __forceinline__ void re_arm(const Session& s, const Slots& slots, uint32_t chunk) {
  re_arm<Max>(s, slots.at(s, s.call.rank, 0, chunk), slots.part);
}

// Programmatic launch: the kernel is brought in while the one before it ends, and waits in begin().
template <class Args>
void launch(void (*kernel)(Args), const Args& args, int ctas, int threads, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args), "the launch of a collective's kernel");
}

// Calls f with the element type of `dtype`.
template <class F>
void with_type(DType dtype, const F& f) {
  if (dtype == DType::float32) return f(Float32{});
  if (dtype == DType::bfloat16) return f(BFloat16{});
  if (dtype == DType::float16) return f(Float16{});
  fail(ErrorKind::argument, "a native sum of ", name(dtype), ", expected float32, bfloat16 or float16");
}

// Calls f with std::true_type when both tensors are aligned and whole chunks and there is no bias: see load_chunk.
template <class Type, class F>
void with_plain(const SumCuda& a, const F& f) {
  const auto aligned = [](const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; };
  const bool plain = aligned(a.in) && aligned(a.out) && a.count % Type::kElements == 0 && a.bias == nullptr;
  if (plain) return f(std::true_type{});
  return f(std::false_type{});
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f with the smallest of 4, 8, 16 that holds `world_size`: registers are arrays of that many sources. 2 is a
// world of exactly 2.
template <class F>
void with_world(int world_size, const F& f) {
  if (world_size == 2) return f(Constant<2>{});
  if (world_size <= 4) return f(Constant<4>{});
  if (world_size <= 8) return f(Constant<8>{});
  return f(Constant<16>{});
}

}  // namespace sglang_symm::device
