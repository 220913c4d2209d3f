// The instances of the prefill kernel, one for each tile width, cluster and dtype, and their launch.
#include "fused/prefill_sm90.cuh"

#include <algorithm>
#include <iterator>

namespace sglang_symm {

namespace {

using Kernel = void (*)(CUtensorMap, CUtensorMap, PrefillCuda);

template <class Type, int Cluster>
Kernel find_kernel(const PrefillConfig& c) {
  using namespace device;
  const int rows = rows_of_cta(c);
  if (c.one_shot) return rows == 128 ? &prefill<PrefillTile<Type, 128, true, Cluster>> : nullptr;
  if (rows == 128) return &prefill<PrefillTile<Type, 128, false, Cluster>>;
  if (rows == 256) return &prefill<PrefillTile<Type, 256, false, Cluster>>;
  return nullptr;
}

template <class Type>
Kernel find_kernel(const PrefillConfig& c) {
  return c.cluster == 2 ? find_kernel<Type, 2>(c) : c.cluster == 4 ? find_kernel<Type, 4>(c) : nullptr;
}

// The kernel, allowed its shared memory, and how it is launched.
struct Launch {
  Launch(const PrefillConfig& config, DType dtype)
      : kernel(dtype == DType::bfloat16 ? find_kernel<device::BFloat16>(config)
                                        : find_kernel<device::Float16>(config)) {
    if (kernel == nullptr || config.stages > device::kMaxPrefillStages) {
      fail(ErrorKind::system, "no prefill kernel for ", to_string(config));
    }
    const size_t shared = shared_bytes(config);
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared)),
               "cudaFuncSetAttribute of a fused kernel's shared memory");
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(config.cluster), 1, 1};
    attributes[1] = programmatic_launch();
    // Two-shot: the clusters that idle in the last wave would be taken by the next kernel's, and its own then start in
    // whatever order SMs become free: 2 us more at 2048 tokens.
    if (!config.one_shot) attributes[1].val.programmaticStreamSerializationAllowed = 0;
    launch.gridDim = dim3(static_cast<unsigned>(config.ctas));
    launch.blockDim = dim3(device::PrefillTile<device::BFloat16, 128, true, 2>::kThreads);
    launch.dynamicSmemBytes = shared;
    launch.attrs = attributes;
    launch.numAttrs = 2;
  }
  Launch(const Launch&) = delete;  // `launch` points to `attributes`

  Kernel kernel;
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t launch{};
};

}  // namespace

void launch_prefill(const PrefillConfig& config, PrefillCuda args, const MatrixCuda& x, const MatrixCuda& weight,
                    cudaStream_t stream) {
  const DType dtype = args.call.descriptor.dtype;
  if (is_for_two_ranks(config.one_shot, rows_of_cta(config)) != (args.call.world_size == 2)) {
    fail(ErrorKind::system, "no prefill kernel between ", args.call.world_size, " ranks for ", to_string(config));
  }
  Launch to(config, dtype);
  to.launch.stream = stream;
  args.k_steps = args.partial == nullptr ? static_cast<int>((weight.columns + kBoxColumns - 1) / kBoxColumns) : 0;
  args.stages = config.stages;
  args.tiles_m = config.tiles_m;
  args.tiles_n = config.tiles_n;
  args.last = config.last;
  args.share = config.share;
  args.pushed = flag_bytes(config, args.call.world_size);
  check_cuda(cudaLaunchKernelEx(&to.launch, to.kernel, map_of(weight, dtype, rows_of_cta(config) / 2),
                                map_of(x, dtype, kPrefillTokens / config.cluster), args),
             "the launch of a fused kernel");
}

int resident_clusters_of_four() {
  int least = kMaxCtas;
  for (const PrefillConfig& config : prefill_of_four()) {
    for (const DType dtype : {DType::bfloat16, DType::float16}) {
      Launch of(config, dtype);
      of.launch.numAttrs = 1;  // the cluster's
      int clusters = 0;
      check_cuda(cudaOccupancyMaxActiveClusters(&clusters, reinterpret_cast<const void*>(of.kernel), &of.launch),
                 "cudaOccupancyMaxActiveClusters of a fused kernel");
      least = std::min(least, clusters);
    }
  }
  return least;
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
