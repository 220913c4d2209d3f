// NCCL's library found at run time: the one that torch has loaded, or the one that SGLANG_SYMM_NCCL_LIBRARY names.
// Nothing links with it and no header of it is needed: what is used here has not changed since NCCL 2.24.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "base/dtype.h"

namespace sglang_symm::nccl {

enum Result : int { kSuccess = 0, kInProgress = 7 };  // others are errors

struct UniqueId {
  char bytes[128];
};

// ncclConfig_t as of 2.18. NCCL reads `size` and `version` and gives newer fields their defaults.
struct Config {
  size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef;
  unsigned version = 21800;
  int blocking = 0;  // calls return at once; what became of them is asked of the communicator
  int cluster_size = kUndefined;
  int min_ctas = kUndefined;
  int max_ctas = kUndefined;
  const char* net_name = nullptr;
  int split_share = kUndefined;

  static constexpr int kUndefined = -2147483647 - 1;
};

using Comm = struct OpaqueComm*;
using Window = struct OpaqueWindow*;
constexpr int kSymmetricWindow = 1;

struct Library {
  int version;  // 22809 for 2.28.9
  std::string path;
  int (*get_unique_id)(UniqueId*);
  int (*comm_init_rank_config)(Comm*, int world_size, UniqueId, int rank, Config*);
  int (*comm_get_async_error)(Comm, int* result);
  int (*comm_abort)(Comm);
  int (*all_reduce)(const void* in, void* out, size_t count, int dtype, int op, Comm, cudaStream_t);
  int (*reduce)(const void* in, void* out, size_t count, int dtype, int op, int root, Comm, cudaStream_t);
  int (*broadcast)(const void* in, void* out, size_t count, int dtype, int root, Comm, cudaStream_t);
  int (*group_start)();
  int (*group_end)();
  const char* (*get_error_string)(int result);
  const char* (*get_last_error)(Comm);
  int (*comm_window_register)(Comm, void* memory, size_t bytes, Window*, int flags);  // null before 2.27
};

// Raises ErrorKind::argument, with what to do, when there is none or it is too old. Loaded once a process.
const Library& library();

std::string version_text(int version);

// How NCCL calls a reduction. `count`: elements of NCCL's dtype for one of ours. Only for reduced_by_nccl(dtype, op).
struct Reduction {
  int dtype;
  int op;
  size_t count;
};
Reduction reduction_of(DType dtype, ReduceOp op);
constexpr int kBytes = 1;  // NCCL's dtype of copies, uint8

}  // namespace sglang_symm::nccl
