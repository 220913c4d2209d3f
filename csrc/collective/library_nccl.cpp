#include "collective/library_nccl.h"

#include <dlfcn.h>

#include <cstdlib>

#include "base/error.h"

namespace sglang_symm::nccl {

namespace {

constexpr int kOldest = 22400;
constexpr const char* kAdvice =
    ". PyTorch for CUDA brings NCCL along; SGLANG_SYMM_NCCL_LIBRARY names another libnccl.so.2; nccl='0' "
    "(SGLANG_SYMM_NCCL=0) does without";

void* open(std::string* path) {
  const char* asked = std::getenv("SGLANG_SYMM_NCCL_LIBRARY");
  const bool given = asked != nullptr && *asked != 0;
  *path = given ? asked : "libnccl.so.2";
  void* handle = given ? nullptr : dlopen(path->c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) handle = dlopen(path->c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle != nullptr) return handle;
  const char* reason = dlerror();
  fail(ErrorKind::argument, "NCCL was not found: ", reason == nullptr ? *path : reason, kAdvice);
}

template <class Function>
void find(void* handle, const std::string& path, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  if (*function == nullptr) fail(ErrorKind::argument, "NCCL (", path, ") has no ", name, kAdvice);
}

Library load() {
  Library l{};
  void* handle = open(&l.path);
  int (*get_version)(int*) = nullptr;
  find(handle, l.path, "ncclGetVersion", &get_version);
  if (get_version(&l.version) != kSuccess || l.version < kOldest) {
    fail(ErrorKind::argument, "NCCL ", version_text(l.version), " (", l.path, "), expected ", version_text(kOldest),
         " or newer", kAdvice);
  }
  find(handle, l.path, "ncclGetUniqueId", &l.get_unique_id);
  find(handle, l.path, "ncclCommInitRankConfig", &l.comm_init_rank_config);
  find(handle, l.path, "ncclCommGetAsyncError", &l.comm_get_async_error);
  find(handle, l.path, "ncclCommAbort", &l.comm_abort);
  find(handle, l.path, "ncclAllReduce", &l.all_reduce);
  find(handle, l.path, "ncclReduce", &l.reduce);
  find(handle, l.path, "ncclBroadcast", &l.broadcast);
  find(handle, l.path, "ncclGroupStart", &l.group_start);
  find(handle, l.path, "ncclGroupEnd", &l.group_end);
  find(handle, l.path, "ncclGetErrorString", &l.get_error_string);
  find(handle, l.path, "ncclGetLastError", &l.get_last_error);
  l.comm_window_register = reinterpret_cast<decltype(l.comm_window_register)>(dlsym(handle, "ncclCommWindowRegister"));
  return l;
}

}  // namespace

const Library& library() {
  static const Library loaded = load();
  return loaded;
}

std::string version_text(int version) {
  return cat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

Reduction reduction_of(DType dtype, ReduceOp op) {
  constexpr int kSum = 0, kProduct = 1, kMax = 2, kMin = 3;
  const int known = op == ReduceOp::sum ? kSum : op == ReduceOp::product ? kProduct : op == ReduceOp::max ? kMax : kMin;
  switch (dtype) {
    case DType::int8:
      return {0, known, 1};
    case DType::uint8:
      return {1, known, 1};
    case DType::int32:
      return {2, known, 1};
    case DType::uint32:
      return {3, known, 1};
    case DType::int64:
      return {4, known, 1};
    case DType::uint64:
      return {5, known, 1};
    case DType::float16:
      return {6, known, 1};
    case DType::float32:
      return {7, known, 1};
    case DType::float64:
      return {8, known, 1};
    case DType::bfloat16:
      return {9, known, 1};
    case DType::boolean:  // bytes of 0 and 1: a sum is "or", a product "and"
      return {1, known == kSum ? kMax : known == kProduct ? kMin : known, 1};
    case DType::complex64:
      return {7, known, 2};
    case DType::complex128:
      return {8, known, 2};
    default:
      fail(ErrorKind::argument, "NCCL does no ", name(op), " of ", name(dtype));
  }
}

}  // namespace sglang_symm::nccl
