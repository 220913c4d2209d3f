// The ops under the Autograd key: gradients, or an error where there is none. docs/pytorch.md says which loss they are
// of.
//
// In C++, because a call that needs no gradient comes through here too: a kernel in Python (torch.library.
// register_autograd) adds 12 us to an op of 7 us.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include "ops/common.h"
#include "ops/ops.h"

namespace sglang_symm::ops {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The ops as the dispatcher knows them, so that tracing, fake tensors and functionalization see the calls made here.
template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

const auto& all_reduce_op() {
  static const auto op = find<decltype(all_reduce)>("sglang_symm::all_reduce");
  return op;
}

const auto& all_reduce_in_place_op() {
  static const auto op = find<decltype(all_reduce_)>("sglang_symm::all_reduce_");
  return op;
}

const auto& all_gather_op() {
  static const auto op = find<decltype(all_gather)>("sglang_symm::all_gather");
  return op;
}

const auto& reduce_scatter_op() {
  static const auto op = find<decltype(reduce_scatter)>("sglang_symm::reduce_scatter");
  return op;
}

const auto& row_parallel_linear_op() {
  static const auto op = find<decltype(row_parallel_linear)>("sglang_symm::row_parallel_linear");
  return op;
}

// Its next kernel, for a forward whose gradient is dealt with.
template <class Op, class... Args>
auto below_autograd(const Op& op, const Args&... args) {
  at::AutoDispatchBelowAutograd below;
  return op.call(args...);
}

// Reverse mode, or forward mode (a tangent), which autograd::Function refuses with a sentence of its own.
bool needs_derivative(const at::Tensor& x) {
  return x.defined() && ((x.requires_grad() && at::GradMode::is_enabled()) || x._fw_grad(/*level=*/0).defined());
}

bool needs_derivative(const std::optional<at::Tensor>& x) {
  return x.has_value() && needs_derivative(*x);
}

constexpr const char* kReturnsANewTensor = "Use an op that returns a new tensor (all_reduce, row_parallel_linear)";

[[noreturn]] void refuse(const std::string& what, const std::string& input, const std::string& instead) {
  C10_THROW_ERROR(Error, cat("sglang_symm: ", what, " has no gradient, and its input '", input, "' requires one. ",
                             instead, ", or call it under torch.no_grad() or torch.inference_mode()"));
}

// y_s = sum over r of x_r on every rank s; L = sum over s of L_s, so dx_r = sum over s of dy_s. A mean likewise.
struct AllReduce : torch::autograd::Function<AllReduce> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const std::string& group,
                            const std::string& reduction) {
    ctx->saved_data["group"] = group;
    ctx->saved_data["reduction"] = reduction;
    return below_autograd(all_reduce_op(), x, group, reduction);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const std::string group = ctx->saved_data["group"].toStringRef();
    return {all_reduce_op().call(dy[0], group, ctx->saved_data["reduction"].toStringRef()), {}, {}};
  }
};

// all_gather and reduce_scatter are each other's gradient under the same L.
struct Cut {
  static void save(AutogradContext* ctx, const std::string& group, int64_t dim, OptionalSizes sizes) {
    ctx->saved_data["group"] = group;
    ctx->saved_data["dim"] = dim;
    ctx->saved_data["sizes"] = sizes.has_value() ? c10::IValue(*sizes) : c10::IValue();
  }
  template <class Op>
  static variable_list call(const Op& op, AutogradContext* ctx, const at::Tensor& dy) {
    const c10::IValue& saved = ctx->saved_data["sizes"];
    const auto sizes = saved.isNone() ? std::vector<c10::SymInt>() : saved.toSymIntVector();
    return {op.call(dy, ctx->saved_data["group"].toStringRef(), ctx->saved_data["dim"].toInt(),
                    saved.isNone() ? OptionalSizes() : OptionalSizes(sizes)),
            {},
            {},
            {}};
  }
};

