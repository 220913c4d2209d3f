#include "collective/collectives_cpu.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>

#include "base/error.h"

namespace sglang_symm {

namespace {

constexpr size_t kShareAlignment = 64;  // elements: shares begin on cache lines when the tensor does

std::byte* bytes_at(void* p, size_t offset) {
  return static_cast<std::byte*>(p) + offset;
}
const std::byte* bytes_at(const void* p, size_t offset) {
  return static_cast<const std::byte*>(p) + offset;
}

void copy_bytes(void* to, const void* from, size_t bytes) {
  if (bytes != 0 && to != from) std::memcpy(to, from, bytes);
}

}  // namespace

CollectivesCpu::CollectivesCpu(Arena& arena, SignalCpu& signal, int rank, int world_size, size_t slot_bytes,
                               CpuPath path)
    : arena_(arena), signal_(signal), rank_(rank), world_size_(world_size), slot_bytes_(slot_bytes), path_(path) {}

// Looked at before it is written: after a failure a slow peer may still read the slot of this parity.
std::byte* CollectivesCpu::slot() const {
  signal_.require_healthy();
  return arena_.base() + static_cast<size_t>(signal_.next_parity()) * slot_bytes_;
}

// A peer's range, checked against its arena: a damaged header must not become a wild access.
std::byte* CollectivesCpu::at(const Call& call, int peer, uint64_t offset, size_t bytes) const {
  if (offset > arena_.bytes() || bytes > arena_.bytes() - offset) signal_.damaged(call, peer);
  return arena_.window(peer) + offset;
}

// Where peers find `bytes` at `in`: the tensor itself when that is allowed and it lies in the arena, else a copy in the
// slot.
uint64_t CollectivesCpu::stage(const void* in, size_t bytes, bool direct) {
  if (direct) {
    if (const auto offset = arena_.offset_of(in, bytes)) return *offset;
  }
  std::byte* staged = slot();
  copy_bytes(staged, in, bytes);
  return static_cast<uint64_t>(staged - arena_.base());
}

void CollectivesCpu::all_reduce(const Descriptor& descriptor, const AllReduceArgs& args, Stream) {
  const size_t element = element_size(args.dtype);
  if (world_size_ == 1) {
    const void* source = args.in;
    void* output = args.out;
    sum_in_rank_order({&source, 1, &output, 1, args.count, args.dtype, args.bias, args.bias_length, 0}, path_);
    return;
  }
  const size_t most = slot_bytes_ / element / kShareAlignment * kShareAlignment;
  size_t begin = 0;
  do {  // a call of 0 elements sends its header too
    AllReduceArgs round = args;
    round.in = bytes_at(args.in, begin * element);
    round.out = bytes_at(args.out, begin * element);
    round.count = std::min(most, args.count - begin);
    if (descriptor.algorithm == Algorithm::one_shot) {
      one_shot_round(descriptor, round, begin);
    } else {
      two_shot_round(descriptor, round, begin);
    }
    begin += round.count;
  } while (begin < args.count);
}

void CollectivesCpu::one_shot_round(const Descriptor& descriptor, const AllReduceArgs& round, size_t bias_start) {
  const size_t bytes = round.count * element_size(round.dtype);
  const uint64_t offset = stage(round.in, bytes, false);
  const Call call = signal_.start(descriptor, offset, kNoOffset);
  signal_.arrive(call);
  std::array<const void*, kMaxWorldSize> sources;
  for (int r = 0; r < world_size_; r++) {
    sources[static_cast<size_t>(r)] = r == rank_ ? round.in : at(call, r, signal_.header(call, r).offset_in, bytes);
  }
  void* output = round.out;
  sum_in_rank_order(
      {sources.data(), world_size_, &output, 1, round.count, round.dtype, round.bias, round.bias_length, bias_start},
      path_);
}

void CollectivesCpu::two_shot_round(const Descriptor& descriptor, const AllReduceArgs& round, size_t bias_start) {
  const size_t element = element_size(round.dtype);
  const size_t bytes = round.count * element;
  const bool direct = descriptor.algorithm == Algorithm::two_shot_direct;
  std::byte* staging = slot();
  const uint64_t in = stage(round.in, bytes, direct);
  const auto out_inside = direct ? arena_.offset_of(round.out, bytes) : std::nullopt;
  const uint64_t out = out_inside ? *out_inside : static_cast<uint64_t>(staging - arena_.base());
  const Call call = signal_.start(descriptor, in, out);
  signal_.arrive(call);

  // Rank r owns elements [r share, (r + 1) share). It alone touches them, in every rank's input and output.
  const size_t world = static_cast<size_t>(world_size_);
  const size_t share = (round.count / world / kShareAlignment + 1) * kShareAlignment;
  const size_t lo = std::min(round.count, static_cast<size_t>(rank_) * share);
  const size_t hi = std::min(round.count, lo + share);
  std::array<const void*, kMaxWorldSize> sources;
  std::array<void*, kMaxWorldSize> outputs;
  for (int r = 0; r < world_size_; r++) {
    const uint64_t offset_in = r == rank_ ? in : signal_.header(call, r).offset_in;
    const uint64_t offset_out = r == rank_ ? out : signal_.header(call, r).offset_out;
    sources[static_cast<size_t>(r)] = at(call, r, offset_in, bytes) + lo * element;
    outputs[static_cast<size_t>(r)] = at(call, r, offset_out, bytes) + lo * element;
  }
  sum_in_rank_order({sources.data(), world_size_, outputs.data(), world_size_, hi - lo, round.dtype, round.bias,
                     round.bias_length, bias_start + lo},
                    path_);
  signal_.finish(call);
  if (!out_inside) copy_bytes(round.out, staging, bytes);
}

void CollectivesCpu::reduce_scatter(const Descriptor& descriptor, const void* in, void* out,
                                    std::span<const size_t> sizes, Stream) {
  const size_t element = element_size(descriptor.dtype);
  const size_t me = static_cast<size_t>(rank_);
  std::array<size_t, kMaxWorldSize + 1> start{};
  std::partial_sum(sizes.begin(), sizes.end(), start.begin() + 1);
  const size_t world = static_cast<size_t>(world_size_);
  if (world_size_ == 1) {
    copy_bytes(out, in, sizes[0] * element);
    return;
  }
  const bool direct = descriptor.algorithm != Algorithm::one_shot;
  const auto inside =
      descriptor.algorithm == Algorithm::two_shot_direct ? arena_.offset_of(in, start[world] * element) : std::nullopt;
  // A slot holds a piece of every part. offset_out carries the distance between them: 0 says "in place, as in the
  // tensor".
  const size_t piece = slot_bytes_ / world / element / kShareAlignment * kShareAlignment;
  const size_t longest = *std::max_element(sizes.begin(), sizes.end());
  size_t begin = 0;
  do {
    if (!inside) {
      for (size_t r = 0; r < world; r++) {
        if (begin >= sizes[r]) continue;
        copy_bytes(slot() + r * piece * element, bytes_at(in, (start[r] + begin) * element),
                   std::min(piece, sizes[r] - begin) * element);
      }
    }
    const uint64_t offset = inside ? *inside : static_cast<uint64_t>(slot() - arena_.base());
    const Call call = signal_.start(descriptor, offset, inside ? 0 : piece * element);
    signal_.arrive(call);
    if (begin < sizes[me]) {
      const size_t n = std::min(piece, sizes[me] - begin);
      std::array<const void*, kMaxWorldSize> sources;
      for (int r = 0; r < world_size_; r++) {
        if (r == rank_) {
          sources[me] = bytes_at(in, (start[me] + begin) * element);
          continue;
        }
        const Header& header = signal_.header(call, r);
        const uint64_t distance = header.offset_out == 0 ? (start[me] + begin) * element : me * header.offset_out;
        sources[static_cast<size_t>(r)] = at(call, r, header.offset_in + distance, n * element);
      }
      void* output = bytes_at(out, begin * element);
      sum_in_rank_order({sources.data(), world_size_, &output, 1, n, descriptor.dtype}, path_);
    }
    if (direct) signal_.finish(call);
    begin += piece;
  } while (begin < longest);
}

void CollectivesCpu::all_gather(const Descriptor& descriptor, const void* in, void* out, std::span<const size_t> bytes,
                                Stream) {
  const size_t me = static_cast<size_t>(rank_);
  std::array<size_t, kMaxWorldSize + 1> start{};
  std::partial_sum(bytes.begin(), bytes.end(), start.begin() + 1);
  copy_bytes(bytes_at(out, start[me]), in, bytes[me]);
  if (world_size_ == 1) return;
  const bool direct = descriptor.algorithm == Algorithm::two_shot_direct;
  const size_t longest = *std::max_element(bytes.begin(), bytes.end());
  size_t begin = 0;
  do {
    const auto length = [&](size_t r) { return begin < bytes[r] ? std::min(slot_bytes_, bytes[r] - begin) : 0; };
    const uint64_t offset = length(me) == 0 ? kNoOffset : stage(bytes_at(in, begin), length(me), direct);
    const Call call = signal_.start(descriptor, offset, kNoOffset);
    signal_.arrive(call);
    for (int step = 1; step < world_size_; step++) {  // the next rank first: not everybody reads rank 0 at once
      const int r = (rank_ + step) % world_size_;
      const size_t n = length(static_cast<size_t>(r));
      if (n == 0) continue;
      copy_bytes(bytes_at(out, start[static_cast<size_t>(r)] + begin),
                 at(call, r, signal_.header(call, r).offset_in, n), n);
    }
    if (descriptor.algorithm != Algorithm::one_shot) signal_.finish(call);
    begin += slot_bytes_;
  } while (begin < longest);
}

void CollectivesCpu::broadcast(const Descriptor& descriptor, void* data, size_t bytes, int src, Stream) {
  if (world_size_ == 1) return;
  const bool direct = descriptor.algorithm == Algorithm::two_shot_direct;
  size_t begin = 0;
  do {
    const size_t n = std::min(slot_bytes_, bytes - begin);
    std::byte* part = bytes_at(data, begin);
    const Call call = signal_.start(descriptor, rank_ == src ? stage(part, n, direct) : kNoOffset, kNoOffset);
    signal_.arrive(call);
    if (rank_ != src) copy_bytes(part, at(call, src, signal_.header(call, src).offset_in, n), n);
    if (descriptor.algorithm != Algorithm::one_shot) signal_.finish(call);
    begin += n;
  } while (begin < bytes);
}

}  // namespace sglang_symm
