// Reducer warps: wait for all ranks' partials of a tile, sum them in rank order, put the sentinel back, store y.
//
// Reducer warp w of a group takes what math warp w of every rank has pushed; two groups share a tile's chunks. They
// alone wait for peers: a dependent round trip costs 5 to 15 us while the weights stream, so nothing in the way of the
// stream makes one.
//
//   one-shot   reduce(tile i)                                   everybody sums everything
//   two-shot   reduce(tile i)   own chunks, pushes the sums     collect(the last)     the others', a tile late: by then
//                                                               they have come while other tiles streamed, if there
//                                                               are others
#pragma once

#include <algorithm>

#include "fused/epilogue_sm90.cuh"

namespace sglang_symm::device {

template <class T>
struct Reducer {
  // Chunks that are under way together: as many loads as registers allow (T::kRegisters).
  static constexpr int kBatch = T::kWorld == 2 ? std::min(T::kGroupChunks, 4) : 1;
  static_assert(T::kGroupChunks % kBatch == 0);

  const DecodeCuda& a;
  const Session& s;
  int group, warp, lane;
  bool fine;  // false: nothing is waited for any more, y is NaN

  __device__ __forceinline__ bool two_shot() const { return T::kHasTwoShot && a.two_shot; }

  __device__ __forceinline__ void reduce(int tile) {
    float bias[T::kHalves][2];
    load_bias(tile, bias);
    if (two_shot()) {
#pragma unroll 1
      for (int c = first_chunk(); c < end_chunk(); c++) {
        if (owner_of<T>(tile, c, warp) == s.call.rank) reduce_batch<1>(tile, c, bias);
      }
    } else {
#pragma unroll 1
      for (int c = first_chunk(); c < end_chunk(); c += kBatch) reduce_batch<kBatch>(tile, c, bias);
    }
  }

  // The chunks of a tile that others have summed.
  __device__ __forceinline__ void collect(int tile) {
    uint4 v[T::kGroupChunks];
    if (fine) fine = receive_results(tile, v);
#pragma unroll
    for (int b = 0; b < T::kGroupChunks; b++) {
      const int c = first_chunk() + b;
      if (c >= end_chunk() || owner_of<T>(tile, c, warp) == s.call.rank) continue;
      uint4 out = all_bits_set();
      if (fine && has_tokens<T>(a.m, lane, c)) {
        store_slot(result(tile, c), all_bits_set());
        out = v[b];
      }
      store_rows<T>(a, tile, warp, lane, c, out);
    }
  }

 private:
  __device__ __forceinline__ int first_chunk() const {
    return group * T::kGroupChunks;
  }
  // Behind the last chunk with tokens: the others are never sent.
  __device__ __forceinline__ int end_chunk() const {
    return min(first_chunk() + T::kGroupChunks, (a.m + T::kChunkTokens - 1) / T::kChunkTokens);
  }
  __device__ __forceinline__ std::byte* slot(int tile, int source, int c, int place) const {
    return slot_of<T>(a, s, s.call.rank, source, tile) + c * T::kChunkBytes + place * 16;
  }
  __device__ __forceinline__ std::byte* result(int tile, int c) const {
    return slot(tile, T::kWorld, c, place_of(a.m, warp, lane));
  }

  template <int Batch>
  __device__ __forceinline__ void reduce_batch(int tile, int c, const float (&bias)[T::kHalves][2]) {
    uint4 v[Batch][T::kWorld];
    if (fine) fine = receive<Batch>(tile, c, v);
#pragma unroll
    for (int b = 0; b < Batch; b++) {
      uint4 out = all_bits_set();
      if (fine && has_tokens<T>(a.m, lane, c + b)) {
        re_arm(tile, c + b);
        out = sum(v[b], bias);
        if (two_shot()) push_result(tile, c + b, out);
      }
      store_rows<T>(a, tile, warp, lane, c + b, out);
    }
  }

