// What the launches of the fused kernels share: matrices as the copy engine is told of them, programmatic launch.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/driver_cuda.h"
#include "base/dtype.h"
#include "fused/gemm_config.h"

namespace sglang_symm {

// Address and stride are multiples of 16 bytes.
struct MatrixCuda {
  const void* data;
  int64_t rows, columns;
  int64_t row_stride;  // elements
};

// Boxes of box_rows x 64 columns, swizzled as wgmma reads them. Made for every call: an address that is freed and used
// again can never meet an old map. A box's row is 128 bytes; `promotion`: how much of memory L2 takes in for it.
inline CUtensorMap map_of(const MatrixCuda& m, DType dtype, int box_rows, CUtensorMapL2promotion promotion) {
  CUtensorMap map;
  const CUtensorMapDataType type =
      dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(m.columns), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(m.row_stride) * 2};
  const cuuint32_t box[2] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  check_driver(driver().tensor_map_encode_tiled(&map, type, 2, const_cast<void*>(m.data), sizes, strides, box, steps,
                                                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, promotion,
                                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
               "cuTensorMapEncodeTiled");
  return map;
}

// The kernel is brought in while the one before it ends. SGLANG_SYMM_PROGRAMMATIC_LAUNCH=0 does without, for
// measurements of what that gives; looked at in every launch.
inline cudaLaunchAttribute programmatic_launch() {
  const char* wish = std::getenv("SGLANG_SYMM_PROGRAMMATIC_LAUNCH");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = wish == nullptr || std::string_view(wish) != "0" ? 1 : 0;
  return attribute;
}

inline cudaLaunchAttribute cluster_launch(unsigned ctas) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {ctas, 1, 1};
  return attribute;
}

// A limit of the kernel, not of a call: where calls take different amounts each sets the largest, because another
// thread may be between its own limit and its launch.
template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             "cudaFuncSetAttribute of a fused kernel's shared memory");
}

}  // namespace sglang_symm
