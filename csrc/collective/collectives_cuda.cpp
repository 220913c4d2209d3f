#include "collective/collectives_cuda.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace sglang_symm {

namespace {

constexpr int kMaxDevices = 64;

const std::byte* bytes_at(const void* p, size_t offset) {
  return static_cast<const std::byte*>(p) + offset;
}
std::byte* bytes_at(void* p, size_t offset) {
  return static_cast<std::byte*>(p) + offset;
}
bool is_aligned(const void* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

// The streams that the last waiting kernels of a device went to: the last eager one, the last captured one.
struct Chain {
  struct Last {
    cudaStream_t stream = nullptr;
    bool used = false;
  };
  std::mutex mutex;
  Last eager, captured;
};
Chain& chain_of(int device) {
  static std::array<Chain, kMaxDevices> chains;
  return chains[static_cast<size_t>(device) % kMaxDevices];
}

void copy_device(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  if (bytes == 0 || to == from) return;
  check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
}

}  // namespace

GridCuda grid_for(size_t chunks, int max_ctas) {
  // One chunk a thread as long as the grid allows, in the smallest CTAs that fit: they are brought in sooner.
  for (const size_t threads : {size_t{128}, size_t{256}, size_t{kMaxWorkers}}) {
    const size_t ctas = std::max<size_t>(1, (chunks + threads - 1) / threads);
    const size_t most = threads == 128 ? std::min(max_ctas, 64) : max_ctas;
    if (ctas <= most) return {static_cast<int>(ctas), static_cast<int>(threads)};
  }
  return {max_ctas, kMaxWorkers};
}

CollectivesCuda::CollectivesCuda(std::string group, std::shared_ptr<ArenaCuda> arena, SignalCpu& signal, int device,
                                 int rank, int world_size, const LayoutCuda& layout, int max_ctas)
    : group_(std::move(group)),
      arena_(std::move(arena)),
      signal_(signal),
      device_(device),
      rank_(rank),
      world_size_(world_size),
      layout_(layout),
      max_ctas_(std::min(max_ctas, kMaxCtas)) {
  const DeviceScope scope(device_);
  for (int r = 0; r < world_size_; r++) call_.window[r] = arena_->window(r);
  call_.rank = rank_;
  call_.world_size = world_size_;
  call_.first_seconds = signal_.deadlines().first_seconds;
  call_.seconds = signal_.deadlines().seconds;
  // Kernels poll the hosts' pads, and write this rank's, when something is wrong.
  const auto reach = [](const void* memory, RegisteredHost* registered) {
    void* host = const_cast<void*>(memory);
    check_cuda(cudaHostRegister(host, SignalCpu::segment_bytes(), cudaHostRegisterMapped | cudaHostRegisterPortable),
               "cudaHostRegister of a signal pad");
    registered->reset(host);
    void* device_pointer = nullptr;
    check_cuda(cudaHostGetDevicePointer(&device_pointer, host, 0), "cudaHostGetDevicePointer");
    return static_cast<std::byte*>(device_pointer);
  };
  Pad* own = signal_.own_pad();
  std::byte* own_device = reach(own, &own_pad_);
  const AbortRecord* record = signal_.abort_record();  // the first word of rank 0's pad
  const std::byte* record_device = rank_ == 0 ? own_device : reach(record, &record_pad_);
  const auto within = [&](const void* member) {
    return own_device + (static_cast<const std::byte*>(member) - reinterpret_cast<const std::byte*>(own));
  };
  call_.abort_state =
      reinterpret_cast<const uint32_t*>(record_device + (reinterpret_cast<const std::byte*>(&record->state) -
                                                         reinterpret_cast<const std::byte*>(record)));
  call_.left = reinterpret_cast<const uint32_t*>(within(&own->left));
  call_.record = reinterpret_cast<AbortRecord*>(within(&own->device));

  check_cuda(cudaMemset(arena_->base(), 0, layout_.slots), "cudaMemset of the pad");
  check_cuda(cudaMemset(arena_->base() + layout_.slots, 0xFF, 2 * layout_.slot_bytes), "cudaMemset of the slots");
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  prove_windows();
}

CollectivesCuda::~CollectivesCuda() {
  int before = -1;
  if (cudaGetDevice(&before) != cudaSuccess || cudaSetDevice(device_) != cudaSuccess) return;
  (void)cudaDeviceSynchronize();
  mark_broken(pad(rank_));
  own_pad_.reset();
  record_pad_.reset();
  (void)cudaGetLastError();
  (void)cudaSetDevice(before);
}

void CollectivesCuda::drain() {
  const DeviceScope scope(device_, std::nothrow);
  (void)cudaDeviceSynchronize();
}

// proof[s] of rank r's arena is a number that only s would write there; r says so, and s reads it back.
void CollectivesCuda::prove_windows() {
  const auto number = [](int writer, int owner) { return 0x5EED0000u + static_cast<uint32_t>(writer * 256 + owner); };
  Descriptor descriptor;
  descriptor.op = OpCode::rendezvous;
  signal_.exchange(descriptor);  // all arenas are cleared
  for (int r = 0; r < world_size_; r++) {
    const uint32_t mine = number(rank_, r);
    check_cuda(cudaMemcpy(&pad(r)->proof[rank_], &mine, sizeof mine, cudaMemcpyHostToDevice),
               "a write to a peer's GPU");
  }
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  signal_.exchange(descriptor);  // all have written
  for (int r = 0; r < world_size_; r++) {
    std::array<uint32_t, kMaxWorldSize> found{};
    check_cuda(cudaMemcpy(found.data(), pad(r)->proof, sizeof(uint32_t) * static_cast<size_t>(world_size_),
                          cudaMemcpyDeviceToHost),
               "a read from a peer's GPU");
    for (int s = 0; s < world_size_; s++) {
      if (found[static_cast<size_t>(s)] == number(s, r)) continue;
      fail(ErrorKind::communication, "group '", group_, "': rank ", rank_, " (cuda:", device_, ") reads ",
           found[static_cast<size_t>(s)], " from the arena of rank ", r, ", expected ", number(s, r), ", which rank ",
           s, " wrote: the memory that it maps is not rank ", r,
           "'s. Is peer access between these GPUs broken? (IOMMU, ", "ACS; nvidia-smi topo -p2p rw)");
    }
  }
}

CallCuda CollectivesCuda::call(const Descriptor& descriptor) const {
  CallCuda call = call_;
  call.descriptor = descriptor;
  call.offset_in = kNoOffset;
  call.offset_out = kNoOffset;
  return call;
}

SumCuda CollectivesCuda::sum(const Descriptor& descriptor) const {
  SumCuda sum{};
  sum.call = call(descriptor);
  sum.slots = layout_.slots;
  sum.slot_bytes = layout_.slot_bytes;
  return sum;
}

void CollectivesCuda::order(cudaStream_t stream) {
  const CaptureCuda capture = capture_of(stream);
  if (capture) arena_->keep_for(capture);
  Chain& chain = chain_of(device_);
  const std::lock_guard lock(chain.mutex);
  const auto wait_for = [&](Chain::Last* last) {
    if (!last->used || last->stream == stream) return;
    // Between a capture and what is outside of it there is nothing to wait for: a replay comes when its user says so.
    if (capture_of(last->stream).id != capture.id) return;
    cudaEvent_t event = nullptr;
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    cudaError_t code = cudaEventRecord(event, last->stream);
    if (code == cudaSuccess) code = cudaStreamWaitEvent(stream, event, 0);
    (void)cudaEventDestroy(event);
    check_cuda(code, "the event between two streams of a group");
    last->used = false;
  };
  if (!capture) wait_for(&chain.eager);  // a captured call in between makes nobody forget it
  wait_for(&chain.captured);
  (capture ? chain.captured : chain.eager) = {stream, true};
}

void CollectivesCuda::all_reduce(const Descriptor& descriptor, const AllReduceArgs& args, Stream handle) {
  const auto stream = static_cast<cudaStream_t>(handle);
  const DeviceScope scope(device_);
  order(stream);
  const size_t element = element_size(args.dtype);
  const size_t per_chunk = 16 / element;
  const size_t world = static_cast<size_t>(world_size_);
  const size_t one_shot_part = layout_.slot_bytes / world / 128 * 128;
  const size_t two_shot_part = layout_.slot_bytes / 2 / world / 128 * 128;
  const size_t direct_part = layout_.staging_bytes / world / 128 * 128;
  const size_t part = descriptor.algorithm == Algorithm::one_shot   ? one_shot_part
                      : descriptor.algorithm == Algorithm::two_shot ? two_shot_part
                                                                    : direct_part;
  const size_t most = (descriptor.algorithm == Algorithm::one_shot ? 1 : world) * (part / 16) * per_chunk;
  size_t begin = 0;
  do {  // a call of 0 elements sends its header too
    SumCuda round = sum(descriptor);
    round.in = bytes_at(args.in, begin * element);
    round.out = bytes_at(args.out, begin * element);
    round.count = std::min(most, args.count - begin);
    round.bias = args.bias;
    round.bias_length = args.bias_length;
    round.bias_start = begin;
    const size_t chunks = (round.count + per_chunk - 1) / per_chunk;
    round.part = part;
    round.share = static_cast<uint32_t>((chunks + world - 1) / world);
    if (descriptor.algorithm == Algorithm::one_shot || world_size_ == 1) {
      launch_one_shot(round, grid_for(chunks, max_ctas_), stream);
    } else if (descriptor.algorithm == Algorithm::two_shot) {
      launch_two_shot(round, grid_for(round.share, max_ctas_), stream);
    } else {
      const auto inside = [&](const void* p) {
        return is_aligned(p) ? arena_->offset_of(p, round.count * element) : std::nullopt;
      };
      if (peers_read_) round.call.offset_in = inside(round.in).value_or(kNoOffset);
      round.call.offset_out = inside(round.out).value_or(layout_.staging_out);
      round.slots = layout_.staging_in;
      launch_two_shot_direct(round, grid_for(round.share, max_ctas_), stream);
    }
    begin += round.count;
  } while (begin < args.count);
}

void CollectivesCuda::reduce_scatter(const Descriptor& descriptor, const void* in, void* out,
                                     std::span<const size_t> sizes, Stream handle) {
  const auto stream = static_cast<cudaStream_t>(handle);
  const DeviceScope scope(device_);
  const size_t element = element_size(descriptor.dtype);
  const size_t me = static_cast<size_t>(rank_);
  if (world_size_ == 1) {
    copy_device(out, in, sizes[0] * element, stream);
    return;
  }
  order(stream);
  std::array<size_t, kMaxWorldSize + 1> start{};
  std::partial_sum(sizes.begin(), sizes.end(), start.begin() + 1);
  const size_t part = layout_.slot_bytes / static_cast<size_t>(world_size_) / 128 * 128;
  const size_t most = part / element;
  const size_t longest = *std::max_element(sizes.begin(), sizes.end());
  size_t begin = 0;
  do {
    ScatterCuda round{};
    static_cast<SumCuda&>(round) = sum(descriptor);
    round.in = in;
    round.part = part;
    for (size_t r = 0; r < sizes.size(); r++) {
      round.part_begin[r] = start[r] + std::min(begin, sizes[r]);
      round.part_count[r] = std::min(most, sizes[r] - std::min(begin, sizes[r]));
    }
    round.out = bytes_at(out, std::min(begin, sizes[me]) * element);
    round.count = round.part_count[me];
    const size_t chunks = (std::min(most, longest - begin) * element + 15) / 16;
    launch_reduce_scatter(round, grid_for(chunks, max_ctas_), stream);
    begin += most;
  } while (begin < longest);
}

// Every rank's contribution to everybody's `out`; in rounds when it is larger than what holds it on the way.
void CollectivesCuda::copy(const Descriptor& descriptor, CopyCuda whole, bool direct, cudaStream_t stream) {
  const size_t world = static_cast<size_t>(world_size_);
  const size_t me = static_cast<size_t>(rank_);
  const size_t piece = direct ? layout_.staging_bytes / world / 16 * 16 : layout_.small_bytes;
  const size_t longest = *std::max_element(whole.bytes, whole.bytes + world);
  size_t total = 0;
  for (size_t r = 0; r < world; r++) total = std::max(total, whole.begin[r] + whole.bytes[r]);
  const auto out = is_aligned(whole.out) ? arena_->offset_of(whole.out, total) : std::nullopt;
  size_t begin = 0;
  do {
    CopyCuda round = whole;
    round.call = call(descriptor);
    round.small = layout_.small;
    round.small_bytes = layout_.small_bytes;
    for (size_t r = 0; r < world; r++) {
      const size_t done = std::min(begin, whole.bytes[r]);
      round.begin[r] = whole.begin[r] + done;
      round.bytes[r] = std::min(piece, whole.bytes[r] - done);
    }
    round.in = bytes_at(whole.in, std::min(begin, whole.bytes[me]));
    if (!direct) {
      launch_copy_small(round, max_ctas_, stream);
    } else {
      round.call.offset_in = out ? 0 : piece;  // the distance between contributions in staging
      round.call.offset_out = out.value_or(layout_.staging_out);
      launch_copy_direct(round, max_ctas_, stream);
    }
    begin += piece;
  } while (begin < longest);
}

void CollectivesCuda::all_gather(const Descriptor& descriptor, const void* in, void* out, std::span<const size_t> bytes,
                                 Stream handle) {
  const auto stream = static_cast<cudaStream_t>(handle);
  const DeviceScope scope(device_);
  if (world_size_ == 1) {
    copy_device(out, in, bytes[0], stream);
    return;
  }
  order(stream);
  CopyCuda whole{};
  whole.in = in;
  whole.out = out;
  size_t begin = 0;
  for (size_t r = 0; r < bytes.size(); r++) {
    whole.begin[r] = begin;
    whole.bytes[r] = bytes[r];
    begin += bytes[r];
  }
  copy(descriptor, whole, descriptor.algorithm != Algorithm::one_shot, stream);
}

void CollectivesCuda::broadcast(const Descriptor& descriptor, void* data, size_t bytes, int src, Stream handle) {
  const auto stream = static_cast<cudaStream_t>(handle);
  const DeviceScope scope(device_);
  if (world_size_ == 1) return;
  order(stream);
  CopyCuda whole{};
  whole.in = data;
  whole.out = data;
  whole.bytes[src] = bytes;
  whole.in_place = true;
  copy(descriptor, whole, descriptor.algorithm != Algorithm::one_shot, stream);
}

void CollectivesCuda::announce(const Descriptor& descriptor, Stream handle) {
  if (world_size_ == 1) return;
  const auto stream = static_cast<cudaStream_t>(handle);
  const DeviceScope scope(device_);
  order(stream);
  launch_headers(call(descriptor), stream);
}

}  // namespace sglang_symm
