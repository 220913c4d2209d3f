// all_reduce from C++, over the core alone: what the protocol costs without Python and PyTorch.
//
//   all_reduce [RANKS] [SECONDS_A_SIZE]
//
// Ranks are processes, bound to a core each when there are enough, as mpirun binds them. For each size: median and 10th
// percentile over batches of the slowest rank's time a call, in place, tensors in the arena, for each algorithm. The
// result is checked in every batch. `make cpp-benchmark` runs it.
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "collective/sum.h"
#include "group/group.h"

namespace {

using namespace sglang_symm;

constexpr int kBatches = 40;

struct Shared {
  std::atomic<int> arrived;
  char address[kMaxWorldSize][256];
  double us[kMaxWorldSize][kBatches];
};

void bind(int rank, int world) {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof cores, &cores) != 0 || CPU_COUNT(&cores) < world) return;
  int seen = 0;
  for (int core = 0; core < CPU_SETSIZE; core++) {
    if (!CPU_ISSET(core, &cores) || seen++ != rank) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    sched_setaffinity(0, sizeof one, &one);
    return;
  }
}

void run_rank(Shared* shared, int rank, int world, double seconds) {
  GroupConfig config;
  config.name = "bench";
  config.rank = rank;
  config.world_size = world;
  config.arena_bytes = 256 << 20;
  Group group(config);
  std::snprintf(shared->address[rank], sizeof shared->address[rank], "%s", group.address().c_str());
  shared->arrived.fetch_add(1);
  while (shared->arrived.load() < world) usleep(100);
  group.connect(std::vector<std::string>(shared->address, shared->address + world));

  for (size_t bytes = 512; bytes <= (32 << 20); bytes *= 2) {
    const size_t count = bytes / sizeof(float);
    auto* x = static_cast<float*>(group.arena()->allocate(bytes));
    double best[3];
    for (int a = 0; a < 3; a++) {
      Descriptor descriptor;
      descriptor.op = OpCode::all_reduce;
      descriptor.dtype = DType::float32;
      descriptor.algorithm = static_cast<Algorithm>(a);
      descriptor.count = count;
      const AllReduceArgs args{x, x, count, DType::float32};
      const double guess_us = 1.0 + static_cast<double>(bytes) / 2000;
      const int calls = std::max(2, static_cast<int>(seconds * 1e6 / guess_us / kBatches));
      for (int batch = 0; batch < kBatches; batch++) {
        std::fill(x, x + count, 0.0f);
        x[count - 1] = 1.0f / 1024;
        group.collectives().exchange({.op = OpCode::barrier});
        const int64_t start = now_ns();
        for (int call = 0; call < calls; call++) group.collectives().all_reduce(descriptor, args);
        shared->us[rank][batch] = static_cast<double>(now_ns() - start) / 1e3 / calls;
        float expected = 1.0f / 1024;
        for (int call = 0; call < calls; call++) expected *= static_cast<float>(world);
        if (x[count - 1] != expected) fail(ErrorKind::system, "wrong sum: ", x[count - 1], ", expected ", expected);
      }
      group.collectives().exchange({.op = OpCode::barrier});
      if (rank == 0) {
        std::vector<double> slowest(kBatches);
        for (int batch = 0; batch < kBatches; batch++) {
          for (int r = 0; r < world; r++) {
            slowest[static_cast<size_t>(batch)] = std::max(slowest[static_cast<size_t>(batch)], shared->us[r][batch]);
          }
        }
        std::sort(slowest.begin(), slowest.end());
        best[a] = slowest[kBatches / 2];
        std::printf("%10zu  %-16s median %10.2f us  p10 %10.2f us  busbw %6.2f GB/s\n", bytes,
                    name(descriptor.algorithm), best[a], slowest[kBatches / 10],
                    2.0 * (world - 1) / world * static_cast<double>(bytes) / slowest[kBatches / 2] / 1e3);
        std::fflush(stdout);
      }
      group.collectives().exchange({.op = OpCode::barrier});
    }
    group.arena()->free(x);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int world = argc > 1 ? std::atoi(argv[1]) : 2;
  const double seconds = argc > 2 ? std::atof(argv[2]) : 0.2;
  if (world < 1 || world > kMaxWorldSize || !(seconds > 0)) {
    std::fprintf(stderr, "usage: all_reduce [RANKS 1..%d] [SECONDS_A_SIZE]\n", kMaxWorldSize);
    return 2;
  }
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 1;
  auto* shared = static_cast<Shared*>(memory);
  std::printf("all_reduce, float32, %d processes, in place, in the arena, %s\n", world, name(best_cpu_path()));
  std::fflush(stdout);
  std::vector<pid_t> children;
  for (int rank = 0; rank < world; rank++) {
    const pid_t child = fork();
    if (child == 0) {
      try {
        bind(rank, world);
        run_rank(shared, rank, world, seconds);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
        _exit(1);
      }
      _exit(0);
    }
    children.push_back(child);
  }
  int status = 0;
  for (const pid_t child : children) {
    int one = 0;
    waitpid(child, &one, 0);
    status |= one;
  }
  return status == 0 ? 0 : 1;
}
