// The collectives as PyTorch ops: checks, dimensions and strides here, the work in collective/ or in the process group.
#include <ATen/MemoryOverlap.h>

#include <numeric>

#include "ops/common.h"
#include "ops/ops.h"

namespace sglang_symm::ops {

namespace {

Descriptor describe(OpCode op, const at::Tensor& x, uint8_t flags = 0) {
  Descriptor descriptor;
  descriptor.op = op;
  descriptor.dtype = to_dtype(x.scalar_type());
  descriptor.flags = flags;
  descriptor.count = static_cast<uint64_t>(x.numel());
  return descriptor;
}

int64_t checked_dim(const at::Tensor& x, int64_t dim, const char* op) {
  if (x.dim() == 0) fail(ErrorKind::argument, op, ": expected a tensor of at least one dimension, got a scalar");
  if (dim < -x.dim() || dim >= x.dim()) {
    fail(ErrorKind::argument, op, ": dim ", dim, " of a tensor of ", x.dim(), " dimensions");
  }
  return dim < 0 ? dim + x.dim() : dim;
}

// An op that writes its argument raises before anything is sent, not when the result is copied back.
void check_writable(const at::Tensor& x, const char* op) {
  if (at::has_internal_overlap(x) == at::MemOverlap::Yes) {
    fail(ErrorKind::argument, op, ": expected a tensor whose elements have memory of their own, got sizes ", x.sizes(),
         " with strides ", x.strides(), " (an expanded tensor?). clone() it first");
  }
}

std::vector<int64_t> checked_sizes(const Group& group, OptionalSizes sizes, const char* op) {
  const auto& given = C10_AS_INTARRAYREF_SLOW(*sizes);
  if (given.size() != static_cast<size_t>(group.world_size())) {
    fail(ErrorKind::argument, op, ": ", given.size(), " sizes for the ", group.world_size(), " ranks of group '",
         group.config().name, "'");
  }
  int64_t total = 0;
  for (const int64_t n : given) {
    if (n < 0) fail(ErrorKind::argument, op, ": sizes ", given, ", expected no negative number");
    if (__builtin_add_overflow(total, n, &total)) {
      fail(ErrorKind::argument, op, ": sizes ", given, ", whose sum is more than a tensor can have");
    }
  }
  return given.vec();
}

// How the tensor is cut, in one word: ranks that cut differently disagree.
uint32_t layout_digest(int64_t dim, const std::vector<int64_t>& sizes) {
  uint32_t hash = 2166136261u;
  const auto mix = [&](uint64_t value) {
    for (int i = 0; i < 8; i++) hash = (hash ^ static_cast<uint8_t>(value >> 8 * i)) * 16777619u;
  };
  mix(static_cast<uint64_t>(dim));
  for (const int64_t n : sizes) mix(static_cast<uint64_t>(n));
  return hash;
}

std::vector<size_t> scaled(const std::vector<int64_t>& sizes, size_t unit) {
  std::vector<size_t> out;
  for (const int64_t n : sizes) out.push_back(static_cast<size_t>(n) * unit);
  return out;
}

std::vector<int64_t> with_dim0(const at::Tensor& x, int64_t n) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[0] = n;
  return sizes;
}

// [n, ...] of any dtype as [n, bytes a row]: the process group copies bytes, so its list of dtypes does not matter.
// Flat in between, because a contiguous [n, 1] may have any stride in its last dimension, and a view as bytes needs 1.
at::Tensor as_bytes(const at::Tensor& x) {
  return x.numel() == 0 ? at::empty({x.size(0), 0}, x.options().dtype(at::kByte))
                        : x.view({-1}).view(at::kByte).view({x.size(0), -1});
}

// out [sum of sizes, ...] = the ranks' x [sizes[r], ...], padded to the longest on their way.
void all_gather_by_process_group(Group& group, const Descriptor& descriptor, const at::Tensor& x,
                                 const std::vector<int64_t>& sizes, const at::Tensor& out) {
  if (out.numel() == 0) return;
  const int64_t longest = *std::max_element(sizes.begin(), sizes.end());
  const at::Tensor out_bytes = as_bytes(out);
  at::Tensor padded = at::zeros({longest, out_bytes.size(1)}, out_bytes.options());
  if (x.numel() != 0) padded.narrow(0, 0, x.size(0)).copy_(as_bytes(x));
  const at::Tensor all = fallback::all_gather_equal(group, descriptor, padded);
  int64_t begin = 0;
  for (size_t r = 0; r < sizes.size(); r++) {
    out_bytes.narrow(0, begin, sizes[r]).copy_(all.narrow(0, static_cast<int64_t>(r) * longest, sizes[r]));
    begin += sizes[r];
  }
}

}  // namespace

