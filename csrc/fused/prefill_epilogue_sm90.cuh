// The prefill kernel, from accumulators to sums: rounded partials, and their sum in rank order.
#pragma once

#include "fused/prefill_tile_sm90.cuh"

namespace sglang_symm::device {

// Four lanes have a row's words of columns 8 j + 2 (lane % 4), j = 0..3; afterwards lane l has columns 8 (l % 4) ..
// + 7.
__device__ __forceinline__ uint4 row_of_quad(uint4 v, int lane) {
  const bool odd = (lane & 1) != 0, high = (lane & 2) != 0;
  const uint32_t a = __shfl_xor_sync(kAllLanes, odd ? v.x : v.y, 1);
  const uint32_t b = __shfl_xor_sync(kAllLanes, odd ? v.z : v.w, 1);
  const uint4 w = odd ? make_uint4(a, v.y, b, v.w) : make_uint4(v.x, a, v.z, b);
  const uint32_t c = __shfl_xor_sync(kAllLanes, high ? w.x : w.z, 2);
  const uint32_t e = __shfl_xor_sync(kAllLanes, high ? w.y : w.w, 2);
  return high ? make_uint4(c, e, w.z, w.w) : make_uint4(w.x, w.y, c, e);
}

// A math warp's end of a tile.
template <class T>
struct PrefillEpilogue {
  static constexpr int kBatch = 4;  // chunks under way together
  using Accumulators = float[T::kTileN / 2];

  const PrefillCuda& a;
  const Session& s;
  int warp, lane;  // warp: of 8, 16 tokens each

  // The rounded partial, of the accumulators or of a product that the library has made. The library may round to any
  // NaN, also to one that makes the sentinel. Accumulators that two branches write would make ptxas wait after each
  // MMA.
  using Rounded = uint4[T::kChunks];
  __device__ __forceinline__ void round(const PrefillPlace& at, const Accumulators& d, Rounded& own) const {
    if (a.partial == nullptr) {
#pragma unroll
      for (int c = 0; c < T::kChunks; c++) {
        const int j = 4 * (c >> 1), h = 2 * (c & 1);
        own[c] = make_uint4(T::Type::round(&d[4 * j + h]), T::Type::round(&d[4 * j + 4 + h]),
                            T::Type::round(&d[4 * j + 8 + h]), T::Type::round(&d[4 * j + 12 + h]));
      }
    } else {
#pragma unroll
      for (int c = 0; c < T::kChunks; c++) own[c] = sendable<typename T::Type>(product(at, c));
    }
  }
  __device__ __forceinline__ int token(const PrefillPlace& at, int c) const {
    return at.token + 16 * warp + 8 * (c & 1) + (lane >> 2);
  }
  // Where this warp's chunks of a tile lie in a tile of a slot, of the staging memory, of a peer's partials.
  __device__ __forceinline__ size_t within(int c) const {
    return static_cast<size_t>(warp * T::kWarpBytes + c * T::kChunkBytes + lane * 16);
  }