struct AllGather : torch::autograd::Function<AllGather> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const std::string& group, int64_t dim,
                            OptionalSizes sizes) {
    Cut::save(ctx, group, dim, sizes);
    return below_autograd(all_gather_op(), x, group, dim, sizes);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    return Cut::call(reduce_scatter_op(), ctx, dy[0]);
  }
};

struct ReduceScatter : torch::autograd::Function<ReduceScatter> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const std::string& group, int64_t dim,
                            OptionalSizes sizes) {
    Cut::save(ctx, group, dim, sizes);
    return below_autograd(reduce_scatter_op(), x, group, dim, sizes);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    return Cut::call(all_gather_op(), ctx, dy[0]);
  }
};

// y = sum over r of x_r w_r^T (+ b) is replicated, and so are dy and L, which counts once:
// dx_r = dy w_r, dw_r = dy^T x_r, db = sum over tokens of dy, without communication.
struct RowParallelLinear : torch::autograd::Function<RowParallelLinear> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const std::string& group, bool symmetric,
                            bool static_weight) {
    const bool with_bias = bias.has_value() && bias->defined();
    ctx->save_for_backward({weight.requires_grad() ? x : at::Tensor(), x.requires_grad() ? weight : at::Tensor()});
    ctx->saved_data["bias"] = with_bias && bias->requires_grad();
    return below_autograd(row_parallel_linear_op(), x, weight, bias, group, symmetric, static_weight);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &dy = outputs[0], &x = saved[0], &weight = saved[1];
    c10::SymInt tokens = 1;
    for (int64_t d = 0; d + 1 < dy.dim(); d++) tokens *= dy.sym_size(d);
    const auto rows = [&](const at::Tensor& t) { return t.reshape_symint({tokens, t.sym_size(-1)}); };
    variable_list gradients(3);
    {
      // A second derivative would need an all-reduce that this convention has no place for: an error, no wrong number.
      const at::AutoGradMode once(false);
      if (weight.defined()) gradients[0] = at::matmul(dy, weight);
      if (x.defined()) gradients[1] = at::mm(rows(dy).t(), rows(x));
      if (ctx->saved_data["bias"].toBool()) gradients[2] = rows(dy).sum(0);
    }
    if (at::GradMode::is_enabled()) {  // create_graph: as Python's once_differentiable does
      for (at::Tensor& gradient : gradients) {
        if (gradient.defined()) gradient.requires_grad_();
      }
      const auto error = std::make_shared<torch::autograd::DelayedError>(
          "sglang_symm: row_parallel_linear has no second derivative", static_cast<int64_t>(gradients.size()));
      gradients = error->apply(std::move(gradients));
    }
    gradients.resize(6);
    return gradients;
  }
};

at::Tensor all_reduce_autograd(const at::Tensor& x, const std::string& group, const std::string& reduction) {
  if (!needs_derivative(x)) return below_autograd(all_reduce_op(), x, group, reduction);
  if (reduction != "sum" && reduction != "avg") {
    refuse(cat("all_reduce with op '", reduction, "'"), "x", "Only sum and avg have one; detach() the input");
  }
  return AllReduce::apply(x, group, reduction);
}

at::Tensor all_gather_autograd(const at::Tensor& x, const std::string& group, int64_t dim, OptionalSizes sizes) {
  if (!needs_derivative(x)) return below_autograd(all_gather_op(), x, group, dim, sizes);
  return AllGather::apply(x, group, dim, sizes);
}

at::Tensor reduce_scatter_autograd(const at::Tensor& x, const std::string& group, int64_t dim, OptionalSizes sizes) {
  if (!needs_derivative(x)) return below_autograd(reduce_scatter_op(), x, group, dim, sizes);
  return ReduceScatter::apply(x, group, dim, sizes);
}

at::Tensor row_parallel_linear_autograd(const at::Tensor& x, const at::Tensor& weight,
                                        const std::optional<at::Tensor>& bias, const std::string& group, bool symmetric,
                                        bool static_weight) {
  if (!needs_derivative(x) && !needs_derivative(weight) && !needs_derivative(bias)) {
    return below_autograd(row_parallel_linear_op(), x, weight, bias, group, symmetric, static_weight);
  }
  return RowParallelLinear::apply(x, weight, bias, group, symmetric, static_weight);
}