at::Tensor all_reduce(const at::Tensor& x, const std::string& name, const std::string& op) {
  return guarded([&] {
    at::AutoDispatchBelowAutograd below;
    auto group = group_for(x, name, "all_reduce");
    const Descriptor descriptor = describe(OpCode::all_reduce, x, static_cast<uint8_t>(to_reduce_op(op)));
    const at::Tensor out = empty_output(*group, x.sizes(), x.options());
    reduce_into(*group, descriptor, x.contiguous(), out);
    return out;
  });
}

void all_reduce_(at::Tensor& x, const std::string& name, const std::string& op) {
  guarded([&] {
    at::AutoDispatchBelowAutograd below;
    auto group = group_for(x, name, "all_reduce_");
    check_writable(x, "all_reduce_");
    const Descriptor descriptor = describe(OpCode::all_reduce, x, static_cast<uint8_t>(to_reduce_op(op)));
    const at::Tensor dense = x.contiguous();
    reduce_into(*group, descriptor, dense, dense);
    if (!dense.is_same(x)) x.copy_(dense);
  });
}

at::Tensor reduce_scatter(const at::Tensor& x, const std::string& name, int64_t dim, OptionalSizes given) {
  return guarded([&] {
    at::AutoDispatchBelowAutograd below;
    auto group = group_for(x, name, "reduce_scatter");
    const int64_t d = checked_dim(x, dim, "reduce_scatter");
    const int64_t world = group->world_size();
    std::vector<int64_t> sizes;
    if (given.has_value()) {
      sizes = checked_sizes(*group, given, "reduce_scatter");
      const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
      if (total != x.size(d)) {
        fail(ErrorKind::argument, "reduce_scatter: sizes ", at::IntArrayRef(sizes), " sum to ", total, ", dimension ",
             d, " has ", x.size(d));
      }
    } else {
      if (x.size(d) % world != 0) {
        fail(ErrorKind::argument, "reduce_scatter: dimension ", d, " of size ", x.size(d), " does not divide by the ",
             world, " ranks of group '", name, "'. Give sizes=");
      }
      sizes.assign(static_cast<size_t>(world), x.size(d) / world);
    }
    const at::Tensor rows = x.movedim(d, 0).contiguous();
    const int64_t mine = sizes[static_cast<size_t>(group->rank())];
    const at::Tensor out = empty_output(*group, with_dim0(rows, mine), x.options());
    Descriptor descriptor = describe(OpCode::reduce_scatter, x);
    descriptor.aux = layout_digest(d, sizes);
    check_reducible(*group, descriptor);
    {
      const std::lock_guard lock(group->order);
      const Algorithm algorithm = choose_for(*group, &descriptor, rows.nbytes());
      if (algorithm != Algorithm::process_group) {
        const size_t row = rows.size(0) == 0 ? 0 : static_cast<size_t>(rows.numel() / rows.size(0));
        group->collectives().reduce_scatter(descriptor, rows.const_data_ptr(), out.mutable_data_ptr(),
                                            scaled(sizes, row), current_stream(*group));
      } else {
        announce(*group, descriptor);
        const at::Tensor sum = world == 1 ? rows : fallback::all_reduce(*group, descriptor, rows, "sum");
        out.copy_(sum.narrow(0, std::accumulate(sizes.begin(), sizes.begin() + group->rank(), int64_t{0}), mine));
      }
      count_call(*group, algorithm);
    }
    return d == 0 ? out : out.movedim(0, d).contiguous();
  });
}

