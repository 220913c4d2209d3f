// A CTA takes whole rows, because a norm needs all of its row:
//
//   workers      | load x, push its rows | wait for a row's words, sum, add the residual, re-arm | mean | y |
//   signal warp  | my headers            | all headers, compared                                 | epochs
#include "collective/norm_cuda.h"

#include <algorithm>

#include "collective/launch_cuda.cuh"

namespace sglang_symm {

namespace device {

namespace {

constexpr int kNormWorkers = 512;
constexpr int kNormWarps = kNormWorkers / kWarp;

// A row of a [rows, columns] tensor.
template <class Type>
__device__ __forceinline__ const void* row_of(const void* tensor, uint32_t row, uint32_t columns) {
  return static_cast<const typename Type::Storage*>(tensor) + size_t{row} * columns;
}
template <class Type>
__device__ __forceinline__ void* row_of(void* tensor, uint32_t row, uint32_t columns) {
  return static_cast<typename Type::Storage*>(tensor) + size_t{row} * columns;
}

template <class Type>
__device__ __forceinline__ uint32_t add_words(uint32_t a, uint32_t b) {
  constexpr int kInWord = Type::kElements / 4;
  float f[kInWord], g[kInWord];
  Type::unpack(a, f);
  Type::unpack(b, g);
#pragma unroll
  for (int i = 0; i < kInWord; i++) f[i] = __fadd_rn(f[i], g[i]);
  return Type::round(f);
}

template <class Type>
__device__ __forceinline__ uint4 add(uint4 a, uint4 b) {
  return make_uint4(add_words<Type>(a.x, b.x), add_words<Type>(a.y, b.y), add_words<Type>(a.z, b.z),
                    add_words<Type>(a.w, b.w));
}

// total + the squares of a chunk, one after the other.
template <class Type>
__device__ __forceinline__ float add_squares(float total, uint4 h) {
  constexpr int kInWord = Type::kElements / 4;
  const uint32_t word[4] = {h.x, h.y, h.z, h.w};
#pragma unroll
  for (int w = 0; w < 4; w++) {
    float f[kInWord];
    Type::unpack(word[w], f);
#pragma unroll
    for (int i = 0; i < kInWord; i++) total = __fmaf_rn(f[i], f[i], total);
  }
  return total;
}

// round(weight * round(h * scale)), a word.
template <class Type>
__device__ __forceinline__ uint32_t scale_word(uint32_t h, uint32_t weight, float scale) {
  constexpr int kInWord = Type::kElements / 4;
  float f[kInWord], g[kInWord];
  Type::unpack(h, f);
#pragma unroll
  for (int i = 0; i < kInWord; i++) f[i] = __fmul_rn(f[i], scale);
  Type::unpack(Type::round(f), f);
  Type::unpack(weight, g);
#pragma unroll
  for (int i = 0; i < kInWord; i++) f[i] = __fmul_rn(g[i], f[i]);
  return Type::round(f);
}

// A named barrier: the signal warp may be waiting for a peer.
__device__ __forceinline__ void meet(uint32_t workers) {
  named_barrier_sync_warps<1>(workers);
}

// The sum of all workers' totals, the same bits in each. `partial` alternates from row to row, so that one barrier is
// enough.
__device__ __forceinline__ float sum_of_workers(float total, uint32_t workers, float* partial) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) total += __shfl_xor_sync(kAllLanes, total, lane);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = total;
  meet(workers);
  float sum = 0;
  for (uint32_t warp = 0; warp < workers / kWarp; warp++) sum += partial[warp];
  return sum;
}

// One row of one CTA. `h_of(chunk, u)` makes the chunks of h (and stores them); each thread keeps its first `Unroll`.
// A row that is longer is read again, by the thread that wrote it.
template <class Type, bool Plain, int Unroll, class HiddenOf>
__device__ __forceinline__ void norm_row(const NormCuda& a, uint32_t row, uint32_t workers, float* partial,
                                         const HiddenOf& hidden_of) {
  const uint32_t chunks = chunks_of<Type>(a.columns);
  const uint32_t step = Unroll * workers;
  void* hidden = row_of<Type>(a.hidden, row, a.columns);
  void* y = row_of<Type>(a.y, row, a.columns);
  const bool hidden_aligned = is_aligned(hidden), y_aligned = is_aligned(y), weight_aligned = is_aligned(a.weight);
  uint4 h[Unroll], weight[Unroll];
  const auto load_weight = [&](uint32_t first) {
#pragma unroll
    for (int u = 0; u < Unroll; u++) {
      const uint32_t chunk = first + u * workers;
      if (chunk < chunks) weight[u] = load_chunk<Type, Plain>(a.weight, chunk, a.columns, weight_aligned);
    }
  };
  load_weight(threadIdx.x);  // it comes while peers are waited for
  float total = 0;
  for (uint32_t first = threadIdx.x; first < chunks; first += step) {
    hidden_of(first, h);
#pragma unroll
    for (int u = 0; u < Unroll; u++) {
      const uint32_t chunk = first + u * workers;
      if (chunk >= chunks) continue;
      store_chunk<Type, Plain>(hidden, chunk, a.columns, hidden_aligned, h[u]);
      total = add_squares<Type>(total, h[u]);
    }
  }
  const float mean = sum_of_workers(total, workers, partial) / static_cast<float>(a.columns);
  const float scale = rsqrtf(mean + a.eps);
  for (uint32_t first = threadIdx.x; first < chunks; first += step) {
    if (first != threadIdx.x) load_weight(first);
#pragma unroll
    for (int u = 0; u < Unroll; u++) {
      const uint32_t chunk = first + u * workers;
      if (chunk >= chunks) continue;
      const uint4 v = chunks <= step ? h[u] : load_chunk<Type, Plain>(hidden, chunk, a.columns, hidden_aligned);
      const uint4 w = weight[u];
      store_chunk<Type, Plain>(y, chunk, a.columns, y_aligned,
                               make_uint4(scale_word<Type>(v.x, w.x, scale), scale_word<Type>(v.y, w.y, scale),
                                          scale_word<Type>(v.z, w.z, scale), scale_word<Type>(v.w, w.w, scale)));
    }
  }
}

template <class Type, bool Plain, int Max, int Unroll>
__global__ void __launch_bounds__(kNormWorkers + kWarp, 1) all_reduce_norm(const __grid_constant__ NormCuda a) {
  __shared__ float partial[2][kNormWarps];
  const Session s = begin(a.call);
  if (is_signal_warp()) {
    if (blockIdx.x == 0 && __all_sync(kAllLanes, s.alive)) {
      send_headers(s);
      await_headers(s);
    }
  } else {
    const int world = s.call.world_size;
    const Slots slots{a.slots + s.parity() * a.slot_bytes, a.slot_bytes / static_cast<unsigned>(world) / 128 * 128};
    const uint32_t chunks = chunks_of<Type>(a.columns);
    const uint32_t workers = blockDim.x - kWarp;
    // Not one branch for the CTA: `broken` may rise while its threads read it, and all of them meet in every row.
    for (uint32_t row = blockIdx.x; s.alive && row < a.rows; row += gridDim.x) {
      const void* x = row_of<Type>(a.in, row, a.columns);
      for (uint32_t chunk = threadIdx.x; chunk < chunks; chunk += workers) {
        const uint4 own = sendable<Type>(load_chunk<Type, Plain>(x, chunk, a.columns, is_aligned(x)));
#pragma unroll
        for (int step = 1; step < Max; step++) {
          if (step >= world) break;
          store_sys(static_cast<void*>(slots.at(s, s.peer(step), s.call.rank, row * chunks + chunk)), own);
        }
      }
    }
    uint32_t turn = 0;
    for (uint32_t row = blockIdx.x; row < a.rows; row += gridDim.x, turn ^= 1) {
      const void* x = row_of<Type>(a.in, row, a.columns);
      const void* residual = row_of<Type>(a.residual, row, a.columns);
      const bool x_aligned = is_aligned(x), residual_aligned = is_aligned(residual);
      const uint32_t slot = row * chunks;
      norm_row<Type, Plain, Unroll>(a, row, workers, partial[turn], [&](uint32_t first, uint4(&h)[Unroll]) {
        uint4 own[Unroll], r[Unroll], v[Unroll][Max];
        bool came[Unroll];
#pragma unroll
        for (int u = 0; u < Unroll; u++) {
          const uint32_t chunk = first + u * workers;
          if (chunk >= chunks) continue;
          own[u] = sendable<Type>(load_chunk<Type, Plain>(x, chunk, a.columns, x_aligned));
          r[u] = load_chunk<Type, Plain>(residual, chunk, a.columns, residual_aligned);
          came[u] = s.alive && look(s, slots, slot + chunk, v[u]);
        }
#pragma unroll
        for (int u = 0; u < Unroll; u++) {
          const uint32_t chunk = first + u * workers;
          if (chunk >= chunks) continue;
          if (!came[u]) came[u] = s.alive && receive(s, slots, slot + chunk, v[u]);
          h[u] = all_bits_set();
          if (!came[u]) continue;  // NaN: the whole row becomes it
          re_arm<Max>(s, slots, slot + chunk);
          h[u] = add<Type>(sum_in_rank_order<Type, true>(v[u], own[u], s.call.rank, world, Bias{}, chunk), r[u]);
        }
      });
    }
  }
  end(s);
}

template <class Type, bool Plain, int Unroll>
__global__ void __launch_bounds__(kNormWorkers, 2) norm(const __grid_constant__ NormCuda a) {
  __shared__ float partial[kNormWarps];
  // Nothing is read before this: by way of programmatic launches even the kernel before the last may still be running.
  wait_for_previous_kernel();
  let_next_kernel_in();
  const uint32_t row = blockIdx.x, chunks = chunks_of<Type>(a.columns), workers = blockDim.x;
  const void* sum = row_of<Type>(a.in, row, a.columns);
  const void* residual = row_of<Type>(a.residual, row, a.columns);
  const bool sum_aligned = is_aligned(sum), residual_aligned = is_aligned(residual);
  norm_row<Type, Plain, Unroll>(a, row, workers, partial, [&](uint32_t first, uint4(&h)[Unroll]) {
    uint4 r[Unroll];
#pragma unroll
    for (int u = 0; u < Unroll; u++) {
      const uint32_t chunk = first + u * workers;
      if (chunk >= chunks) continue;
      h[u] = load_chunk<Type, Plain>(sum, chunk, a.columns, sum_aligned);
      r[u] = load_chunk<Type, Plain>(residual, chunk, a.columns, residual_aligned);
    }
#pragma unroll
    for (int u = 0; u < Unroll; u++) h[u] = add<Type>(h[u], r[u]);
  });
}

// Threads for a row: one chunk each while they are few, then two, then as many as there are.
template <class Type>
int workers_for(uint32_t columns) {
  const uint32_t chunks = std::max(1u, chunks_of<Type>(columns));
  const uint32_t threads = chunks <= kNormWorkers / 2 ? chunks : (chunks + 1) / 2;
  return static_cast<int>(std::min<uint32_t>((threads + kWarp - 1) / kWarp * kWarp, kNormWorkers));
}

// Calls f with std::true_type when every row of every tensor is aligned and whole chunks.
template <class Type, class F>
void with_plain_rows(const NormCuda& a, const F& f) {
  bool plain = a.columns % Type::kElements == 0;
  for (const void* p : {a.in, a.residual, a.weight, const_cast<const void*>(a.y), const_cast<const void*>(a.hidden)}) {
    plain &= (reinterpret_cast<uintptr_t>(p) & 15) == 0;
  }
  if (plain) return f(std::true_type{});
  return f(std::false_type{});
}

}  // namespace

}  // namespace device

