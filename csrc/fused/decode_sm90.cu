// The instances of the decode kernel, one for each shape of tiles in the table of gemm_config.cpp and each dtype, and
// their launch.
#include "fused/decode_sm90.cuh"

namespace sglang_symm {

namespace {

using Kernel = void (*)(CUtensorMap, CUtensorMap, DecodeCuda);

struct Instance {
  Kernel kernel = nullptr;
  int threads = 0;
};

// A new tile shape touches this list and that table.
template <class Type>
Instance instance_of(const GemmConfig& c) {
  using namespace device;
  Instance found;
  const auto offer = [&](auto tile) {
    using T = decltype(tile);
    if (c.max_world != T::kWorld || c.tile_n != T::kTileN || c.tile_m != T::kTileM || c.boxes != T::kBoxes) return;
    if (c.reducers != T::kReducers || c.stages > kMaxStages || c.stages < T::kLeastStages) return;
    found = {&decode<T>, T::kThreads};
  };
  offer(Tile<Type, 2, 64, 16, 4, 4>{});
  offer(Tile<Type, 2, 64, 32, 4, 4>{});
  offer(Tile<Type, 2, 64, 64, 2, 8>{});
  offer(Tile<Type, 4, 64, 16, 4, 4>{});
  offer(Tile<Type, 4, 64, 64, 2, 8>{});
  offer(Tile<Type, 4, 128, 16, 1, 4>{});
  offer(Tile<Type, 4, 128, 64, 1, 8>{});
  offer(Tile<Type, 8, 64, 16, 4, 4>{});
  offer(Tile<Type, 8, 64, 64, 2, 8>{});
  offer(Tile<Type, 8, 128, 16, 1, 4>{});
  offer(Tile<Type, 8, 128, 64, 1, 8>{});
  return found;
}

}  // namespace

void launch_decode(const GemmConfig& config, DecodeCuda args, const MatrixCuda& x, const MatrixCuda& weight,
                   cudaStream_t stream) {
  const DType dtype = args.call.descriptor.dtype;
  const Instance instance =
      dtype == DType::bfloat16 ? instance_of<device::BFloat16>(config) : instance_of<device::Float16>(config);
  // The library's product is of all of k.
  const bool pairs = config.k_parts > 1;
  if (pairs && (config.ctas % 2 != 0 || config.ctas > 2 * config.tiles || args.partial != nullptr)) {
    fail(ErrorKind::system, "no grid for ", to_string(config));
  }
  if (instance.kernel == nullptr) fail(ErrorKind::system, "no decode kernel for ", to_string(config));
  const int stage_columns = config.boxes * kBoxColumns;
  args.k_steps = static_cast<int>((weight.columns + stage_columns - 1) / stage_columns);
  args.stages = config.stages;
  args.tiles = config.tiles;
  args.parts = config.k_parts;
  args.two_shot = config.two_shot;
  GemmConfig largest = config;
  largest.k_parts = 2;
  allow_shared(instance.kernel, shared_bytes(largest));
  cudaLaunchAttribute attributes[] = {programmatic_launch(), cluster_launch(2)};
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(config.ctas));
  launch.blockDim = dim3(static_cast<unsigned>(instance.threads));
  launch.dynamicSmemBytes = shared_bytes(config);
  launch.stream = stream;
  launch.attrs = attributes;
  launch.numAttrs = pairs ? 2 : 1;
  // Not 256 bytes, which are the next box's too: it comes at once, and is then probably fetched twice. Two H200s, us:
  // K = 14336, 1 and 16 tokens 54.4 and 55.3 (128, 64 or none) for 58.5 and 57.9, K = 4096 17.7 and 17.9 for 18.4 and
  // 18.9.
  constexpr CUtensorMapL2promotion kNone = CU_TENSOR_MAP_L2_PROMOTION_NONE;
  check_cuda(cudaLaunchKernelEx(&launch, instance.kernel, map_of(weight, dtype, config.tile_n, kNone),
                                map_of(x, dtype, args.m, kNone), args),
             "the launch of a fused kernel");
}

}  // namespace sglang_symm