// For ops without a gradient: an error rather than a wrong one.
void no_gradient(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const auto values = torch::jit::last(*stack, arguments.size());
  for (size_t i = 0; i < arguments.size(); i++) {
    if (!values[i].isTensor() || !needs_derivative(values[i].toTensor())) continue;
    refuse(schema.name().substr(schema.name().rfind(':') + 1), arguments[i].name(),
           schema.is_mutable() ? kReturnsANewTensor : "Use all_reduce or row_parallel_linear and a norm of your own");
  }
  at::AutoDispatchBelowAutograd below;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

// Autograd's rule for writers: count the write, so that a backward which saved the old value raises.
void count_write(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto values = torch::jit::last(*stack, arguments.size());
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto* alias = arguments[i].alias_info();
    if (alias != nullptr && alias->isWrite()) values[i].toTensor().unsafeGetTensorImpl()->bump_version();
  }
  at::AutoDispatchBelowADInplaceOrView below;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

// Both of the above without boxes: at 2 KB they took a tenth of the call.
void all_reduce_in_place_autograd(c10::DispatchKeySet keys, at::Tensor& x, const std::string& group,
                                  const std::string& reduction) {
  if (needs_derivative(x)) refuse("all_reduce_", "x", kReturnsANewTensor);
  x.unsafeGetTensorImpl()->bump_version();
  at::AutoDispatchBelowADInplaceOrView below;
  all_reduce_in_place_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, x, group, reduction);
}

// torch.autocast, as for torch.nn.functional.linear: everything in the lower precision.
template <c10::DeviceType device>
at::Tensor row_parallel_linear_autocast(const at::Tensor& x, const at::Tensor& weight,
                                        const std::optional<at::Tensor>& bias, const std::string& group, bool symmetric,
                                        bool static_weight) {
  const c10::impl::ExcludeDispatchKeyGuard once(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const at::ScalarType lower = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(lower, t, device); };
  const at::Tensor lower_weight = cast(weight);
  // The promise is of the caller's tensor. A cast is a kernel in flight that writes another.
  const bool is_static = static_weight && lower_weight.is_same(weight);
  return row_parallel_linear_op().call(cast(x), lower_weight, cast(bias), group, symmetric, is_static);
}

constexpr const char* kOtherWriters[] = {"broadcast_", "barrier", "row_parallel_linear_out"};

}  // namespace

TORCH_LIBRARY_IMPL(sglang_symm, Autograd, m) {
  m.impl("all_reduce", &all_reduce_autograd);
  m.impl("all_gather", &all_gather_autograd);
  m.impl("reduce_scatter", &reduce_scatter_autograd);
  m.impl("row_parallel_linear", &row_parallel_linear_autograd);
  m.impl("all_reduce_add_rms_norm", torch::CppFunction::makeFromBoxedFunction<&no_gradient>());
  m.impl("row_parallel_linear_add_rms_norm", torch::CppFunction::makeFromBoxedFunction<&no_gradient>());
  m.impl("all_reduce_", &all_reduce_in_place_autograd);
  for (const char* op : kOtherWriters) m.impl(op, torch::CppFunction::makeFromBoxedFunction<&no_gradient>());
}

TORCH_LIBRARY_IMPL(sglang_symm, ADInplaceOrView, m) {
  m.impl("all_reduce_", torch::CppFunction::makeFromBoxedFunction<&count_write>());
  for (const char* op : kOtherWriters) m.impl(op, torch::CppFunction::makeFromBoxedFunction<&count_write>());
}

TORCH_LIBRARY_IMPL(sglang_symm, AutocastCPU, m) {
  m.impl("row_parallel_linear", &row_parallel_linear_autocast<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(sglang_symm, AutocastCUDA, m) {
  m.impl("row_parallel_linear", &row_parallel_linear_autocast<c10::DeviceType::CUDA>);
}

}  // namespace sglang_symm::ops
