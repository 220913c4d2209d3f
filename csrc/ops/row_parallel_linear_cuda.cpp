// The fused row-parallel linear of a group on GPUs: whether there is a kernel for the call, and what it is given.
#include "collective/collectives_cuda.h"
#include "fused/decode_cuda.h"
#include "fused/prefill_cuda.h"
#include "ops/common.h"
#include "ops/ops.h"

namespace sglang_symm::ops {

namespace {

bool is_aligned(const at::Tensor& t) {
  return (reinterpret_cast<uintptr_t>(t.const_data_ptr()) & 15) == 0;
}

// Whether the copy engine takes it as a matrix. How a tensor lies is a rank's own affair, and so is its part of k: they
// never decide whether the call is fused, for that ranks must agree on.
bool is_taken(const at::Tensor& t) {
  constexpr int64_t kElements = 8;  // of 16 bytes
  if (t.size(1) == 0 || t.size(1) % kElements != 0 || t.stride(1) != 1 || !is_aligned(t)) return false;
  return t.size(0) == 1 || (t.stride(0) >= t.size(1) && t.stride(0) % kElements == 0);
}

MatrixCuda matrix_of(const at::Tensor& t) {
  const int64_t stride = t.size(0) == 1 ? t.size(1) : t.stride(0);
  return {t.const_data_ptr(), t.size(0), t.size(1), stride};
}

// Too small an arena makes the call slower, not wrong, and on all ranks alike. Told again when a call needs more.
void warn_small(Group& group, const Descriptor& descriptor, const char* what, size_t needed, size_t have, size_t most) {
  const size_t arena = dynamic_cast<CollectivesCuda&>(group.collectives()).arena_bytes();
  const size_t enough = (needed + have - 1) / have * arena;
  if (needed > most) {
    if (group.counters.warned_none.exchange(true)) return;
  } else {
    size_t told = group.counters.warned_arena.load();
    while (told < enough && !group.counters.warned_arena.compare_exchange_weak(told, enough)) {
    }
    if (told >= enough) return;
  }
  const std::string advice =
      needed > most ? cat("No arena has more than ", most, " of them")
                    : cat(enough, " bytes are enough: arena_bytes= when the group is made, or SGLANG_SYMM_ARENA_BYTES");
  TORCH_WARN(to_string(descriptor), " between ", group.world_size(), " ranks is not fused: it needs ", needed,
             " bytes of ", what, ", the arena of group '", group.config().name, "' has ", have, " (", arena,
             " bytes in all). The result is right, but slower. ", advice);
}

// What a kernel multiplies; or, where the copy engine takes no weight, the product of the library's GEMM.
struct Operands {
  at::Tensor tokens, weight, partial;