at::Tensor all_gather(const at::Tensor& x, const std::string& name, int64_t dim, OptionalSizes given) {
  return guarded([&] {
    at::AutoDispatchBelowAutograd below;
    auto group = group_for(x, name, "all_gather");
    const int64_t d = checked_dim(x, dim, "all_gather");
    const int64_t world = group->world_size();
    std::vector<int64_t> sizes(static_cast<size_t>(world), x.size(d));
    if (given.has_value()) {
      sizes = checked_sizes(*group, given, "all_gather");
      if (sizes[static_cast<size_t>(group->rank())] != x.size(d)) {
        fail(ErrorKind::argument, "all_gather: sizes ", at::IntArrayRef(sizes), " give rank ", group->rank(), " ",
             sizes[static_cast<size_t>(group->rank())], " in dimension ", d, ", the tensor has ", x.size(d));
      }
    }
    const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
    const at::Tensor rows = x.movedim(d, 0).contiguous();
    at::Tensor out = empty_output(*group, with_dim0(rows, total), x.options());
    const std::vector<int64_t> inner = rows.sizes().slice(1).vec();
    const size_t row = static_cast<size_t>(c10::multiply_integers(inner)) * x.element_size();
    Descriptor descriptor = describe(OpCode::all_gather, x);
    descriptor.count = static_cast<uint64_t>(out.numel());
    descriptor.aux = layout_digest(d, sizes);
    {
      const std::lock_guard lock(group->order);
      const int64_t longest = *std::max_element(sizes.begin(), sizes.end());
      const Algorithm algorithm = choose_for(*group, &descriptor, static_cast<size_t>(longest) * row);
      if (algorithm != Algorithm::process_group) {
        group->collectives().all_gather(descriptor, rows.const_data_ptr(), out.mutable_data_ptr(), scaled(sizes, row),
                                        current_stream(*group));
      } else {
        announce(*group, descriptor);
        if (world == 1) {
          out.copy_(rows);
        } else {
          all_gather_by_process_group(*group, descriptor, rows, sizes, out);
        }
      }
      count_call(*group, algorithm);
    }
    return d == 0 ? out : out.movedim(0, d).contiguous();
  });
}

void broadcast_(at::Tensor& x, int64_t src, const std::string& name) {
  guarded([&] {
    at::AutoDispatchBelowAutograd below;
    auto group = group_for(x, name, "broadcast_");
    check_writable(x, "broadcast_");
    if (src < 0 || src >= group->world_size()) {
      fail(ErrorKind::argument, "broadcast_: src ", src, " in group '", name, "', expected a rank in the group, 0 to ",
           group->world_size() - 1);
    }
    Descriptor descriptor = describe(OpCode::broadcast, x);
    descriptor.aux = static_cast<uint32_t>(src);
    const at::Tensor dense = x.contiguous();
    const std::lock_guard lock(group->order);
    const Algorithm algorithm = choose_for(*group, &descriptor, dense.nbytes());
    if (algorithm != Algorithm::process_group) {
      group->collectives().broadcast(descriptor, dense.mutable_data_ptr(), dense.nbytes(), static_cast<int>(src),
                                     current_stream(*group));
    } else {
      announce(*group, descriptor);
      if (group->world_size() > 1 && dense.numel() != 0) {
        fallback::broadcast_(*group, descriptor, dense.view({-1}).view(at::kByte), src);
      }
    }
    count_call(*group, algorithm);
    if (!dense.is_same(x) && src != group->rank()) x.copy_(dense);
  });
}

void barrier(at::Tensor& token, const std::string& name) {
  guarded([&] {
    auto group = group_for(token, name, "barrier");
    Descriptor descriptor;
    descriptor.op = OpCode::barrier;
    const std::lock_guard lock(group->order);
    const Algorithm algorithm = choose_for(*group, &descriptor, 0);
    announce(*group, descriptor);
    if (algorithm == Algorithm::process_group && group->world_size() > 1) {
      fallback::all_reduce(*group, descriptor, at::zeros({1}, token.options().dtype(at::kInt)), "sum");
    }
    count_call(*group, algorithm);
  });
}

}  // namespace sglang_symm::ops
