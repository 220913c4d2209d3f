// The pace at which a GPU's memory can be read: the floor under a GEMM of few tokens, which reads its weight once.
//
//     nvcc -O3 -std=c++20 -gencode=arch=compute_90a,code=sm_90a -o memory benchmarks/memory.cu && ./memory
//
// GB/s: the slope of the time between 64 and 224 MiB, so that no launch is in it, over 4 copies in turn, which L2 does
// not hold. Medians and quartiles of 15 rounds. By loads of 16 bytes, and by bulk copies into shared memory.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <vector>

#include "cuda_check.h"

namespace {

constexpr int kPiece = 16 << 10, kCopies = 4, kRounds = 15, kCalls = 20;
constexpr size_t kLittle = size_t{64} << 20, kMuch = size_t{224} << 20;

__global__ void __launch_bounds__(512) loads(const uint4* from, size_t count, uint4* sink) {
  uint32_t all = 0;
#pragma unroll 8
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from + i));
    all ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (all == 0x12345) sink->x = all;
}

// One thread a CTA: a ring of `stages` pieces, each of a CTA's own part of the bytes or taken in turn.
__global__ void __launch_bounds__(32) copies(const char* from, size_t bytes, int stages, bool in_turn) {
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t full[16];
  if (threadIdx.x != 0) return;
  const auto address = [](const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); };
  for (int s = 0; s < stages; s++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&full[s])));
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  const size_t pieces = bytes / kPiece, ctas = gridDim.x, share = (pieces + ctas - 1) / ctas;
  const size_t first = min(pieces, blockIdx.x * share), mine = min(share, pieces - first);
  const size_t count = in_turn ? (pieces - blockIdx.x + ctas - 1) / ctas : mine;
  for (size_t i = 0; i < count + stages; i++) {
    const auto stage = static_cast<int>(i % stages);
    const uint32_t barrier = address(&full[stage]);
    if (i >= static_cast<size_t>(stages)) {
      const uint32_t parity = (i / stages - 1) & 1;
      asm volatile(
          "{\n.reg .pred p;\nagain_%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again_%=;\n}" ::
              "r"(barrier),
          "r"(parity)
          : "memory");
    }
    if (i >= count) continue;
    const size_t piece = in_turn ? blockIdx.x + i * ctas : first + i;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(kPiece) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     address(shared) + stage * kPiece),
                 "l"(from + piece * kPiece), "r"(kPiece), "r"(barrier)
                 : "memory");
  }
}

using Read = std::function<void(const char* from, size_t bytes)>;

// Microseconds of a call.
double time_of(const char* memory, size_t bytes, const Read& read) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  for (int i = -3; i < kCalls; i++) {
    if (i == 0) CHECK(cudaEventRecord(begin));
    read(memory + static_cast<size_t>((i + 3) % kCopies) * bytes, bytes);
  }
  CHECK(cudaEventRecord(end));
  CHECK(cudaEventSynchronize(end));
  float ms = 0;
  CHECK(cudaEventElapsedTime(&ms, begin, end));
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  return 1e3 * ms / kCalls;
}

}  // namespace

int main() {
  char* memory = nullptr;
  uint4* sink = nullptr;
  CHECK(cudaMalloc(&memory, kCopies * kMuch));
  CHECK(cudaMalloc(&sink, sizeof(uint4)));
  CHECK(cudaMemset(memory, 1, kCopies * kMuch));
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  const int sms = properties.multiProcessorCount;
  CHECK(cudaFuncSetAttribute(copies, cudaFuncAttributeMaxDynamicSharedMemorySize, 12 * kPiece));
  std::printf("%s, %d SMs\n%-40s %16s %22s\n", properties.name, sms, "", "us of 64 MiB", "GB/s (quartiles)");
  const auto row = [&](const char* name, const Read& read) {
    std::array<std::vector<double>, 2> found;
    for (int round = 0; round < kRounds; round++) {
      const double little = time_of(memory, kLittle, read), much = time_of(memory, kMuch, read);
      found[0].push_back(little);
      found[1].push_back((kMuch - kLittle) / (much - little) / 1e3);
    }
    for (auto& list : found) std::sort(list.begin(), list.end());
    std::printf("%-40s %16.1f %8.0f (%5.0f - %5.0f)\n", name, found[0][kRounds / 2], found[1][kRounds / 2],
                found[1][kRounds / 4], found[1][3 * kRounds / 4]);
  };
  for (const int ctas : {1, 2, 4}) {
    char name[64];
    std::snprintf(name, sizeof name, "loads of 16 bytes, %d CTAs an SM", ctas);
    row(name, [&](const char* from, size_t bytes) {
      loads<<<ctas * sms, 512>>>(reinterpret_cast<const uint4*>(from), bytes / 16, sink);
    });
  }
  for (const bool in_turn : {false, true}) {
    for (const int stages : {4, 8, 12}) {
      char name[64];
      std::snprintf(name, sizeof name, "copies of 16 KiB%s, %d under way", in_turn ? " in turn" : "", stages);
      row(name, [&](const char* from, size_t bytes) {
        copies<<<sms, 32, static_cast<size_t>(stages) * kPiece>>>(from, bytes, stages, in_turn);
      });
    }
  }
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());
  return 0;
}
