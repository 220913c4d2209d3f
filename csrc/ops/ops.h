// The functions behind the schemas of library.cpp. docs/ops.md has what each computes.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace sglang_symm::ops {

using OptionalSizes = at::OptionalSymIntArrayRef;

// collective_ops.cpp
at::Tensor all_reduce(const at::Tensor& x, const std::string& group, const std::string& op);
void all_reduce_(at::Tensor& x, const std::string& group, const std::string& op);
at::Tensor reduce_scatter(const at::Tensor& x, const std::string& group, int64_t dim, OptionalSizes sizes);
at::Tensor all_gather(const at::Tensor& x, const std::string& group, int64_t dim, OptionalSizes sizes);
void broadcast_(at::Tensor& x, int64_t src, const std::string& group);
void barrier(at::Tensor& token, const std::string& group);

// row_parallel_linear.cpp
at::Tensor row_parallel_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                               const std::string& group, bool symmetric, bool static_weight);
void row_parallel_linear_out(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                             const std::string& group, at::Tensor& out);
at::Tensor row_parallel_linear_reference(const at::Tensor& x, const at::Tensor& weight,
                                         const std::optional<at::Tensor>& bias, const std::string& group);
std::tuple<at::Tensor, at::Tensor> all_reduce_add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                                           const at::Tensor& weight, double eps,
                                                           const std::string& group);
std::tuple<at::Tensor, at::Tensor> row_parallel_linear_add_rms_norm(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& residual,
    const at::Tensor& norm_weight, double eps, const std::string& group, bool static_weight, bool symmetric);

#ifdef SGLANG_SYMM_TRACE
// row_parallel_linear_cuda.cpp: take_prefill_trace(), [CTA, visit, stamp].
std::tuple<at::Tensor, std::vector<std::string>> prefill_trace();
#endif

// memory_ops.cpp
at::Tensor empty(at::SymIntArrayRef size, const std::string& group, at::ScalarType dtype, at::Device device);
void enter_symmetric_memory(const std::string& group);
void exit_symmetric_memory(const std::string& group);
// The graph capture that this thread's current stream on the group's device is in; 0: none.
int64_t capture_id(const std::string& group);
bool in_arena(const at::Tensor& x, const std::string& group);
std::vector<int64_t> rendezvous(const at::Tensor& x, const std::string& group);
at::Tensor peer_view(const std::string& group, int64_t peer, int64_t offset, at::IntArrayRef size,
                     at::ScalarType dtype);
// Makes PyTorch's CPU allocator one that can serve from an arena; once, when the first CPU group is made.
void install_cpu_allocator();

// interrupt.cpp: Ctrl-C ends an op that waits.
void install_interrupt_hook();

// group_ops.cpp
std::string group_listen(const std::string& name, const std::string& device, int64_t rank, int64_t world_size,
                         int64_t arena_bytes, const std::string& process_group,
                         const std::vector<std::string>& settings);
void group_connect(const std::string& name, const std::vector<std::string>& addresses, const std::string& nccl_id);
void group_create_process_group(const std::string& name, const std::string& device, int64_t rank, int64_t world_size,
                                const std::string& process_group, const std::vector<std::string>& settings);
void group_destroy(const std::string& name);
void group_check(const std::string& name);
std::string group_info(const std::string& name);
std::string build_info();
// NCCL's version as a number and as text, and where it was found. Raises when it was not.
std::string nccl_info();
std::string nccl_unique_id();

}  // namespace sglang_symm::ops
