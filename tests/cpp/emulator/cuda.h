// The driver's tensor maps, for the emulator.
#pragma once

#include <cstdint>

using CUresult = int;
constexpr CUresult CUDA_SUCCESS = 0;
using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

// A matrix of 16-bit elements and the box of it that a copy takes.
struct alignas(64) CUtensorMap {
  const void* data;
  uint64_t columns, rows, row_bytes;
  uint32_t box_columns, box_rows;
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t dimensions, void* data,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  // What the driver demands of an address and a stride.
  if (dimensions != 2 || reinterpret_cast<uintptr_t>(data) % 16 != 0 || strides[0] % 16 != 0) return 1;
  if (box[0] * 2 != 128 || box[0] > 256 || box[1] > 256) return 1;
  *map = {data, sizes[0], sizes[1], strides[0], box[0], box[1]};
  return CUDA_SUCCESS;
}