  // The ranks whose words of this batch have not come, the same for all lanes.
  template <int Batch>
  __device__ __forceinline__ uint32_t look(int tile, int c, uint4 (&v)[Batch][T::kWorld]) const {
    const int place = place_of(a.m, warp, lane);
    uint32_t missing = 0;
#pragma unroll
    for (int b = 0; b < Batch; b++) {
#pragma unroll
      for (int r = 0; r < T::kWorld; r++) {
        const bool comes = has_tokens<T>(a.m, lane, c + b);
        v[b][r] = comes ? load_slot(slot(tile, r, c + b, place)) : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int b = 0; b < Batch; b++) {
#pragma unroll
      for (int r = 0; r < T::kWorld; r++) missing |= is_data(v[b][r]) ? 0 : 1u << r;
    }
    return __reduce_or_sync(kAllLanes, missing);
  }

  // The same of one word a source, read by a lane each: a long wait takes no bandwidth from the stream.
  template <int Batch>
  __device__ __forceinline__ uint32_t watch(int tile, int c) const {
    const int source = lane < T::kWorld ? lane : 0;
    const int last = min(c + Batch, end_chunk()) - 1;
    const auto* word = reinterpret_cast<const uint32_t*>(slot(tile, source, last, place_of(a.m, warp, 0)));
    const bool missing = load_sys(word) == kSentinel;
    return __ballot_sync(kAllLanes, missing && lane < T::kWorld);
  }

  template <int Batch>
  __device__ __forceinline__ bool receive(int tile, int c, uint4 (&v)[Batch][T::kWorld]) const {
    uint32_t missing = look<Batch>(tile, c, v);
    if (missing == 0) return true;
    const auto ready = [&] {
      missing = watch<Batch>(tile, c);
      if (missing == 0) missing = look<Batch>(tile, c, v);
      return missing == 0;
    };
    return wait_together(s, ready, missing);
  }

  __device__ __forceinline__ uint32_t look_at_results(int tile, uint4 (&v)[T::kGroupChunks]) const {
    uint32_t missing = 0;
#pragma unroll
    for (int b = 0; b < T::kGroupChunks; b++) {
      const int c = first_chunk() + b;
      const bool comes = owner_of<T>(tile, c, warp) != s.call.rank && has_tokens<T>(a.m, lane, c);
      v[b] = comes ? load_slot(result(tile, c)) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int b = 0; b < T::kGroupChunks; b++) {
      missing |= is_data(v[b]) ? 0 : 1u << owner_of<T>(tile, first_chunk() + b, warp);
    }
    return __reduce_or_sync(kAllLanes, missing);
  }

  // A lane a chunk.
  __device__ __forceinline__ uint32_t watch_results(int tile) const {
    const int c = first_chunk() + lane, owner = owner_of<T>(tile, c, warp);
    uint32_t missing = 0;
    if (c < end_chunk() && owner != s.call.rank) {
      const auto* word = reinterpret_cast<const uint32_t*>(slot(tile, T::kWorld, c, place_of(a.m, warp, 0)));
      missing = load_sys(word) == kSentinel ? 1u << owner : 0;
    }
    return __reduce_or_sync(kAllLanes, missing);
  }

  __device__ __forceinline__ bool receive_results(int tile, uint4 (&v)[T::kGroupChunks]) const {
    uint32_t missing = look_at_results(tile, v);
    if (missing == 0) return true;
    const auto ready = [&] {
      missing = watch_results(tile);
      if (missing == 0) missing = look_at_results(tile, v);
      return missing == 0;
    };
    return wait_together(s, ready, missing);
  }

  __device__ __forceinline__ void re_arm(int tile, int c) const {
    const int place = place_of(a.m, warp, lane);
#pragma unroll
    for (int r = 0; r < T::kWorld; r++) store_slot(slot(tile, r, c, place), all_bits_set());
  }

  __device__ __forceinline__ void push_result(int tile, int c, uint4 out) const {
    const int at = c * T::kChunkBytes + place_of(a.m, warp, lane) * 16;
#pragma unroll
    for (int step = 1; step < T::kWorld; step++) store_slot(results_of<T>(a, s, s.peer(step), tile) + at, out);
  }

  __device__ __forceinline__ void load_bias(int tile, float (&bias)[T::kHalves][2]) const {
    using Storage = typename T::Type::Storage;
#pragma unroll
    for (int half = 0; half < T::kHalves; half++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int n = tile * T::kTileN + 64 * half + 16 * warp + 8 * r + (lane >> 2);
        const bool some = a.bias != nullptr && n < a.n;
        bias[half][r] = some ? T::Type::load(static_cast<const Storage*>(a.bias)[n]) : 0.0f;
      }
    }
  }

  __device__ __forceinline__ uint4 sum(const uint4 (&v)[T::kWorld], const float (&bias)[T::kHalves][2]) const {
    using Type = typename T::Type;
    uint32_t out[4];
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const auto word = [&](int r) { return q == 0 ? v[r].x : q == 1 ? v[r].y : q == 2 ? v[r].z : v[r].w; };
      if (T::kWorld == 2 && a.bias == nullptr) {
        out[q] = add_pairs<Type>(word(0), word(1));
        continue;
      }
      float total[2];
#pragma unroll
      for (int r = 0; r < T::kWorld; r++) {
        float f[2];
        Type::unpack(word(r), f);
        total[0] = r == 0 ? f[0] : __fadd_rn(total[0], f[0]);
        total[1] = r == 0 ? f[1] : __fadd_rn(total[1], f[1]);
      }
      if (a.bias != nullptr) {
        const float b = bias[T::kHalves == 2 ? q >> 1 : 0][q & 1];
        total[0] = __fadd_rn(total[0], b);
        total[1] = __fadd_rn(total[1], b);
      }
      out[q] = Type::round(total);
    }
    if (Type::has_nan(larger_or_nan<Type>(larger_or_nan<Type>(out[0], out[1]), larger_or_nan<Type>(out[2], out[3])))) {
#pragma unroll
      for (uint32_t& word : out) word = Type::canonical(word);
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
  }
};

}  // namespace sglang_symm::device
