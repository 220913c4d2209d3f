#include "ops/common.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <c10/util/safe_numerics.h>

namespace sglang_symm::ops {

void rethrow(const Error& error) {
  switch (error.kind()) {
    case ErrorKind::argument:
      C10_THROW_ERROR(ValueError, error.what());
    case ErrorKind::communication:
      C10_THROW_ERROR(DistBackendError, error.what());
    case ErrorKind::out_of_memory:
      C10_THROW_ERROR(OutOfMemoryError, error.what());
    default:
      C10_THROW_ERROR(Error, error.what());
  }
}

std::string dtype_name(at::ScalarType dtype) {
  return cat("torch.", c10::getDtypeNames(dtype).first);
}

DType to_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::float32;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    case at::kDouble:
      return DType::float64;
    case at::kChar:
      return DType::int8;
    case at::kByte:
      return DType::uint8;
    case at::kShort:
      return DType::int16;
    case at::kInt:
      return DType::int32;
    case at::kLong:
      return DType::int64;
    case at::kBool:
      return DType::boolean;
    case at::kComplexFloat:
      return DType::complex64;
    case at::kComplexDouble:
      return DType::complex128;
    case at::kUInt16:
      return DType::uint16;
    case at::kUInt32:
      return DType::uint32;
    case at::kUInt64:
      return DType::uint64;
    case at::kFloat8_e4m3fn:
      return DType::float8_e4m3fn;
    case at::kFloat8_e5m2:
      return DType::float8_e5m2;
    case at::kFloat8_e4m3fnuz:
      return DType::float8_e4m3fnuz;
    case at::kFloat8_e5m2fnuz:
      return DType::float8_e5m2fnuz;
    case at::kFloat8_e8m0fnu:
      return DType::float8_e8m0fnu;
    case at::kComplexHalf:
      return DType::complex32;
    default:
      return static_cast<DType>(static_cast<int>(DType::unnamed) + static_cast<int>(type));
  }
}

ReduceOp to_reduce_op(const std::string& op) {
  for (const ReduceOp known : {ReduceOp::sum, ReduceOp::product, ReduceOp::min, ReduceOp::max, ReduceOp::avg}) {
    if (op == name(known)) return known;
  }
  fail(ErrorKind::argument, "reduction '", op, "', expected sum, product, min, max or avg");
}

std::shared_ptr<Group> group_for(const at::Tensor& x, const std::string& name, const char* op) {
  std::shared_ptr<Group> group = GroupRegistry::instance().find(name);
  const std::string& device = group->config().device;
  if (x.is_cpu() ? device != "cpu" : device != x.device().str()) {  // str() allocates
    fail(ErrorKind::argument, op, ": group '", name, "' is on ", group->config().device, ", the tensor is on ",
         x.device().str(), " (rank ", group->rank(), ")");
  }
  if (x.layout() != at::kStrided) fail(ErrorKind::argument, op, ": expected a strided tensor, got layout ", x.layout());
  if (x.is_quantized()) fail(ErrorKind::argument, op, ": expected a plain tensor, got a quantized one");
  group->check();
  return group;
}

void count_call(Group& group, Algorithm algorithm) {
  group.counters.calls.fetch_add(1, std::memory_order_relaxed);
  group.counters.by_algorithm[static_cast<size_t>(algorithm)].fetch_add(1, std::memory_order_relaxed);
}

Algorithm choose_for(const Group& group, Descriptor* descriptor, size_t bytes) {
  descriptor->algorithm = group.symmetric() ? choose(descriptor->op, descriptor->dtype, descriptor->reduce_op(), bytes,
                                                     group.config().agreed)
                                            : Algorithm::process_group;
  return descriptor->algorithm;
}

void announce(Group& group, Descriptor descriptor) {
  if (group.symmetric()) group.collectives().announce(descriptor, current_stream(group));
}

void check_reducible(const Group& group, const Descriptor& descriptor) {
  if (group.world_size() == 1) return;
  if (reducible(descriptor.dtype, descriptor.reduce_op(), group.config().agreed)) return;
  fail(ErrorKind::argument, name(descriptor.op), " in group '", group.config().name,
       "': ", name(descriptor.reduce_op()), " of ", name(descriptor.dtype),
       " is neither native nor done by its process group. Convert the tensor, to float32 or int64 say");
}

