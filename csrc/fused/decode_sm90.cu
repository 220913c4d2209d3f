// The instances of the decode kernel, one for each row of the table in gemm_config.cpp and each dtype, and their
// launch.
#include "fused/decode_sm90.cuh"

namespace sglang_symm {

namespace {

using Kernel = void (*)(CUtensorMap, CUtensorMap, DecodeCuda);

// A new tile shape touches this list and that table.
template <class Type>
Kernel find_kernel(const GemmConfig& c, int* threads) {
  using namespace device;
  Kernel found = nullptr;
  const auto offer = [&](auto tile) {
    using T = decltype(tile);
    if (c.max_world != T::kWorld || c.tile_n != T::kTileN || c.tile_m != T::kTileM || c.boxes != T::kBoxes) return;
    if (c.reducers != T::kReducers || c.stages > kMaxStages || c.stages < T::kLeastStages) return;
    found = &decode<T>;
    *threads = T::kThreads;
  };
  offer(Tile<Type, 2, 64, 16, 4, 4>{});
  offer(Tile<Type, 2, 64, 64, 2, 4>{});
  offer(Tile<Type, 4, 128, 16, 1, 4>{});
  offer(Tile<Type, 4, 128, 64, 1, 8>{});
  offer(Tile<Type, 8, 128, 16, 1, 4>{});
  offer(Tile<Type, 8, 128, 64, 1, 8>{});
  return found;
}

}  // namespace

void launch_decode(const GemmConfig& config, DecodeCuda args, const MatrixCuda& x, const MatrixCuda& weight,
                   cudaStream_t stream) {
  const DType dtype = args.call.descriptor.dtype;
  int threads = 0;
  const Kernel kernel = dtype == DType::bfloat16 ? find_kernel<device::BFloat16>(config, &threads)
                                                 : find_kernel<device::Float16>(config, &threads);
  // The library's product is of all of k.
  const bool pairs = config.k_parts > 1;
  if (pairs && (config.ctas != 2 * config.tiles || args.partial != nullptr)) {
    fail(ErrorKind::system, "no grid for ", to_string(config));
  }
  if (kernel == nullptr) fail(ErrorKind::system, "no decode kernel for ", to_string(config));
  const int stage_columns = config.boxes * kBoxColumns;
  args.k_steps = static_cast<int>((weight.columns + stage_columns - 1) / stage_columns);
  args.stages = config.stages;
  args.tiles = config.tiles;
  args.parts = config.k_parts;
  args.two_shot = config.two_shot;
  GemmConfig largest = config;
  largest.k_parts = 2;
  allow_shared(kernel, shared_bytes(largest));
  cudaLaunchAttribute attributes[] = {programmatic_launch(), cluster_launch(2)};
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(config.ctas));
  launch.blockDim = dim3(static_cast<unsigned>(threads));
  launch.dynamicSmemBytes = shared_bytes(config);
  launch.stream = stream;
  launch.attrs = attributes;
  launch.numAttrs = pairs ? 2 : 1;
  check_cuda(
      cudaLaunchKernelEx(&launch, kernel, map_of(weight, dtype, config.tile_n), map_of(x, dtype, config.tile_m), args),
      "the launch of a fused kernel");
}

}  // namespace sglang_symm