  Operands(const at::Tensor& x, const at::Tensor& w) : tokens(x), weight(w) {
    if (!is_taken(w)) {
      partial = at::mm(x, w.t());
      tokens = weight = partial;
    } else if (!is_taken(x)) {
      tokens = at::empty(x.sizes(), x.options()).copy_(x);
    }
  }
  const void* partial_data() const { return partial.defined() ? partial.const_data_ptr() : nullptr; }
};

// The prefill kernel reads a bias in words of two elements; a view may begin in the middle of one.
at::Tensor whole_words(const at::Tensor& bias) {
  return bias.defined() && !is_aligned(bias) ? bias.clone() : bias;
}

struct Call {
  Group& group;
  CollectivesCuda& collectives;
  Descriptor descriptor;
  const at::Tensor &x, &weight, &bias, &out;
  bool static_weight;
};

bool decode(const Call& c) {
  const int world = c.group.world_size();
  const GemmShape shape{c.x.size(0), c.weight.size(0), world, c.collectives.max_ctas()};
  const auto config = choose_decode(shape);
  if (!config) return false;
  const bool has_norm = c.descriptor.op == OpCode::row_parallel_linear_add_rms_norm;
  if (has_norm && !c.bias.defined() && is_faster_apart_with_norm(*config, shape)) return false;
  const LayoutCuda& layout = c.collectives.layout();
  const size_t slots = slot_bytes(*config, world);
  if (slots > layout.slot_bytes) {
    warn_small(c.group, c.descriptor, "slots", slots, layout.slot_bytes, kMaxSlots);
    return false;
  }
  const Operands operands(c.x, c.weight);
  const at::Tensor y = is_aligned(c.out) ? c.out : at::empty(c.out.sizes(), c.out.options());
  Descriptor descriptor = c.descriptor;
  descriptor.algorithm = config->two_shot ? Algorithm::two_shot : Algorithm::one_shot;
  const std::lock_guard lock(c.group.order);
  const auto stream = static_cast<cudaStream_t>(current_stream(c.group));
  const DeviceScope scope(c.collectives.device());
  DecodeCuda args{};
  args.call = c.collectives.enter(descriptor, stream);
  args.y = y.mutable_data_ptr();
  args.bias = c.bias.defined() ? c.bias.const_data_ptr() : nullptr;
  args.m = static_cast<int>(c.x.size(0));
  args.n = static_cast<int>(c.weight.size(0));
  args.partial = operands.partial_data();
  args.static_weight = c.static_weight && args.partial == nullptr;
  args.slots = layout.slots;
  args.slot_bytes = layout.slot_bytes;
  const GemmConfig mine =
      args.partial == nullptr ? with_columns(*config, c.x.size(1), c.collectives.max_ctas()) : *config;
  launch_decode(mine, args, matrix_of(operands.tokens), matrix_of(operands.weight), stream);
  if (!y.is_same(c.out)) c.out.copy_(y);
  count_call(c.group, descriptor.algorithm);
  return true;
}

// In rounds of as many tokens as slots and staging memory hold, each a call of the protocol.
bool prefill(const Call& c) {
  const int world = c.group.world_size();
  const LayoutCuda& layout = c.collectives.layout();
  const int64_t m = c.x.size(0), n = c.weight.size(0);
  const auto config = choose_prefill({m, n, world, c.collectives.max_ctas()});
  if (!config) return false;
  const int64_t most = tokens_a_round(*config, m, n, world, layout.slot_bytes, layout.staging_bytes);
  if (most == 0) {
    const int64_t least = least_round(m);
    const size_t slots = slot_bytes(with_tokens(*config, least, n, world), world);
    const size_t staging = staging_bytes(*config, least, n, world);
    if (slots > layout.slot_bytes) {
      warn_small(c.group, c.descriptor, "slots", slots, layout.slot_bytes, kMaxSlots);
    } else {
      warn_small(c.group, c.descriptor, "staging memory", staging, layout.staging_bytes, kMaxStaging);
    }
    return false;
  }
  const Operands operands(c.x, c.weight);
  const at::Tensor bias = whole_words(c.bias);
  // Owners send y to every rank's arena; elsewhere it is copied from there. Between two ranks it is stored here alone.
  const bool has_owners = config->share > 0;
  const size_t bytes = c.out.nbytes();
  const auto place =
      has_owners && is_aligned(c.out) ? c.group.arena()->offset_of(c.out.const_data_ptr(), bytes) : std::nullopt;
  const at::Tensor y = has_owners || is_aligned(c.out) ? c.out : at::empty(c.out.sizes(), c.out.options());
  Descriptor descriptor = c.descriptor;
  descriptor.algorithm = has_owners ? Algorithm::two_shot : Algorithm::one_shot;
  const std::lock_guard lock(c.group.order);
  const auto stream = static_cast<cudaStream_t>(current_stream(c.group));
  const DeviceScope scope(c.collectives.device());
  for (int64_t begin = 0; begin < m; begin += most) {
    const int64_t count = std::min(most, m - begin);
    const size_t start = static_cast<size_t>(begin * n) * 2, size = static_cast<size_t>(count * n) * 2;
    PrefillCuda args{};
    args.call = c.collectives.enter(descriptor, stream);
    std::byte* to = static_cast<std::byte*>(y.mutable_data_ptr()) + start;
    args.y = to;
    if (has_owners) {
      args.call.offset_out = place ? *place + start : layout.staging_out;
      args.y = args.call.window[args.call.rank] + args.call.offset_out;
    }
    args.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
    args.m = static_cast<int>(count);
    args.n = static_cast<int>(n);
    args.partial = operands.partial.defined() ? operands.partial[begin].const_data_ptr() : nullptr;
    args.static_weight = c.static_weight && args.partial == nullptr;
    args.slots = layout.slots;
    args.slot_bytes = layout.slot_bytes;
    args.partials = layout.staging_in;
    const at::Tensor part = operands.tokens.narrow(0, begin, count);
    launch_prefill(with_tokens(*config, count, n, world), args, matrix_of(part), matrix_of(operands.weight), stream);
    if (args.y != to) {
      check_cuda(cudaMemcpyAsync(to, args.y, size, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync of y");
    }
  }
  if (!y.is_same(c.out)) c.out.copy_(y);
  count_call(c.group, descriptor.algorithm);
  return true;
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
  descriptor.flags |= Descriptor::kFused;
  if (bias.defined()) descriptor.flags |= Descriptor::kHasBias;
  const Call call{group, collectives, descriptor, x, weight, bias, out, static_weight};
  if (!decode(call) && !prefill(call)) return false;
  group.counters.fused.fetch_add(1, std::memory_order_relaxed);
  return true;
}

#ifdef SGLANG_SYMM_TRACE
std::tuple<at::Tensor, std::vector<std::string>> prefill_trace() {
  PrefillTrace taken = take_prefill_trace();
  const std::vector<int64_t> sizes = {taken.ctas, taken.visits, static_cast<int64_t>(taken.stamps.size())};
  return {at::tensor(taken.times).view(sizes), taken.stamps};
}
#endif

}  // namespace sglang_symm::ops