void reduce_into(Group& group, Descriptor descriptor, const at::Tensor& x, const at::Tensor& out,
                 const at::Tensor& bias) {
  if (bias.defined()) descriptor.flags |= Descriptor::kHasBias;
  // The process group's deadline is its own, hence the mean is a sum and a division here: Gloo has no mean.
  const bool mean = descriptor.reduce_op() == ReduceOp::avg;
  const ReduceOp reduction = mean ? ReduceOp::sum : descriptor.reduce_op();
  descriptor.flags = static_cast<uint8_t>((descriptor.flags & ~7) | static_cast<uint8_t>(reduction));
  if (mean && !at::isFloatingType(x.scalar_type()) && !at::isComplexType(x.scalar_type())) {
    fail(ErrorKind::argument, name(descriptor.op), ": avg of ", dtype_name(x), ", expected a floating dtype");
  }
  check_reducible(group, descriptor);
  const bool native = natively_reduced(descriptor.dtype, reduction);
  const std::lock_guard lock(group.order);
  const Algorithm algorithm = choose_for(group, &descriptor, x.nbytes());
  if (group.world_size() > 1 && algorithm == Algorithm::nccl) {
    group.collectives().all_reduce(
        descriptor, {x.const_data_ptr(), out.mutable_data_ptr(), static_cast<size_t>(x.numel()), descriptor.dtype},
        current_stream(group));
    if (bias.defined()) out.add_(bias);
  } else if (native && group.symmetric() && algorithm != Algorithm::process_group) {
    AllReduceArgs args{x.const_data_ptr(), out.mutable_data_ptr(), static_cast<size_t>(x.numel()), descriptor.dtype};
    if (bias.defined()) {
      args.bias = bias.const_data_ptr();
      args.bias_length = static_cast<size_t>(bias.numel());
    }
    group.collectives().all_reduce(descriptor, args, current_stream(group));
  } else {
    announce(group, descriptor);
    const at::Tensor sum = group.world_size() == 1 ? x : fallback::all_reduce(group, descriptor, x, name(reduction));
    if (!sum.is_same(out)) out.copy_(sum);
    if (bias.defined()) out.add_(bias);
  }
  if (mean) out.div_(group.world_size());
  count_call(group, algorithm);
}

void warn_full_once(Group& group, size_t bytes) {
  if (!group.arena() || !group.failure().empty() || group.counters.warned_full.exchange(true)) return;
  TORCH_WARN(group.describe_full(bytes), ". The tensor gets ordinary memory: right, but slower. Said once; counted in ",
             "Group.info()['outputs_outside']");
}

size_t checked_bytes(at::IntArrayRef sizes, size_t element_size, const char* op) {
  uint64_t bytes = element_size;
  bool overflows = false;
  for (const int64_t n : sizes) {
    if (n < 0) fail(ErrorKind::argument, op, ": size ", sizes, ", expected no negative number");
    overflows |= c10::mul_overflows(bytes, static_cast<uint64_t>(n), &bytes);
  }
  if (overflows || bytes > static_cast<uint64_t>(INT64_MAX)) {
    fail(ErrorKind::argument, op, ": size ", sizes, " of ", element_size,
         " bytes an element is more than memory can be");
  }
  return static_cast<size_t>(bytes);
}

at::Tensor wrap_block(void* block, size_t bytes, at::IntArrayRef sizes, const at::TensorOptions& options) {
  c10::DataPtr data(
      block, block, [](void* pointer) { ArenaRegistry::instance().free(pointer); }, options.device());
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data), /*allocator=*/nullptr,
                       /*resizable=*/false);
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(options.computeDispatchKey()), options.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}

at::Tensor empty_output(Group& group, at::IntArrayRef sizes, const at::TensorOptions& options, bool symmetric) {
  const size_t bytes = checked_bytes(sizes, options.dtype().itemsize(), "output");
  if (symmetric && group.arena() && bytes != 0) {
    if (void* block = group.allocate_output(bytes, /*required=*/false, current_stream(group))) {
      return wrap_block(block, bytes, sizes, options);
    }
    warn_full_once(group, bytes);
  } else if (bytes != 0) {
    group.counters.outputs_outside.fetch_add(1, std::memory_order_relaxed);
  }
  return at::empty(sizes, options);
}

namespace fallback {

namespace {

// Boxed calls: the schema's names and types are stable over torch versions, the C++ signatures are not.
template <class... Args>
at::Tensor call(Group& group, const Descriptor& descriptor, const char* op, Args&&... args) {
  if (group.config().process_group.empty()) {
    fail(ErrorKind::argument, to_string(descriptor), ": group '", group.config().name,
         "' has no process group to fall back to");
  }
  try {
    auto& dispatcher = c10::Dispatcher::singleton();
    torch::jit::Stack stack;
    (stack.emplace_back(std::forward<Args>(args)), ...);
    stack.emplace_back(group.config().process_group);
    dispatcher.findSchemaOrThrow(cat("_c10d_functional::", op).c_str(), "").callBoxed(&stack);
    torch::jit::Stack pending{stack.at(0)};
    dispatcher.findSchemaOrThrow("_c10d_functional::wait_tensor", "").callBoxed(&pending);
    return pending.at(0).toTensor();
  } catch (const c10::Error& error) {
    group.fail_process_group(descriptor, error.what_without_backtrace());
  } catch (const std::exception& error) {  // Gloo's own
    group.fail_process_group(descriptor, error.what());
  }
}

}  // namespace

at::Tensor all_reduce(Group& group, const Descriptor& descriptor, const at::Tensor& x, const std::string& op) {
  return call(group, descriptor, "all_reduce", x, op);
}

at::Tensor all_gather_equal(Group& group, const Descriptor& descriptor, const at::Tensor& x) {
  // Gloo copies GPU tensors of its other collectives by itself; here it would read them as the host's
  // (pytorch issue 152645: SIGSEGV).
  const bool by_host = group.config().process_group_on_host;
  const at::Tensor given = by_host ? x.cpu() : x;
  return call(group, descriptor, "all_gather_into_tensor", given, int64_t{group.world_size()}).to(x.device());
}

void broadcast_(Group& group, const Descriptor& descriptor, const at::Tensor& x, int64_t src) {
  call(group, descriptor, "broadcast_", x, src);
}

}  // namespace fallback

}  // namespace sglang_symm::ops
