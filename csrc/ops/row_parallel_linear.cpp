// y = sum over ranks of x_r @ w_r^T (+ bias): the reference, the CPU version, and the compositions with a norm.
#include <ATen/MemoryOverlap.h>

#include "ops/common.h"
#include "ops/ops.h"

namespace sglang_symm::ops {

namespace {

struct Shapes {
  int64_t rows, columns;
  std::vector<int64_t> output;  // x's with N in place of K
};

Shapes checked_shapes(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      const char* op) {
  if (x.dim() < 1 || weight.dim() != 2 || x.size(-1) != weight.size(1)) {
    fail(ErrorKind::argument, op, ": expected x [..., K/P] and weight [N, K/P], got x ", x.sizes(), " and weight ",
         weight.sizes());
  }
  if (weight.scalar_type() != x.scalar_type() || weight.device() != x.device()) {
    fail(ErrorKind::argument, op, ": expected x and weight of one dtype and device, got ", dtype_name(x), " on ",
         x.device().str(), " and ", dtype_name(weight), " on ", weight.device().str());
  }
  if (!at::isFloatingType(x.scalar_type())) {
    fail(ErrorKind::argument, op, ": expected a floating dtype, got ", dtype_name(x));
  }
  if (bias && bias->defined()) {
    if (bias->dim() != 1 || bias->size(0) != weight.size(0) || bias->scalar_type() != x.scalar_type() ||
        bias->device() != x.device()) {
      fail(ErrorKind::argument, op, ": expected bias [", weight.size(0), "] of ", dtype_name(x), " on ",
           x.device().str(), " (the whole of it on every rank), got ", bias->sizes(), " of ", dtype_name(*bias), " on ",
           bias->device().str());
    }
  }
  std::vector<int64_t> output = x.sizes().vec();
  output.back() = weight.size(0);
  const int64_t rows = c10::multiply_integers(x.sizes().slice(0, static_cast<size_t>(x.dim() - 1)));
  return {rows, weight.size(0), output};
}

Descriptor describe(OpCode op, const at::Tensor& x, const Shapes& shapes) {
  Descriptor descriptor;
  descriptor.op = op;
  descriptor.dtype = to_dtype(x.scalar_type());
  descriptor.count = static_cast<uint64_t>(shapes.rows);
  descriptor.aux = static_cast<uint32_t>(shapes.columns);
  return descriptor;
}

at::Tensor defined_bias(const std::optional<at::Tensor>& bias) {
  return bias && bias->defined() ? bias->contiguous() : at::Tensor();
}

// out [M, N] = x [M, K] @ weight [N, K]^T. For two or three rows in fp32 on the CPU the transposed product reads the
// weight once; the plain one takes 2 to 4 times as long (docs/notes/cpu_generate.md; layers/local.py does the same).
void mm_into(const at::Tensor& out, const at::Tensor& x, const at::Tensor& weight) {
  at::Tensor rows = out;
  if (x.is_cpu() && x.scalar_type() == at::kFloat && (x.size(0) == 2 || x.size(0) == 3)) {
    rows.copy_(at::mm(weight, x.t()).t());
  } else {
    at::mm_out(rows, x, weight.t());
  }
}

struct Linear {
  Descriptor descriptor;
  at::Tensor tokens;  // x [M, K]
  at::Tensor weight;
  at::Tensor bias;  // maybe none

