// Runs the library's CUDA kernels on a CPU, for tests: their sources are compiled by the C++ compiler, with the headers
// of this folder in the place of CUDA's and of the two that hold assembler (base/ptx_cuda.cuh, fused/ptx_sm90.cuh).
//
//   a CUDA thread   a fiber; one runs at a time, and which one is drawn from a seed: a failure can be repeated
//   a CTA           an OS thread that owns its fibers, so `__shared__` is thread_local
//   a GPU           a stream; kernels launched into it overlap as programmatic launch lets them
//
// What is harsher than a GPU: threads of a warp do not run in step; a rank may stand still while others run on; relaxed
// stores to the system's memory reach others late, in any order, in halves of 16 bytes, until a release, a fence or
// the kernel's end. What is kinder: plain stores arrive at once, loads are in program order. Time is counted in steps.
#pragma once

#include <sched.h>
#include <semaphore.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace emulator {

constexpr int kWarp = 32;
// A step takes long, so that a deadline which ends a kernel's wait soon is far away for hosts, whose time is real.
constexpr uint64_t kStepNs = 100'000;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

class Cta;
class Grid;
class Machine;

// A matrix product that was issued and not waited for: see hopper.h.
struct Product {
  float* sums;    // of this thread
  uint64_t a, b;  // operands in shared memory
  int columns;
  float (*number)(uint16_t bits);
  unsigned group;
};

// A bulk copy to global memory.
struct CopyOut {
  bool committed = false, read = false, arrived = false;
};

// One CUDA thread.
struct Fiber {
  Cta* cta = nullptr;
  unsigned thread = 0;
  bool ended = false;
  const void* looked_at = nullptr;  // by the last load: a second look at the same place is a poll
  std::vector<Product> products;
  unsigned groups = 0;  // of products, committed
  std::vector<std::shared_ptr<CopyOut>> copies;
  std::vector<uint32_t> unfenced;  // units of shared memory that it stored, no fence since
  std::byte* stack = nullptr;
  ucontext_t begin{};  // how it is entered the first time; from then on by `context`, which costs no system call
  jmp_buf context{};
  bool entered = false;
};

// Counts arrivals of fibers, and holds those that wait.
struct Barrier {
  unsigned arrived = 0;
  bool all = true;
  bool result = true;  // of the last round
  std::vector<Fiber*> waiting;
};

// A store that has not reached the memory of others.
struct Pending {
  std::byte* to;
  std::byte bytes[8];
  unsigned size;
};

// Who waits sleeps at once. std::binary_semaphore yields the core first, at times to another program for milliseconds.
class Semaphore {
 public:
  Semaphore() { sem_init(&semaphore_, 0, 0); }
  ~Semaphore() { sem_destroy(&semaphore_); }
  Semaphore(const Semaphore&) = delete;
  void release() { sem_post(&semaphore_); }
  void acquire() {
    while (sem_wait(&semaphore_) != 0) {  // a signal came
    }
  }

 private:
  sem_t semaphore_;
};

class Cta {
 public:
  Cta(Grid& grid, unsigned index);
  ~Cta();

  Grid& grid;
  const Index block;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;
  std::vector<Fiber*> polling;  // they have looked, and found nothing: their turn comes more rarely
  unsigned live = 0;
  unsigned weight = 16;  // how often it runs
  bool lets_next_in = false;
  std::vector<std::byte> shared;  // dynamic shared memory
  std::vector<uint16_t> stored;   // thread + 1 that stored these 16 bytes of it, no fence for copies since
  unsigned copies = 0;            // of the bulk engine that it issued and that are under way
  Barrier everybody, named[16];
  Barrier cluster;             // of its first CTA
  size_t cluster_arrived = 0;  // there
  struct Waiting {
    const void* barrier;  // an mbarrier
    Fiber* fiber;
  };
  std::vector<Waiting> waiting;
  struct Warp {
    Barrier barrier;
    uint32_t values[kWarp] = {};
  };
  std::vector<Warp> warps;
  std::deque<Pending> stores;
  const std::byte* anchor = nullptr;  // where this OS thread's thread_local memory lies

