#include "collective/communicator_nccl.h"

#include <algorithm>
#include <chrono>
#include <future>

#include "base/driver_cuda.h"

namespace sglang_symm {

namespace {

constexpr auto kWatchPeriod = std::chrono::milliseconds(10);
constexpr auto kPollPeriod = std::chrono::microseconds(20);
constexpr auto kPatience = std::chrono::seconds(5);  // for NCCL to free its memory

}  // namespace

CommunicatorNccl::CommunicatorNccl(const Members& members, const nccl::UniqueId& id, SignalCpu& signal, PadCuda* pad)
    : members_(members), nccl_(nccl::library()), signal_(signal), pad_(pad) {
  const DeviceScope scope(members_.device);
  check_cuda(cudaHostAlloc(reinterpret_cast<void**>(&words_), sizeof(Words), cudaHostAllocMapped), "cudaHostAlloc");
  *words_ = {0, 0, 1};
  try {
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    const Deadline deadline(signal_.deadlines().first_seconds);
    nccl::Config config;
    const int result = nccl_.comm_init_rank_config(&comm_, members_.world_size, id, members_.rank, &config);
    settle(result, "the creation of its NCCL communicator", deadline);
  } catch (...) {
    signal_.fail_call(AbortKind::refused, Descriptor{}, 0, 0);  // the others wait for this rank
    abort(/*wait=*/true);
    if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
    (void)cudaFreeHost(words_);
    throw;
  }
  watcher_ = std::thread([this] { watch(); });
}

CommunicatorNccl::~CommunicatorNccl() {
  {
    const std::lock_guard lock(stop_mutex_);
    stopping_ = true;
  }
  stop_.notify_all();
  watcher_.join();
  const std::lock_guard lock(mutex_);
  abort(/*wait=*/!captured_);  // with a graph that is alive it would be in vain
  (void)cudaStreamDestroy(stream_);
  (void)cudaFreeHost(words_);
  (void)cudaGetLastError();
}

void CommunicatorNccl::require(int result, const std::string& what) {
  if (result == nccl::kSuccess) return;
  const char* detail = comm_ == nullptr ? nullptr : nccl_.get_last_error(comm_);
  const std::string text = cat(nccl_.get_error_string(result), detail == nullptr || *detail == 0 ? "" : ": ",
                               detail == nullptr ? "" : detail);
  abort(/*wait=*/false);
  signal_.check();  // a dead peer, if that is known, is the better reason
  fail(ErrorKind::communication, "group '", members_.group, "', rank ", members_.rank, ": ", what, " failed: NCCL ",
       nccl::version_text(nccl_.version), " says ", text,
       ". NCCL_DEBUG=WARN shows more; nccl='0' (SGLANG_SYMM_NCCL=0) does without NCCL");
}

void CommunicatorNccl::settle(int result, const std::string& what, const Deadline& deadline) {
  require(result == nccl::kInProgress ? nccl::kSuccess : result, what);
  // The communicator is asked even when the call says that all is done: ncclCommWindowRegister says so too early.
  for (;;) {
    require(nccl_.comm_get_async_error(comm_, &result), what);
    if (result != nccl::kInProgress) break;
    if (!signal_.failure().empty()) {
      abort(/*wait=*/false);
      signal_.check();
    }
    if (deadline.passed()) {
      abort(/*wait=*/false);
      fail(ErrorKind::communication, "group '", members_.group, "', rank ", members_.rank, ": ", what,
           " did not end within its deadline. Is a rank stopped, or on another code path? A longer one: timeout=, ",
           "first_timeout=");
    }
    std::this_thread::sleep_for(kPollPeriod);
  }
  require(result, what);
}

void CommunicatorNccl::register_window(void* memory, size_t bytes) {
  const std::lock_guard lock(mutex_);
  const DeviceScope scope(members_.device);
  nccl::Window window = nullptr;
  if (nccl_.comm_window_register != nullptr) {
    const Deadline deadline(signal_.deadlines().first_seconds);
    settle(nccl_.comm_window_register(comm_, memory, bytes, &window, nccl::kSymmetricWindow),
           "the registration of its arena as an NCCL window", deadline);
  }
  if (window != nullptr) return;
  fail(ErrorKind::communication, "group '", members_.group, "', rank ", members_.rank, ": NCCL ",
       nccl::version_text(nccl_.version), " made no window of the arena (it needs 2.27, peer access and ",
       "NCCL_CUMEM_ENABLE=1). nccl='1' (SGLANG_SYMM_NCCL=1) does without the window");
}

void CommunicatorNccl::call(const Descriptor& descriptor, bool captured,
                            const std::function<int(nccl::Comm)>& enqueue) {
  const std::lock_guard lock(mutex_);
  if (comm_ == nullptr) {
    signal_.check();
    fail(ErrorKind::communication, "group '", members_.group, "': its NCCL communicator was aborted");
  }
  captured_ |= captured;
  last_ = descriptor;
  const std::string what = to_string(descriptor) + " through NCCL";
  try {
    settle(enqueue(comm_), what, Deadline(signal_.deadlines().first_seconds));
  } catch (const Error&) {
    signal_.fail_call(AbortKind::refused, descriptor, std::max(words_->begun, 1u), 0);
    throw;
  }
}

void CommunicatorNccl::watch() {
  uint32_t call = 0;
  Deadline deadline(signal_.deadlines().seconds);
  for (;;) {
    {
      std::unique_lock lock(stop_mutex_);
      if (stop_.wait_for(lock, kWatchPeriod, [&] { return stopping_; })) return;
    }
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock() || comm_ == nullptr) continue;  // held: call() looks itself
    const uint32_t begun = *static_cast<volatile uint32_t*>(&words_->begun);
    const uint32_t ended = *static_cast<volatile uint32_t*>(&words_->ended);
    if (begun != call || begun == ended) {
      call = begun;
      deadline = Deadline(signal_.deadlines().seconds);
    }
    int error = nccl::kSuccess;
    if (deadline.passed()) {
      signal_.fail_call(AbortKind::unfinished, last_, begun, signal_.deadlines().seconds);
    } else if (nccl_.comm_get_async_error(comm_, &error) != nccl::kSuccess ||
               (error != nccl::kSuccess && error != nccl::kInProgress)) {
      signal_.fail_call(AbortKind::refused, last_, begun, 0);
    }
    if (!signal_.failure().empty()) abort(/*wait=*/false);
  }
}

void CommunicatorNccl::abort(bool wait) {
  if (comm_ == nullptr) return;
  const OutsideOfCaptures outside;
  int before = -1;
  (void)cudaGetDevice(&before);
  (void)cudaSetDevice(members_.device);
  // Before kernels leave: the one behind them looks at it.
  if (stream_ != nullptr) {
    for (GateCuda& gate : pad_->gate) {
      (void)cudaMemcpyAsync(&gate.broken, &words_->one, sizeof words_->one, cudaMemcpyHostToDevice, stream_);
    }
    (void)cudaStreamSynchronize(stream_);
  }
  std::packaged_task<void()> task([nccl = &nccl_, comm = comm_, device = members_.device] {
    (void)cudaSetDevice(device);
    (void)nccl->comm_abort(comm);
  });
  const std::future<void> done = task.get_future();
  std::thread(std::move(task)).detach();
  comm_ = nullptr;
  if (wait) (void)done.wait_for(kPatience);
  (void)cudaGetLastError();
  (void)cudaSetDevice(before);
}

}  // namespace sglang_symm
