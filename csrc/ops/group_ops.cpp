// Making, finding and ending groups. Python exchanges the addresses through the process group's store in between.
#include <torch/version.h>

#include <cstdlib>

#ifdef SGLANG_SYMM_WITH_CUDA
#include "collective/collectives_nccl.h"
#endif
#include "collective/sum.h"
#include "ops/common.h"
#include "ops/ops.h"

namespace sglang_symm::ops {

namespace {

int checked_int(int64_t value, const char* what) {
  if (value < 0 || value > 1 << 20) fail(ErrorKind::argument, what, " ", value, ", expected 0 to ", 1 << 20);
  return static_cast<int>(value);
}

GroupConfig make_config(const std::string& name, const std::string& device, int64_t rank, int64_t world_size,
                        const std::string& process_group, const std::vector<std::string>& settings) {
  GroupConfig config;
  config.name = name;
  config.device = device;
  config.rank = checked_int(rank, "rank");
  config.world_size = checked_int(world_size, "world_size");
  if (config.rank >= config.world_size) {
    fail(ErrorKind::argument, "rank ", rank, " in group '", name, "' of ", world_size, " ranks");
  }
  config.process_group = process_group;
  config.apply(settings);
  return config;
}

}  // namespace

std::string group_listen(const std::string& name, const std::string& device, int64_t rank, int64_t world_size,
                         int64_t arena_bytes, const std::string& process_group,
                         const std::vector<std::string>& settings) {
  return guarded([&] {
    GroupConfig config = make_config(name, device, rank, world_size, process_group, settings);
    if (arena_bytes < 0) fail(ErrorKind::argument, "arena_bytes ", arena_bytes, ", expected a size in bytes");
    config.arena_bytes = static_cast<size_t>(arena_bytes);
    auto group = std::make_shared<Group>(config);
    GroupRegistry::instance().add(group);
    if (device == "cpu") install_cpu_allocator();
    install_interrupt_hook();
    return group->address();
  });
}

void group_connect(const std::string& name, const std::vector<std::string>& addresses, const std::string& nccl_id) {
  guarded([&] { GroupRegistry::instance().find(name)->connect(addresses, nccl_id); });
}

void group_create_process_group(const std::string& name, const std::string& device, int64_t rank, int64_t world_size,
                                const std::string& process_group, const std::vector<std::string>& settings) {
  guarded([&] {
    GroupConfig config = make_config(name, device, rank, world_size, process_group, settings);
    config.symmetric = false;
    GroupRegistry::instance().add(std::make_shared<Group>(config));
  });
}

void group_destroy(const std::string& name) {
  guarded([&] { GroupRegistry::instance().remove(name); });
}

void group_check(const std::string& name) {
  guarded([&] { GroupRegistry::instance().find(name)->check(); });
}

std::string group_info(const std::string& name) {
  return guarded([&] { return GroupRegistry::instance().find(name)->info_json(); });
}

std::string build_info() {
  return guarded([&] {
#ifdef SGLANG_SYMM_WITH_CUDA
    const char* cuda = "true";
#else
    const char* cuda = "false";
#endif
    return cat("{\"torch\": \"", TORCH_VERSION, "\", \"cuda\": ", cuda, ", \"compiler\": \"", __VERSION__,
               "\", \"cpu\": \"", name(best_cpu_path()), "\"}");
  });
}

#ifdef SGLANG_SYMM_WITH_CUDA
std::string nccl_info() {
  return guarded([&] {
    const nccl::Library& nccl = nccl::library();
    return cat("{\"version\": ", nccl.version, ", \"text\": \"", nccl::version_text(nccl.version), "\"}");
  });
}

std::string nccl_unique_id() {
  return guarded([&] { return sglang_symm::nccl_unique_id(); });
}
#else
namespace {

[[noreturn]] void no_cuda() {
  guarded([] { fail(ErrorKind::argument, "NCCL: this library was built without CUDA. nccl='0' does without"); });
  std::abort();
}

}  // namespace

std::string nccl_info() {
  no_cuda();
}
std::string nccl_unique_id() {
  no_cuda();
}
#endif

}  // namespace sglang_symm::ops
