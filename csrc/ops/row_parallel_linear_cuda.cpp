// The fused row-parallel linear of a group on GPUs: whether there is a kernel for the call, and what it is given.
#include "collective/collectives_cuda.h"
#include "fused/decode_cuda.h"
#include "ops/common.h"
#include "ops/ops.h"

namespace sglang_symm::ops {

namespace {

bool is_aligned(const at::Tensor& t) {
  return (reinterpret_cast<uintptr_t>(t.const_data_ptr()) & 15) == 0;
}

// As the copy engine takes it; a copy where it would not. How a tensor lies is a rank's own affair: it never decides
// whether the call is fused.
at::Tensor as_matrix(const at::Tensor& t) {
  constexpr int64_t kElements = 8;  // of 16 bytes
  const bool taken = t.stride(1) == 1 && (t.size(0) == 1 || (t.stride(0) >= t.size(1) && t.stride(0) % kElements == 0));
  if (taken && is_aligned(t)) return t;
  return at::empty(t.sizes(), t.options()).copy_(t);
}

MatrixCuda matrix_of(const at::Tensor& t) {
  const int64_t stride = t.size(0) == 1 ? t.size(1) : t.stride(0);
  return {t.const_data_ptr(), t.size(0), t.size(1), stride};
}

bool is_hopper(int device) {
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return major == 9 && minor == 0;  // sm_90a runs nowhere else
}

// Too small an arena makes the call slower, not wrong, and on all ranks alike.
void warn_slots_once(Group& group, const Descriptor& descriptor, size_t needed, const CollectivesCuda& collectives) {
  if (group.counters.warned_slots.exchange(true)) return;
  const size_t have = collectives.layout().slot_bytes, arena = collectives.arena_bytes();
  const size_t enough = (needed + have - 1) / have * arena;
  TORCH_WARN(to_string(descriptor), " between ", group.world_size(), " ranks is not fused: it needs ", needed,
             " bytes of slots, the arena of group '", group.config().name, "' has ", have, " (", arena,
             " bytes in all). The result is right, but slower. ", enough,
             " bytes are enough: arena_bytes= when the group is made, or SGLANG_SYMM_ARENA_BYTES");
}

}  // namespace

bool fused_linear_into(Group& group, Descriptor descriptor, const at::Tensor& x, const at::Tensor& weight,
                       const at::Tensor& bias, const at::Tensor& out, bool static_weight) {
  const Agreed& agreed = group.config().agreed;
  const bool of_our_own = group.symmetric() && group.config().device != "cpu";
  // A forced algorithm is one of the collectives'; pinned results must not depend on the number of tokens.
  if (!of_our_own || agreed.forced || agreed.pinned) return false;
  if (descriptor.dtype != DType::bfloat16 && descriptor.dtype != DType::float16) return false;
  auto& collectives = dynamic_cast<CollectivesCuda&>(group.collectives());
  if (!is_hopper(collectives.device())) return false;
  const auto config = choose_decode({x.size(0), weight.size(0), x.size(1), group.world_size(), collectives.max_ctas()});
  if (!config) return false;
  const size_t slots = slot_bytes(*config, group.world_size());
  if (slots > collectives.layout().slot_bytes) {
    warn_slots_once(group, descriptor, slots, collectives);
    return false;
  }
  const at::Tensor tokens = as_matrix(x), rows = as_matrix(weight);
  const at::Tensor y = is_aligned(out) ? out : at::empty(out.sizes(), out.options());

  descriptor.flags |= Descriptor::kFused;
  if (bias.defined()) descriptor.flags |= Descriptor::kHasBias;
  descriptor.algorithm = config->two_shot ? Algorithm::two_shot : Algorithm::one_shot;
  const std::lock_guard lock(group.order);
  const auto stream = static_cast<cudaStream_t>(current_stream(group));
  const DeviceScope scope(collectives.device());
  DecodeCuda args{};
  args.call = collectives.enter(descriptor, stream);
  args.y = y.mutable_data_ptr();
  args.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  args.m = static_cast<int>(x.size(0));
  args.n = static_cast<int>(weight.size(0));
  // A copy was made by the kernel before this one.
  args.static_weight = static_weight && rows.is_same(weight);
  args.slots = collectives.layout().slots;
  args.slot_bytes = collectives.layout().slot_bytes;
  launch_decode(*config, args, matrix_of(tokens), matrix_of(rows), stream);
  if (!y.is_same(out)) out.copy_(y);
  count_call(group, descriptor.algorithm);
  group.counters.fused.fetch_add(1, std::memory_order_relaxed);
  return true;
}

}  // namespace sglang_symm::ops