size_t norm_slot_bytes(size_t rows, size_t columns, DType dtype) {
  const size_t per_chunk = 16 / element_size(dtype);
  return rows * ((columns + per_chunk - 1) / per_chunk) * 16;
}

void launch_all_reduce_norm(const NormCuda& a, int max_ctas, cudaStream_t stream) {
  using namespace device;
  with_type(a.dtype, [&](auto type) {
    using Type = decltype(type);
    with_plain_rows<Type>(a, [&](auto plain) {
      constexpr bool kPlain = decltype(plain)::value;
      // Rows that are not whole chunks are slow anyway: one kernel for all world sizes.
      with_world(kPlain ? a.call.world_size : kMaxWorldSize, [&](auto max) {
        constexpr int kMax = kPlain ? decltype(max)::value : kMaxWorldSize;
        constexpr int kUnroll = kPlain && kMax <= 4 ? 2 : 1;
        const int ctas = static_cast<int>(std::clamp<uint32_t>(a.rows, 1, static_cast<uint32_t>(max_ctas)));
        launch(&all_reduce_norm<Type, kPlain, kMax, kUnroll>, a, ctas, workers_for<Type>(a.columns) + kWarp, stream);
      });
    });
  });
}

void launch_norm(const NormCuda& a, cudaStream_t stream) {
  using namespace device;
  if (a.rows == 0) return;
  with_type(a.dtype, [&](auto type) {
    using Type = decltype(type);
    with_plain_rows<Type>(a, [&](auto plain) {
      constexpr bool kPlain = decltype(plain)::value;
      launch(&norm < Type, kPlain, kPlain ? 2 : 1 >, a, static_cast<int>(a.rows), workers_for<Type>(a.columns), stream);
    });
  });
}

}  // namespace sglang_symm
