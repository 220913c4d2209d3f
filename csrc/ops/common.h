// What every op needs: the group behind a name, checks of tensors, outputs in symmetric memory, errors as PyTorch's.
// This floor alone includes torch headers.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <string>

#include "base/error.h"
#include "group/group.h"

namespace sglang_symm::ops {

// Rethrows an Error of the core as ValueError, DistBackendError, OutOfMemoryError or RuntimeError.
[[noreturn]] void rethrow(const Error& error);

// Runs `body`, translating the core's errors. Every op's entry goes through it.
template <class Body>
auto guarded(const Body& body) {
  try {
    return body();
  } catch (const Error& error) {
    rethrow(error);
  }
}

// As users write it: torch.float32.
std::string dtype_name(at::ScalarType dtype);
inline std::string dtype_name(const at::Tensor& t) {
  return dtype_name(t.scalar_type());
}

// The stream that this thread's work on the group's device goes to now; null on the CPU.
#ifdef SGLANG_SYMM_WITH_CUDA
Stream current_stream(const Group& group);
#else
inline Stream current_stream(const Group&) {
  return nullptr;
}
#endif

// out [M, N] = sum over ranks of x [M, K/P] @ weight [N, K/P]^T (+ bias) by one kernel (fused/), with the descriptor's
// op. False, with nothing done, when there is no kernel for this call; all ranks are told the same.
#ifdef SGLANG_SYMM_WITH_CUDA
bool fused_linear_into(Group& group, Descriptor descriptor, const at::Tensor& x, const at::Tensor& weight,
                       const at::Tensor& bias, const at::Tensor& out, bool static_weight);
#else
inline bool fused_linear_into(Group&, Descriptor, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                              const at::Tensor&, bool) {
  return false;
}
#endif

// y = weight * round(h / sqrt(mean(h^2) + eps)), h = round(sum + residual). Contiguous; residual as the sum, weight
// [H].
struct AddRmsNorm {
  at::Tensor residual, weight;
  double eps;
};

// y and hidden (h) of the sum over ranks of x, by one kernel; with the descriptor's op. False, with nothing done, when
// there is none for this call; all ranks are told the same. norm_into: of a sum that is there already, by one kernel.
#ifdef SGLANG_SYMM_WITH_CUDA
bool all_reduce_norm_into(Group& group, Descriptor descriptor, const at::Tensor& x, const AddRmsNorm& norm,
                          const at::Tensor& y, const at::Tensor& hidden);
bool norm_into(Group& group, const at::Tensor& sum, const AddRmsNorm& norm, const at::Tensor& y,
               const at::Tensor& hidden);
#else
inline bool all_reduce_norm_into(Group&, Descriptor, const at::Tensor&, const AddRmsNorm&, const at::Tensor&,
                                 const at::Tensor&) {
  return false;
}
inline bool norm_into(Group&, const at::Tensor&, const AddRmsNorm&, const at::Tensor&, const at::Tensor&) {
  return false;
}
#endif

DType to_dtype(at::ScalarType type);
ReduceOp to_reduce_op(const std::string& op);

// The group, found by name, healthy, and on x's device.
std::shared_ptr<Group> group_for(const at::Tensor& x, const std::string& name, const char* op);

// out = sum over ranks of x (+ bias), by the algorithm that the descriptor's op, dtype and `count` lead to. x and out
// are contiguous and equal in size, and may be one tensor; bias is [bias_length] or undefined. Takes the group's order
// lock.
void reduce_into(Group& group, Descriptor descriptor, const at::Tensor& x, const at::Tensor& out,
                 const at::Tensor& bias = {});

// Raises for a reduction that nobody does, before anything is sent.
void check_reducible(const Group& group, const Descriptor& descriptor);

// Sends the descriptor first, so that a disagreement is found although the process group does the work.
void announce(Group& group, Descriptor descriptor);
Algorithm choose_for(const Group& group, Descriptor* descriptor, size_t bytes);
void count_call(Group& group, Algorithm algorithm);

// A contiguous tensor in the group's arena; ordinary memory, counted and warned of once, when it is full.
at::Tensor empty_output(Group& group, at::IntArrayRef sizes, const at::TensorOptions& options, bool symmetric = true);
// Bytes of a tensor of these sizes; sizes that are negative or overflow are ErrorKind::argument.
size_t checked_bytes(at::IntArrayRef sizes, size_t element_size, const char* op);
// A tensor over a block of an arena; the block is freed with it.
at::Tensor wrap_block(void* block, size_t bytes, at::IntArrayRef sizes, const at::TensorOptions& options);
// A full arena under use_symmetric_memory or in an output: one warning a group.
void warn_full_once(Group& group, size_t bytes);

// The innermost group whose use_symmetric_memory this thread is inside of, if it is on a GPU.
Group* current_cuda_group();

// The process group's collectives (Gloo, NCCL), found through torch's own functional ops by the c10d name.
namespace fallback {
at::Tensor all_reduce(Group& group, const Descriptor& descriptor, const at::Tensor& x, const std::string& op);
at::Tensor all_gather_equal(Group& group, const Descriptor& descriptor, const at::Tensor& x);  // [n, ...] -> [P n, ...]
void broadcast_(Group& group, const Descriptor& descriptor, const at::Tensor& x, int64_t src);
}  // namespace fallback

}  // namespace sglang_symm::ops
