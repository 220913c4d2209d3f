#include "collective/collectives_nccl.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "collective/bracket_cuda.h"

namespace sglang_symm {

namespace {

const std::byte* bytes_at(const void* p, size_t offset) {
  return static_cast<const std::byte*>(p) + offset;
}
std::byte* bytes_at(void* p, size_t offset) {
  return static_cast<std::byte*>(p) + offset;
}

nccl::UniqueId parse(const std::string& text) {
  nccl::UniqueId id{};
  if (text.size() != 2 * sizeof id.bytes) {
    fail(ErrorKind::argument, "an NCCL identifier of ", text.size(), " digits, expected ", 2 * sizeof id.bytes);
  }
  for (size_t i = 0; i < sizeof id.bytes; i++) {
    id.bytes[i] = static_cast<char>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  }
  return id;
}

// NCCL's calls of one group, in flight together.
template <class Calls>
int together(const nccl::Library& nccl, const Calls& calls) {
  const int started = nccl.group_start();
  if (started != nccl::kSuccess) return started;
  int failed = nccl::kSuccess;
  calls([&](int result) {
    if (result != nccl::kSuccess && result != nccl::kInProgress) failed = result;
  });
  const int ended = nccl.group_end();
  return failed != nccl::kSuccess ? failed : ended;
}

}  // namespace

std::string nccl_unique_id() {
  const nccl::Library& nccl = nccl::library();
  nccl::UniqueId id{};
  const int result = nccl.get_unique_id(&id);
  if (result != nccl::kSuccess) {
    const char* detail = nccl.get_last_error(nullptr);
    fail(ErrorKind::system, "ncclGetUniqueId: ", nccl.get_error_string(result), " ", detail == nullptr ? "" : detail,
         ". Is there a network interface (NCCL_SOCKET_IFNAME)?");
  }
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const char c : id.bytes) {
    text += kDigits[static_cast<unsigned char>(c) >> 4];
    text += kDigits[static_cast<unsigned char>(c) & 15];
  }
  return text;
}

CollectivesNccl::CollectivesNccl(const Options& options, const CommunicatorNccl::Members& members,
                                 const std::shared_ptr<ArenaCuda>& arena, SignalCpu& signal, const LayoutCuda& layout,
                                 int max_ctas)
    : CollectivesCuda(members.group, arena, signal, members.device, members.rank, members.world_size, layout, max_ctas),
      rank_(members.rank) {
  auto* pad = reinterpret_cast<PadCuda*>(arena->window(members.rank));
  communicator_ = std::make_unique<CommunicatorNccl>(members, parse(options.unique_id), signal, pad);
  if (options.window) communicator_->register_window(arena->base(), arena->bytes());
}

CollectivesNccl::~CollectivesNccl() {
  int before = -1;
  if (cudaGetDevice(&before) != cudaSuccess) return;
  (void)cudaSetDevice(device());
  (void)cudaDeviceSynchronize();
  communicator_.reset();
  (void)cudaSetDevice(before);
}

void CollectivesNccl::call(const Descriptor& descriptor, void* out, size_t bytes, bool empty, Stream handle,
                           const std::function<int(nccl::Comm, cudaStream_t)>& enqueue) {
  const auto stream = static_cast<cudaStream_t>(handle);
  const DeviceScope scope(device());
  CommunicatorNccl::Words* words = communicator_->words();
  const BracketCuda bracket{enter(descriptor, stream), &words->begun, &words->ended, out, bytes};
  launch_open(bracket, stream);
  const bool captured = static_cast<bool>(capture_of(stream));
  if (!empty) communicator_->call(descriptor, captured, [&](nccl::Comm comm) { return enqueue(comm, stream); });
  launch_close(bracket, stream);
}

void CollectivesNccl::all_reduce(const Descriptor& descriptor, const AllReduceArgs& args, Stream stream) {
  if (descriptor.algorithm != Algorithm::nccl) return CollectivesCuda::all_reduce(descriptor, args, stream);
  const nccl::Reduction r = nccl::reduction_of(args.dtype, descriptor.reduce_op());
  const size_t bytes = args.count * element_size(args.dtype);
  call(descriptor, args.out, bytes, bytes == 0, stream, [&](nccl::Comm comm, cudaStream_t s) {
    return nccl::library().all_reduce(args.in, args.out, args.count * r.count, r.dtype, r.op, comm, s);
  });
}

void CollectivesNccl::reduce_scatter(const Descriptor& descriptor, const void* in, void* out,
                                     std::span<const size_t> sizes, Stream stream) {
  if (descriptor.algorithm != Algorithm::nccl) {
    return CollectivesCuda::reduce_scatter(descriptor, in, out, sizes, stream);
  }
  const nccl::Library& nccl = nccl::library();
  const nccl::Reduction r = nccl::reduction_of(descriptor.dtype, descriptor.reduce_op());
  const size_t element = element_size(descriptor.dtype);
  const size_t mine = sizes[static_cast<size_t>(rank_)] * element;
  const auto enqueue = [&](nccl::Comm comm, cudaStream_t s) {
    return together(nccl, [&](const auto& note) {
      size_t begin = 0;
      for (size_t root = 0; root < sizes.size(); begin += sizes[root++]) {
        if (sizes[root] == 0) continue;
        note(nccl.reduce(bytes_at(in, begin * element), out, sizes[root] * r.count, r.dtype, r.op,
                         static_cast<int>(root), comm, s));
      }
    });
  };
  const size_t all = std::accumulate(sizes.begin(), sizes.end(), size_t{0});
  call(descriptor, out, mine, all == 0, stream, enqueue);
}

void CollectivesNccl::all_gather(const Descriptor& descriptor, const void* in, void* out, std::span<const size_t> bytes,
                                 Stream stream) {
  if (descriptor.algorithm != Algorithm::nccl) {
    return CollectivesCuda::all_gather(descriptor, in, out, bytes, stream);
  }
  const nccl::Library& nccl = nccl::library();
  const size_t all = std::accumulate(bytes.begin(), bytes.end(), size_t{0});
  call(descriptor, out, all, all == 0, stream, [&](nccl::Comm comm, cudaStream_t s) {
    return together(nccl, [&](const auto& note) {
      size_t begin = 0;
      for (size_t root = 0; root < bytes.size(); begin += bytes[root++]) {
        if (bytes[root] == 0) continue;
        std::byte* to = bytes_at(out, begin);
        const void* from = static_cast<int>(root) == rank_ ? in : to;
        note(nccl.broadcast(from, to, bytes[root], nccl::kBytes, static_cast<int>(root), comm, s));
      }
    });
  });
}

void CollectivesNccl::broadcast(const Descriptor& descriptor, void* data, size_t bytes, int src, Stream stream) {
  if (descriptor.algorithm != Algorithm::nccl) {
    return CollectivesCuda::broadcast(descriptor, data, bytes, src, stream);
  }
  call(descriptor, data, bytes, bytes == 0, stream, [&](nccl::Comm comm, cudaStream_t s) {
    return nccl::library().broadcast(data, data, bytes, nccl::kBytes, src, comm, s);
  });
}

}  // namespace sglang_symm
