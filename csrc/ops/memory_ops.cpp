// Symmetric memory for tensors: `empty`, use_symmetric_memory on the CPU, peers' views.
#include <c10/core/CPUAllocator.h>

#include <algorithm>

#include "ops/common.h"
#include "ops/ops.h"

namespace sglang_symm::ops {

namespace {

// The groups whose use_symmetric_memory this thread is inside of, innermost last.
thread_local std::vector<std::shared_ptr<Group>> scopes;
// The innermost, if it is a CPU group, for allocate(): outside of any context an allocation costs this one read.
thread_local Group* current = nullptr;

void set_current() {
  Group* innermost = scopes.empty() ? nullptr : scopes.back().get();
  current = innermost != nullptr && innermost->config().device == "cpu" ? innermost : nullptr;
}

// PyTorch's CPU allocator with an arena in front. Blocks are told apart by address, because raw_deleter() gets no more.
class ArenaFirstAllocator final : public c10::Allocator {
 public:
  explicit ArenaFirstAllocator(c10::Allocator* next) : next_(next) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (current != nullptr && bytes != 0) {
      void* block = guarded([&] { return current->allocate_output(bytes, /*required=*/false); });
      if (block != nullptr) return {block, block, &free_block, c10::Device(c10::DeviceType::CPU)};
      warn_full_once(*current, bytes);
    }
    return next_->allocate(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return next_->raw_deleter() == nullptr ? nullptr : &free_any; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

  static c10::Allocator* next;

 private:
  static void free_block(void* pointer) { ArenaRegistry::instance().free(pointer); }
  static void free_any(void* pointer) {
    if (pointer != nullptr && !ArenaRegistry::instance().free(pointer)) next->raw_deleter()(pointer);
  }

  c10::Allocator* next_;
};

c10::Allocator* ArenaFirstAllocator::next = nullptr;

}  // namespace

Group* current_cuda_group() {
  Group* innermost = scopes.empty() ? nullptr : scopes.back().get();
  return innermost != nullptr && innermost->config().device != "cpu" ? innermost : nullptr;
}

void install_cpu_allocator() {
  static const bool installed = [] {
    ArenaFirstAllocator::next = c10::GetAllocator(c10::DeviceType::CPU);
    // Never deleted: tensors are freed through it while the process exits.
    c10::SetAllocator(c10::DeviceType::CPU, new ArenaFirstAllocator(ArenaFirstAllocator::next), /*priority=*/100);
    return true;
  }();
  (void)installed;
}

void enter_symmetric_memory(const std::string& name) {
  guarded([&] {
    auto group = GroupRegistry::instance().find(name);
    if (!group->arena()) {
      fail(ErrorKind::argument, "use_symmetric_memory: group '", name, "' has communicator 'process_group', hence no ",
           "symmetric memory. Expected a group of communicator 'symm'");
    }
    scopes.push_back(std::move(group));
    set_current();
  });
}

void exit_symmetric_memory(const std::string& name) {
  guarded([&] {
    const auto found =
        std::find_if(scopes.rbegin(), scopes.rend(), [&](const auto& group) { return group->config().name == name; });
    const bool innermost = found == scopes.rbegin() && found != scopes.rend();
    const std::string inside = scopes.empty() ? "none" : "'" + scopes.back()->config().name + "'";
    // Whatever the order, what was left is left: no thread stays inside for good.
    if (found != scopes.rend()) scopes.erase(std::next(found).base());
    set_current();
    if (!innermost) {
      fail(ErrorKind::argument, "use_symmetric_memory: left '", name, "', but this thread is inside ", inside,
           ". Enter and leave it in one thread, innermost first");
    }
  });
}

int64_t capture_id(const std::string& name) {
  return guarded([&] {
    auto group = GroupRegistry::instance().find(name);
    return group->arena() ? static_cast<int64_t>(group->arena()->capture_in(current_stream(*group))) : 0;
  });
}

at::Tensor empty(at::SymIntArrayRef size, const std::string& name, at::ScalarType dtype, at::Device device) {
  return guarded([&] {
    const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(size);
    auto group = GroupRegistry::instance().find(name);
    if (device.str() != group->config().device) {
      fail(ErrorKind::argument, "empty: group '", name, "' is on ", group->config().device, ", asked for ",
           device.str());
    }
    if (!group->arena()) {
      fail(ErrorKind::argument, "empty: group '", name,
           "' has communicator 'process_group', hence no symmetric memory");
    }
    if (c10::isQIntType(dtype)) fail(ErrorKind::argument, "empty: expected a plain dtype, got ", dtype_name(dtype));
    const auto options = at::TensorOptions().dtype(dtype).device(device);
    const size_t bytes = checked_bytes(sizes, options.dtype().itemsize(), "empty");
    return wrap_block(group->allocate_output(bytes, /*required=*/true, current_stream(*group)), bytes, sizes, options);
  });
}

bool in_arena(const at::Tensor& x, const std::string& name) {
  return guarded([&] {
    auto group = GroupRegistry::instance().find(name);
    return group->arena() && group->arena()->contains(x.const_data_ptr(), x.nbytes());
  });
}

std::vector<int64_t> rendezvous(const at::Tensor& x, const std::string& name) {
  return guarded([&] {
    auto group = group_for(x, name, "rendezvous");
    if (!x.is_contiguous())
      fail(ErrorKind::argument, "rendezvous: expected a contiguous tensor, got strides ", x.strides());
    Collectives& collectives = group->collectives();
    const auto offset = group->arena()->offset_of(x.const_data_ptr(), x.nbytes());
    Descriptor descriptor;
    descriptor.op = OpCode::rendezvous;
    descriptor.dtype = to_dtype(x.scalar_type());
    descriptor.count =
        static_cast<uint64_t>(x.numel());  // equal on all ranks: so a rank knows how far peers' views reach
    const std::lock_guard lock(group->order);
    const auto offsets = collectives.exchange(descriptor, offset.value_or(kNoOffset));
    count_call(*group, Algorithm::one_shot);
    std::string outside;
    for (size_t r = 0; r < offsets.size(); r++) {
      if (offsets[r] == kNoOffset) outside += (outside.empty() ? "" : ", ") + std::to_string(r);
    }
    if (!outside.empty()) {  // known to all ranks: all raise
      fail(ErrorKind::argument, "rendezvous in group '", name, "': the tensor of rank(s) ", outside,
           " is not in symmetric memory. Make it with sglang_symm.empty or under use_symmetric_memory");
    }
    return std::vector<int64_t>(offsets.begin(), offsets.end());
  });
}

at::Tensor peer_view(const std::string& name, int64_t peer, int64_t offset, at::IntArrayRef size,
                     at::ScalarType dtype) {
  return guarded([&] {
    auto group = GroupRegistry::instance().find(name);
    if (!group->arena()) fail(ErrorKind::argument, "group '", name, "' has no symmetric memory");
    if (peer < 0 || peer >= group->world_size()) {
      fail(ErrorKind::argument, "rank ", peer, " in group '", name, "' of ", group->world_size(), " ranks");
    }
    if (c10::isQIntType(dtype))
      fail(ErrorKind::argument, "a peer's view: expected a plain dtype, got ", dtype_name(dtype));
    const auto options = at::TensorOptions().dtype(dtype).device(at::Device(group->config().device));
    const auto bytes = static_cast<int64_t>(checked_bytes(size, options.dtype().itemsize(), "peer view"));
    const int64_t arena_bytes = static_cast<int64_t>(group->arena()->bytes());
    if (offset < 0 || offset > arena_bytes || bytes > arena_bytes - offset) {
      fail(ErrorKind::argument, "a view of ", bytes, " bytes at offset ", offset, " of rank ", peer, "'s arena of ",
           arena_bytes, " bytes");
    }
    if (offset % static_cast<int64_t>(options.dtype().itemsize()) != 0) {
      fail(ErrorKind::argument, "offset ", offset, " is no multiple of the size of ", dtype_name(dtype));
    }
    // The view keeps the arena mapped, not the peer's block alive: that is the peer's to do.
    // A peer's GPU memory is used from this rank's device, whatever device it lies on.
    return at::for_blob(group->arena()->window(static_cast<int>(peer)) + offset, size)
        .deleter([arena = group->arena()](void*) {})
        .target_device(options.device())
        .options(options)
        .make_tensor();
  });
}

}  // namespace sglang_symm::ops