  Linear(const Descriptor& call, const at::Tensor& x, const at::Tensor& w, at::Tensor b)
      : descriptor(call),
        tokens(x.reshape({static_cast<int64_t>(call.count), x.size(-1)})),
        weight(w),
        bias(std::move(b)) {}
  at::Tensor rows_of(const at::Tensor& out) const { return out.view({tokens.size(0), weight.size(0)}); }
};

// GEMM and reduction in one kernel, where there is one.
bool fused_into(Group& group, const Linear& linear, const at::Tensor& out, bool static_weight) {
  return fused_linear_into(group, linear.descriptor, linear.tokens, linear.weight, linear.bias, linear.rows_of(out),
                           static_weight);
}

// Else the library's GEMM writes straight into `out`, in symmetric memory when there is room; then it is reduced in
// place.
void linear_into(Group& group, const Linear& linear, const at::Tensor& out, bool static_weight) {
  if (fused_into(group, linear, out, static_weight)) return;
  mm_into(linear.rows_of(out), linear.tokens, linear.weight);
  reduce_into(group, linear.descriptor, out, out, linear.bias);
}

// (y, h) of a sum: by one kernel where there is one, else as Hugging Face's LlamaRMSNorm computes it, fp32 inside.
std::tuple<at::Tensor, at::Tensor> add_rms_norm(Group& group, const at::Tensor& sum, const AddRmsNorm& norm) {
  if (group.config().device != "cpu") {
    const at::Tensor y = at::empty_like(sum), hidden = at::empty_like(sum);
    if (norm_into(group, sum, norm, y, hidden)) return {y, hidden};
  }
  const at::Tensor hidden = sum + norm.residual;
  const at::Tensor wide = hidden.to(at::kFloat);
  const at::Tensor scale = at::rsqrt(wide.pow(2).mean(-1, /*keepdim=*/true) + norm.eps);
  return {norm.weight * (wide * scale).to(hidden.scalar_type()), hidden};
}

void check_norm(const at::Tensor& residual, const at::Tensor& norm_weight, at::IntArrayRef expected,
                at::ScalarType dtype, at::Device device, const char* op) {
  if (residual.sizes() != expected || norm_weight.dim() != 1 || expected.empty() ||
      norm_weight.size(0) != expected.back() || residual.scalar_type() != dtype || norm_weight.scalar_type() != dtype ||
      residual.device() != device || norm_weight.device() != device || !at::isFloatingType(dtype)) {
    fail(ErrorKind::argument, op, ": expected residual ", expected, " and norm weight [",
         expected.empty() ? 0 : expected.back(), "] of ", dtype_name(dtype), " (a floating dtype) on ", device.str(),
         ", got ", residual.sizes(), " of ", dtype_name(residual), " on ", residual.device().str(), " and ",
         norm_weight.sizes(), " of ", dtype_name(norm_weight), " on ", norm_weight.device().str());
  }
}

}  // namespace

at::Tensor row_parallel_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                               const std::string& name, bool symmetric, bool static_weight) {
  return guarded([&] {
    at::AutoDispatchBelowAutograd below;
    const Shapes shapes = checked_shapes(x, weight, bias, "row_parallel_linear");
    auto group = group_for(x, name, "row_parallel_linear");
    at::Tensor out = empty_output(*group, shapes.output, x.options(), symmetric);
    linear_into(*group, {describe(OpCode::row_parallel_linear, x, shapes), x, weight, defined_bias(bias)}, out,
                static_weight);
    return out;
  });
}

void row_parallel_linear_out(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                             const std::string& name, at::Tensor& out) {
  guarded([&] {
    at::AutoDispatchBelowAutograd below;
    const Shapes shapes = checked_shapes(x, weight, bias, "row_parallel_linear_out");
    if (out.sizes() != at::IntArrayRef(shapes.output) || out.scalar_type() != x.scalar_type() ||
        out.device() != x.device() || !out.is_contiguous()) {
      fail(ErrorKind::argument, "row_parallel_linear_out: expected a contiguous out ", at::IntArrayRef(shapes.output),
           " of ", dtype_name(x), " on ", x.device().str(), ", got ", out.sizes(), " of ", dtype_name(out), " on ",
           out.device().str(), out.is_contiguous() ? "" : ", not contiguous");
    }
    for (const at::Tensor& other : {x, weight, defined_bias(bias)}) {
      if (other.defined() && at::get_overlap_status(out, other) != at::MemOverlapStatus::No) {
        fail(ErrorKind::argument, "row_parallel_linear_out: out shares memory with x, weight or bias, which it would ",
             "overwrite while they are read. Expected an out of its own");
      }
    }
    auto group = group_for(x, name, "row_parallel_linear_out");
    linear_into(*group, {describe(OpCode::row_parallel_linear, x, shapes), x, weight, defined_bias(bias)}, out,
                /*static_weight=*/false);
  });
}

