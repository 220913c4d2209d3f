// Every schema on one screen. `group` is a group's unique name; ranks are ranks in the group.
//
// Registered for all backends at once: each op checks that its tensors are on the group's device and says so in a
// sentence, where a missing kernel would only name a dispatch key. Gradients are in autograd.cpp, fake kernels in
// sglang_symm/_fake.py.
#include <torch/library.h>

#include "ops/ops.h"

TORCH_LIBRARY(sglang_symm, m) {
  m.def("all_reduce(Tensor x, str group, str op=\"sum\") -> Tensor");
  m.def("all_reduce_(Tensor(a!) x, str group, str op=\"sum\") -> ()");
  m.def("reduce_scatter(Tensor x, str group, int dim=0, SymInt[]? sizes=None) -> Tensor");
  m.def("all_gather(Tensor x, str group, int dim=0, SymInt[]? sizes=None) -> Tensor");
  m.def("broadcast_(Tensor(a!) x, int src, str group) -> ()");
  m.def("barrier(Tensor(a!) token, str group) -> ()");
  m.def("empty(SymInt[] size, str group, *, ScalarType dtype, Device device) -> Tensor");
  m.def(
      "row_parallel_linear(Tensor x, Tensor weight, Tensor? bias, str group, bool symmetric=True, "
      "bool static_weight=False) -> Tensor");
  m.def("row_parallel_linear_out(Tensor x, Tensor weight, Tensor? bias, str group, Tensor(a!) out) -> ()");
  m.def(
      "all_reduce_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str group) "
      "-> (Tensor y, Tensor residual_out)");
  m.def(
      "row_parallel_linear_add_rms_norm(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor norm_weight, "
      "float eps, str group, bool static_weight=False, *, bool symmetric=True) -> (Tensor, Tensor)");
  m.def("_row_parallel_linear_reference(Tensor x, Tensor weight, Tensor? bias, str group) -> Tensor");
  m.def("_in_arena(Tensor x, str group) -> bool");
  m.def("_rendezvous(Tensor x, str group) -> int[]");

  // No tensor goes in: called by the thin Python only.
  namespace ops = sglang_symm::ops;
  m.def(
      "_group_listen(str name, str device, int rank, int world_size, int arena_bytes, str process_group, "
      "str[] settings) -> str",
      &ops::group_listen);
  m.def("_group_connect(str name, str[] addresses, str nccl_id=\"\") -> ()", &ops::group_connect);
  m.def(
      "_group_create_process_group(str name, str device, int rank, int world_size, str process_group, "
      "str[] settings) -> ()",
      &ops::group_create_process_group);
  m.def("_group_destroy(str name) -> ()", &ops::group_destroy);
  m.def("_group_check(str name) -> ()", &ops::group_check);
  m.def("_group_info(str name) -> str", &ops::group_info);
  m.def("_build_info() -> str", &ops::build_info);
  m.def("_nccl_info() -> str", &ops::nccl_info);
  m.def("_nccl_unique_id() -> str", &ops::nccl_unique_id);
  m.def("_enter_symmetric_memory(str group) -> ()", &ops::enter_symmetric_memory);
  m.def("_exit_symmetric_memory(str group) -> ()", &ops::exit_symmetric_memory);
  m.def("_capture_id(str group) -> int", &ops::capture_id);
  m.def("_peer_view(str group, int peer, int offset, int[] size, ScalarType dtype) -> Tensor", &ops::peer_view);
#ifdef SGLANG_SYMM_TRACE
  m.def("_prefill_trace() -> (Tensor times, str[] stamps)", &ops::prefill_trace);
#endif
}

TORCH_LIBRARY_IMPL(sglang_symm, CompositeExplicitAutograd, m) {
  namespace ops = sglang_symm::ops;
  m.impl("all_reduce", &ops::all_reduce);
  m.impl("all_reduce_", &ops::all_reduce_);
  m.impl("reduce_scatter", &ops::reduce_scatter);
  m.impl("all_gather", &ops::all_gather);
  m.impl("broadcast_", &ops::broadcast_);
  m.impl("barrier", &ops::barrier);
  m.impl("empty", &ops::empty);
  m.impl("row_parallel_linear", &ops::row_parallel_linear);
  m.impl("row_parallel_linear_out", &ops::row_parallel_linear_out);
  m.impl("all_reduce_add_rms_norm", &ops::all_reduce_add_rms_norm);
  m.impl("row_parallel_linear_add_rms_norm", &ops::row_parallel_linear_add_rms_norm);
  m.impl("_row_parallel_linear_reference", &ops::row_parallel_linear_reference);
  m.impl("_in_arena", &ops::in_arena);
  m.impl("_rendezvous", &ops::rendezvous);
}