  void commit(size_t index);  // one of `stores`
  void flush();

 private:
  void work();
  void run_slices();
  void resume(Fiber* fiber);
  static void enter(unsigned low, unsigned high);
  friend class Machine;
  friend void block();

  Semaphore go_;
  unsigned slices_ = 0;
  bool leave_ = false;
  ucontext_t unused_{};
  jmp_buf scheduler_{};
  std::thread thread_;
};

struct Stream;

class Grid {
 public:
  std::function<void()> kernel;
  Index dim, block_dim;
  unsigned cluster = 1;
  size_t shared_bytes = 0;
  bool programmatic = false;
  Stream* stream = nullptr;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<Fiber*> waiting_for_previous;
  bool started = false;
};

// A GPU's only stream.
struct Stream {
  Stream() = default;
  ~Stream();
  Stream(const Stream&) = delete;
  std::deque<std::unique_ptr<Grid>> grids;  // not ended, oldest first
  unsigned weight = 16;                     // how often it runs
};

class Machine {
 public:
  explicit Machine(uint64_t seed);
  ~Machine();
  Machine(const Machine&) = delete;

  static Machine& now();  // the one that exists

  // Runs until every launched kernel has ended. Throws std::runtime_error when nothing can go on, or after `most`
  // steps.
  void run(uint64_t most = 10'000'000);

  void launch(Stream* stream, std::unique_ptr<Grid> grid);
  void forget(Stream* stream) { std::erase(streams_, stream); }
  // Something that happens later, at a time of the machine's choosing: a copy of the bulk engine.
  void later(std::function<void()> action) { actions_.push_back(std::move(action)); }

  // Less than `below`, which is less than 2^32. (SplitMix64)
  uint64_t draw(uint64_t below) {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return ((z ^ z >> 31) >> 32) * below >> 32;
  }
  uint64_t time_ns() const { return 1'000'000 + steps_ * kStepNs; }
  void wake(Fiber* fiber) { fiber->cta->ready.push_back(fiber); }
  // A kernel is launched, a CTA has ended or lets the next kernel in.
  void grids_changed() { grids_change_ = true; }
  void fail(const std::string& what) { failure_ = what; }  // run() throws it

  std::byte* take_stack();
  void give_stack(std::byte* stack) { stacks_.push_back(stack); }

 private:
  void start_and_end_grids();
  Cta* next();                   // nullptr: run() must look at the grids, or all is done
  Cta* next_behind_a_cta();      // the same, on a CTA's thread
  std::string describe() const;  // who waits
  friend class Cta;

  uint64_t state_;
  cpu_set_t cores_{};  // before
  uint64_t steps_ = 0, most_ = 0, end_ = 0;
  uint64_t change_ = 0, pace_ = 1;  // when weights and pace are drawn again; how rarely actions come
  bool grids_change_ = false, done_ = false;
  Semaphore back_;  // run() has the processor again
  std::string failure_;
  std::exception_ptr error_;  // of next() on a CTA's thread
  std::vector<Stream*> streams_;
  std::vector<Cta*> runnable_;
  std::vector<std::function<void()>> actions_;
  std::vector<std::byte*> stacks_;
};

// ---- what kernels call, through the headers beside this one ----

Fiber& self();
void yield(bool polls = false);  // lets others run
void block();                    // until somebody wakes this fiber

// What a GPU would punish, or leave undefined: the run ends with this message.
[[noreturn]] void fault(const std::string& what);

bool arrive(Barrier& barrier, unsigned threads, bool value = true);  // true when it was the last
bool sync(Barrier& barrier, unsigned threads, bool value = true);    // the conjunction of all values
// All lanes of a warp give a value and get everybody's.
const uint32_t* exchange(uint32_t value);

void store(void* to, const void* from, size_t bytes);  // relaxed
void load(void* to, const void* from, size_t bytes);
void fence();  // everything that this CTA stored reaches everybody

Cta& cta_of_cluster(unsigned rank_in_cluster);
// `p`, an address of this CTA's `__shared__` or dynamic memory, in another CTA of the cluster.
void* in_cta(void* p, unsigned rank_in_cluster);

}  // namespace emulator