  // own(c): chunk c of this rank's rounded partial, other: the peer's; store(c, v): the sums as the MMA leaves them,
  // whose NaN is any. Of two ranks a + b is b + a. Without a bias an instruction a word is all.
  template <class Own, class Store>
  __device__ __forceinline__ void sum_of_two(const PrefillPlace& at, const Own& own, const Rounded& other,
                                             const Store& store) const {
    const auto of_all = [&](const auto& add) {
#pragma unroll
      for (int c = 0; c < T::kChunks; c++) store(c, add(c, own(c), other[c]));
    };
    using Type = typename T::Type;
    if (a.bias == nullptr) {
      of_all([&](int, uint4 x, uint4 y) {
        return make_uint4(add_pairs<Type>(x.x, y.x), add_pairs<Type>(x.y, y.y), add_pairs<Type>(x.z, y.z),
                          add_pairs<Type>(x.w, y.w));
      });
    } else {
      of_all([&](int c, uint4 x, uint4 y) {
        float total[8], other[8];
        unpack(x, total);
        unpack(y, other);
#pragma unroll
        for (int i = 0; i < 8; i++) total[i] = __fadd_rn(total[i], other[i]);
        return rounded(at, c, total);
      });
    }
  }
  // Partials of kRanks ranks are under way together: a look at what a peer has written takes more than 1 us.
  template <class Load, class Store>
  __device__ __forceinline__ void sum_of_many(const PrefillPlace& at, const Rounded& own, const Load& load,
                                              const Store& store) const {
    constexpr int kRanks = 4;
#pragma unroll
    for (int first = 0; first < T::kChunks; first += kBatch) {
      float total[kBatch][8];
#pragma unroll 1
      for (int begin = 0; begin < s.call.world_size; begin += kRanks) {
        uint4 v[kRanks][kBatch] = {};
#pragma unroll
        for (int i = 0; i < kRanks; i++) {
          if (begin + i < s.call.world_size && begin + i != s.call.rank) load(begin + i, first, v[i]);
        }
#pragma unroll
        for (int i = 0; i < kRanks; i++) {
          if (begin + i >= s.call.world_size) break;
          const bool mine = begin + i == s.call.rank;
#pragma unroll
          for (int b = 0; b < kBatch; b++) {
            float f[8];
            unpack(mine ? own[first + b] : v[i][b], f);
#pragma unroll
            for (int j = 0; j < 8; j++) total[b][j] = begin + i == 0 ? f[j] : __fadd_rn(total[b][j], f[j]);
          }
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; b++) store(first + b, rows(rounded(at, first + b, total[b])));
    }
  }
  // Sums as the lane's 16 bytes of a row, with the one NaN that sums have.
  __device__ __forceinline__ uint4 rows(uint4 v) const {
    using Type = typename T::Type;
    if (Type::has_nan(v.x) || Type::has_nan(v.y) || Type::has_nan(v.z) || Type::has_nan(v.w)) v = canonical(v);
    return row_of_quad(v, lane);
  }
  static __device__ __forceinline__ uint4 canonical(uint4 v) {
    using Type = typename T::Type;
    return make_uint4(Type::canonical(v.x), Type::canonical(v.y), Type::canonical(v.z), Type::canonical(v.w));
  }

 private:
  static __device__ __forceinline__ void unpack(uint4 v, float (&f)[8]) {
    T::Type::unpack(v.x, &f[0]);
    T::Type::unpack(v.y, &f[2]);
    T::Type::unpack(v.z, &f[4]);
    T::Type::unpack(v.w, &f[6]);
  }
  // The sums of chunk c, with the bias.
  __device__ __forceinline__ uint4 rounded(const PrefillPlace& at, int c, float (&total)[8]) const {
    using Type = typename T::Type;
    if (a.bias != nullptr) add_bias(at.column + 32 * (c >> 1), total);
    return make_uint4(Type::round(&total[0]), Type::round(&total[2]), Type::round(&total[4]), Type::round(&total[6]));
  }
  __device__ __forceinline__ uint4 product(const PrefillPlace& at, int c) const {
    uint32_t word[4] = {};
    const int row = token(at, c);
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const int column = at.column + 32 * (c >> 1) + 8 * q + 2 * (lane & 3);
      if (row >= a.m || column >= a.n) continue;
      const auto* words = static_cast<const uint16_t*>(a.partial) + static_cast<size_t>(row) * a.n + column;
      word[q] = *reinterpret_cast<const uint32_t*>(words);
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
  }
  __device__ __forceinline__ void add_bias(int column, float (&total)[8]) const {
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const int n = column + 8 * q + 2 * (lane & 3);
      if (n >= a.n) continue;
      float f[2];
      T::Type::unpack(*reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(a.bias) + n), f);
      total[2 * q] = __fadd_rn(total[2 * q], f[0]);
      total[2 * q + 1] = __fadd_rn(total[2 * q + 1], f[1]);
    }
  }
};

}  // namespace sglang_symm::device