// What the fast versions are checked against: every rank's rounded partial is gathered, summed in fp32 in rank order
// with the bias last, and rounded once.
at::Tensor row_parallel_linear_reference(const at::Tensor& x, const at::Tensor& weight,
                                         const std::optional<at::Tensor>& bias, const std::string& name) {
  at::AutoDispatchBelowAutograd below;
  const Shapes shapes = guarded([&] { return checked_shapes(x, weight, bias, "row_parallel_linear_reference"); });
  const at::Tensor partial = at::empty({shapes.rows, shapes.columns}, x.options());
  mm_into(partial, x.reshape({shapes.rows, x.size(-1)}), weight);
  const at::Tensor partials = all_gather(partial.view({1, -1}), name, 0, std::nullopt);
  at::Tensor sum = partials[0].to(at::kFloat);
  for (int64_t r = 1; r < partials.size(0); r++) sum = sum + partials[r].to(at::kFloat);
  sum = sum.view(shapes.output);
  if (bias && bias->defined()) sum = sum + bias->to(at::kFloat);
  return sum.to(x.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> all_reduce_add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                                           const at::Tensor& weight, double eps,
                                                           const std::string& name) {
  return guarded([&] {
    at::AutoDispatchBelowAutograd below;
    check_norm(residual, weight, x.sizes(), x.scalar_type(), x.device(), "all_reduce_add_rms_norm");
    auto group = group_for(x, name, "all_reduce_add_rms_norm");
    Descriptor descriptor;
    descriptor.op = OpCode::all_reduce_add_rms_norm;
    descriptor.dtype = to_dtype(x.scalar_type());
    descriptor.flags = Descriptor::kResidual;
    descriptor.count = static_cast<uint64_t>(x.numel());
    descriptor.aux = static_cast<uint32_t>(x.size(-1));
    const at::Tensor dense = x.contiguous();
    const AddRmsNorm norm{residual.contiguous(), weight.contiguous(), eps};
    if (group->config().device != "cpu") {
      at::Tensor y = at::empty(x.sizes(), x.options()), hidden = at::empty(x.sizes(), x.options());
      if (all_reduce_norm_into(*group, descriptor, dense, norm, y, hidden)) return std::make_tuple(y, hidden);
    }
    const at::Tensor sum = empty_output(*group, x.sizes(), x.options());
    reduce_into(*group, descriptor, dense, sum);
    return add_rms_norm(*group, sum, norm);
  });
}

std::tuple<at::Tensor, at::Tensor> row_parallel_linear_add_rms_norm(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& residual,
    const at::Tensor& norm_weight, double eps, const std::string& name, bool static_weight, bool symmetric) {
  return guarded([&] {
    at::AutoDispatchBelowAutograd below;
    const char* op = "row_parallel_linear_add_rms_norm";
    const Shapes shapes = checked_shapes(x, weight, bias, op);
    check_norm(residual, norm_weight, shapes.output, x.scalar_type(), x.device(), op);
    auto group = group_for(x, name, op);
    const at::Tensor sum = empty_output(*group, shapes.output, x.options(), symmetric);
    const AddRmsNorm norm{residual.contiguous(), norm_weight.contiguous(), eps};
    const Linear linear{describe(OpCode::row_parallel_linear_add_rms_norm, x, shapes), x, weight, defined_bias(bias)};
    if (!fused_into(*group, linear, sum, static_weight)) {
      mm_into(linear.rows_of(sum), linear.tokens, weight);
      // Reduction and norm in one kernel, but a bias comes between them.
      if (!linear.bias.defined() && group->config().device != "cpu") {
        const at::Tensor y = at::empty_like(sum), hidden = at::empty_like(sum);
        if (all_reduce_norm_into(*group, linear.descriptor, sum, norm, y, hidden)) return std::make_tuple(y, hidden);
      }
      reduce_into(*group, linear.descriptor, sum, sum, linear.bias);
    }
    return add_rms_norm(*group, sum, norm);
  });
}

}  // namespace sglang_symm::ops
