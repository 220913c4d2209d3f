// Residual and RMSNorm on GPUs: in the kernel that sums, or in a small one behind it.
#include "collective/collectives_cuda.h"
#include "collective/norm_cuda.h"
#include "ops/common.h"

namespace sglang_symm::ops {

namespace {

struct Rows {
  int64_t rows, columns;
};

Rows rows_of(const at::Tensor& x) {
  const int64_t columns = x.size(-1);
  return {columns == 0 ? 0 : x.numel() / columns, columns};
}

// What the kernels count in 32 bits.
bool is_native(const at::Tensor& x) {
  const auto [rows, columns] = rows_of(x);
  return natively_reduced(to_dtype(x.scalar_type()), ReduceOp::sum) && rows < INT32_MAX && columns < INT32_MAX;
}

NormCuda norm_of(const at::Tensor& in, const AddRmsNorm& norm, const at::Tensor& y, const at::Tensor& hidden) {
  const auto [rows, columns] = rows_of(in);
  NormCuda a{};
  a.dtype = to_dtype(in.scalar_type());
  a.in = in.const_data_ptr();
  a.residual = norm.residual.const_data_ptr();
  a.weight = norm.weight.const_data_ptr();
  a.y = y.mutable_data_ptr();
  a.hidden = hidden.mutable_data_ptr();
  a.rows = static_cast<uint32_t>(rows);
  a.columns = static_cast<uint32_t>(columns);
  a.eps = static_cast<float>(norm.eps);
  return a;
}

}  // namespace

bool all_reduce_norm_into(Group& group, Descriptor descriptor, const at::Tensor& x, const AddRmsNorm& norm,
                          const at::Tensor& y, const at::Tensor& hidden) {
  if (!group.symmetric() || group.config().device == "cpu" || !is_native(x)) return false;
  auto& collectives = dynamic_cast<CollectivesCuda&>(group.collectives());
  const auto [rows, columns] = rows_of(x);
  const size_t world = static_cast<size_t>(group.world_size());
  const size_t part = collectives.layout().slot_bytes / world / 128 * 128;
  const bool fits =
      world == 1 || norm_slot_bytes(static_cast<size_t>(rows), static_cast<size_t>(columns), descriptor.dtype) <= part;
  const std::lock_guard lock(group.order);
  if (choose_for(group, &descriptor, x.nbytes()) != Algorithm::one_shot || !fits) return false;
  descriptor.flags |= Descriptor::kNormed;
  const auto stream = static_cast<cudaStream_t>(current_stream(group));
  const DeviceScope scope(collectives.device());
  NormCuda a = norm_of(x, norm, y, hidden);
  a.call = collectives.enter(descriptor, stream);
  a.slots = collectives.layout().slots;
  a.slot_bytes = collectives.layout().slot_bytes;
  launch_all_reduce_norm(a, collectives.max_ctas(), stream);
  count_call(group, descriptor.algorithm);
  group.counters.normed.fetch_add(1, std::memory_order_relaxed);
  return true;
}

bool norm_into(Group& group, const at::Tensor& sum, const AddRmsNorm& norm, const at::Tensor& y,
               const at::Tensor& hidden) {
  if (group.config().device == "cpu" || !is_native(sum)) return false;
  const DeviceScope scope(sum.device().index());
  launch_norm(norm_of(sum, norm, y, hidden), static_cast<cudaStream_t>(current_stream(group)));
  return true;
}

}  // namespace sglang_symm::ops
