// The instances of the prefill kernel, one for each tile width and dtype, and their launch.
#include "fused/prefill_sm90.cuh"

#include <algorithm>
#include <iterator>

namespace sglang_symm {

namespace {

using Kernel = void (*)(CUtensorMap, CUtensorMap, PrefillCuda);

template <class Type>
Kernel find_kernel(const PrefillConfig& c) {
  using device::PrefillTile;
  const bool two_ranks = c.share == 0;
  if (two_ranks && c.tile_n == 128) return &device::prefill<PrefillTile<Type, 128, true>>;
  if (two_ranks && c.tile_n == 256) return &device::prefill<PrefillTile<Type, 256, true>>;
  if (!two_ranks && c.tile_n == 128) return &device::prefill<PrefillTile<Type, 128, false>>;
  return nullptr;
}

// The halves' stages are filled while the last of the whole tile's are read when those begin with the first one.
int late_steps(const PrefillConfig& config, int k_steps) {
  if (config.late_steps == 0) return 0;
  const int clusters = config.ctas / kPrefillCluster, tiles = config.tiles_m * config.tiles_n;
  const int64_t steps = int64_t{(tiles + clusters - 1) / clusters} * k_steps;
  int late = std::min(k_steps, config.late_steps);
  while (late < k_steps && (steps - late) % config.stages != 0) late++;
  return late;
}

}  // namespace

void launch_prefill(const PrefillConfig& config, PrefillCuda args, const MatrixCuda& x, const MatrixCuda& weight,
                    cudaStream_t stream) {
  const DType dtype = args.call.descriptor.dtype;
  const Kernel kernel =
      dtype == DType::bfloat16 ? find_kernel<device::BFloat16>(config) : find_kernel<device::Float16>(config);
  const bool has_sum = (config.share == 0) == (args.call.world_size == 2);
  if (kernel == nullptr || !has_sum || config.stages > device::kMaxPrefillStages) {
    fail(ErrorKind::system, "no prefill kernel between ", args.call.world_size, " ranks for ", to_string(config));
  }
  args.k_steps = args.partial == nullptr ? static_cast<int>((weight.columns + kBoxColumns - 1) / kBoxColumns) : 0;
  args.late_steps = late_steps(config, args.k_steps);
  args.stages = config.stages;
  args.tiles_m = config.tiles_m;
  args.tiles_n = config.tiles_n;
  args.share = config.share;
  const size_t shared = shared_bytes(config);
  allow_shared(kernel, shared);
  cudaLaunchAttribute attributes[] = {programmatic_launch(), cluster_launch(kPrefillCluster)};
  // Owners: the clusters that idle in the last wave would be taken by the next kernel's, and its own then start in
  // whatever order SMs become free. Between two ranks it gains 1 to 2 us.
  if (config.share > 0) attributes[0].val.programmaticStreamSerializationAllowed = 0;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(config.ctas));
  launch.blockDim = dim3(device::kPrefillThreads);
  launch.dynamicSmemBytes = shared;
  launch.stream = stream;
  launch.attrs = attributes;
  launch.numAttrs = 2;
  // As fast with 128 bytes and with none, unlike decode: clusters share boxes, and each is read by many.
  constexpr CUtensorMapL2promotion kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  check_cuda(cudaLaunchKernelEx(&launch, kernel, map_of(weight, dtype, config.tile_n / kPrefillCluster, kPromotion),
                                map_of(x, dtype, kPrefillTokens / kPrefillCluster, kPromotion), args),
             "the launch of a fused kernel");
}

#ifdef SGLANG_SYMM_TRACE
PrefillTrace take_prefill_trace() {
  PrefillTrace taken{kMaxCtas, device::kTracedVisits, {std::begin(device::kStamps), std::end(device::kStamps)}, {}};
  taken.times.resize(sizeof device::trace / sizeof(int64_t));
  check_cuda(cudaMemcpyFromSymbol(taken.times.data(), device::trace, sizeof device::trace), "cudaMemcpyFromSymbol");
  const std::vector<int64_t> none(taken.times.size());
  check_cuda(cudaMemcpyToSymbol(device::trace, none.data(), sizeof device::trace), "cudaMemcpyToSymbol");
  return taken;
}
#endif

}  // namespace sglang_symm
