// What the link between two GPUs carries, by what moves it: the floor under every push of this library.
//
//     nvcc -O3 -std=c++20 -gencode=arch=compute_90a,code=sm_90a -o link benchmarks/link.cu && ./link
//
// One process, two GPUs with peer access, both sending at once (and one alone). GB/s of a direction, the median of 7
// rounds of back-to-back launches: at 64 MB the link's pace, at 4 MB with a launch and its last flight.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <vector>

#include "cuda_check.h"

namespace {

constexpr int kSms = 132, kShared = 64 << 10;

__global__ void __launch_bounds__(512) stores(uint4* to, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    to[i] = make_uint4(1, 2, 3, 4);
  }
}

__global__ void __launch_bounds__(512) loads(const uint4* from, size_t count, uint4* sink) {
  uint4 all = {};
#pragma unroll 4
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from + i));
    all.x ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (all.x == 0x12345) *sink = all;
}

// Out of shared memory, by the copy engine of an SM; a warp, `piece` bytes a copy.
__global__ void __launch_bounds__(32) copies(char* to, size_t bytes, int piece) {
  extern __shared__ __align__(128) char shared[];
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const size_t step = size_t{gridDim.x} * kShared;
  for (size_t begin = blockIdx.x * size_t{kShared}; begin < bytes; begin += step) {
    for (int i = static_cast<int>(threadIdx.x) * piece; i < kShared; i += 32 * piece) {
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to + begin + i), "r"(from + i),
                   "r"(piece)
                   : "memory");
    }
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 1;" ::: "memory");
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

struct Gpu {
  char *window, *own;
  uint4* sink;
  cudaStream_t stream;
  cudaEvent_t begin, end;
};

using Send = std::function<void(const Gpu& from, const Gpu& to)>;

double microseconds(Gpu (&gpu)[2], int senders, int calls, const Send& send) {
  const auto each = [&](const auto& act) {
    for (int d = 0; d < senders; d++) {
      CHECK(cudaSetDevice(d));
      act(d);
    }
  };
  std::vector<double> rounds;
  for (int round = 0; round < 7; round++) {
    for (int i = -3; i < calls; i++) {
      each([&](int d) {
        if (i == 0) CHECK(cudaEventRecord(gpu[d].begin, gpu[d].stream));
        send(gpu[d], gpu[1 - d]);
      });
    }
    double slowest = 0;
    each([&](int d) { CHECK(cudaEventRecord(gpu[d].end, gpu[d].stream)); });
    each([&](int d) {
      float ms = 0;
      CHECK(cudaStreamSynchronize(gpu[d].stream));
      CHECK(cudaEventElapsedTime(&ms, gpu[d].begin, gpu[d].end));
      slowest = std::max(slowest, 1e3 * ms / calls);
    });
    rounds.push_back(slowest);
  }
  std::sort(rounds.begin(), rounds.end());
  return rounds[rounds.size() / 2];
}

}  // namespace

int main() {
  int gpus = 0;
  CHECK(cudaGetDeviceCount(&gpus));
  if (gpus < 2) {
    std::fprintf(stderr, "link: expected two GPUs, got %d\n", gpus);
    return 2;
  }
  constexpr size_t kMost = size_t{64} << 20;
  Gpu gpu[2];
  for (int d = 0; d < 2; d++) {
    CHECK(cudaSetDevice(d));
    CHECK(cudaDeviceEnablePeerAccess(1 - d, 0));
    CHECK(cudaMalloc(&gpu[d].window, kMost));
    CHECK(cudaMalloc(&gpu[d].own, kMost));
    CHECK(cudaMalloc(&gpu[d].sink, sizeof(uint4)));
    CHECK(cudaStreamCreateWithFlags(&gpu[d].stream, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&gpu[d].begin));
    CHECK(cudaEventCreate(&gpu[d].end));
    CHECK(cudaFuncSetAttribute(copies, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  }
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s, GB/s a direction\n%-34s %8s %8s %8s\n", properties.name, "", "64 MB", "one way", "4 MB");
  const auto row = [&](const char* name, const std::function<Send(size_t)>& of) {
    const size_t little = size_t{4} << 20;
    const double both = microseconds(gpu, 2, 20, of(kMost)), one = microseconds(gpu, 1, 20, of(kMost));
    const double short_one = microseconds(gpu, 2, 100, of(little));
    std::printf("%-34s %8.1f %8.1f %8.1f\n", name, kMost / both / 1e3, kMost / one / 1e3, little / short_one / 1e3);
  };
  row("copy engine of the GPU", [](size_t bytes) {
    return [bytes](const Gpu& from, const Gpu& to) {
      CHECK(cudaMemcpyAsync(to.window, from.own, bytes, cudaMemcpyDefault, from.stream));
    };
  });
  for (const int ctas : {16, 64, kSms}) {
    char name[64];
    std::snprintf(name, sizeof name, "stores of 16 bytes, %d CTAs", ctas);
    row(name, [ctas](size_t bytes) {
      return [=](const Gpu& from, const Gpu& to) {
        stores<<<ctas, 512, 0, from.stream>>>(reinterpret_cast<uint4*>(to.window), bytes / 16);
      };
    });
  }
  for (const int piece : {256, 512, 8192}) {
    char name[64];
    std::snprintf(name, sizeof name, "bulk copies of %d bytes", piece);
    row(name, [piece](size_t bytes) {
      return
          [=](const Gpu& from, const Gpu& to) { copies<<<kSms, 32, kShared, from.stream>>>(to.window, bytes, piece); };
    });
  }
  row("loads of 16 bytes", [](size_t bytes) {
    return [=](const Gpu& from, const Gpu& to) {
      loads<<<kSms, 512, 0, from.stream>>>(reinterpret_cast<const uint4*>(to.window), bytes / 16, from.sink);
    };
  });
  return 0;
}
