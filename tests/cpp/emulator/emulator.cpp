#include "emulator.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace emulator {

namespace {

constexpr size_t kStack = 128 << 10;
constexpr size_t kMostStores = 64;  // of a CTA, under way
constexpr unsigned kPollsAre = 16;  // times rarer than other steps
thread_local Fiber* running = nullptr;
thread_local std::byte anchor_of_thread[16];
Machine* machine = nullptr;

uint64_t weight_of(const Cta& cta) {
  return uint64_t{cta.grid.stream->weight} * cta.weight * (cta.ready.empty() ? 1 : kPollsAre);
}

bool overlap(const std::byte* a, size_t a_size, const std::byte* b, size_t b_size) {
  return a < b + b_size && b < a + a_size;
}

}  // namespace

// ---- CTA ----

Cta::Cta(Grid& owner, unsigned index)
    : grid(owner), block{index, 0, 0}, fibers(owner.block_dim.x), shared(owner.shared_bytes, std::byte{0xFF}) {
  warps.resize((fibers.size() + kWarp - 1) / kWarp);
  live = static_cast<unsigned>(fibers.size());
  for (unsigned t = 0; t < fibers.size(); t++) {
    fibers[t].cta = this;
    fibers[t].thread = t;
    fibers[t].stack = Machine::now().take_stack();
    ready.push_back(&fibers[t]);
  }
  thread_ = std::thread([this] { work(); });
  Machine::now().back_.acquire();
}

Cta::~Cta() {
  leave_ = true;
  go_.release();
  thread_.join();
  for (Fiber& fiber : fibers) Machine::now().give_stack(fiber.stack);
}

void Cta::enter(unsigned low, unsigned high) {
  auto* fiber = reinterpret_cast<Fiber*>(static_cast<uintptr_t>(low) | static_cast<uintptr_t>(high) << 32);
  fiber->cta->grid.kernel();
  fiber->ended = true;
  _longjmp(fiber->cta->scheduler_, 1);
}

void Cta::work() {
  anchor = anchor_of_thread;
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.begin);
    fiber.begin.uc_stack.ss_sp = fiber.stack;
    fiber.begin.uc_stack.ss_size = kStack;
    fiber.begin.uc_link = nullptr;
    const auto bits = reinterpret_cast<uintptr_t>(&fiber);
    makecontext(&fiber.begin, reinterpret_cast<void (*)()>(&Cta::enter), 2, static_cast<unsigned>(bits),
                static_cast<unsigned>(bits >> 32));
  }
  Machine::now().back_.release();
  for (;;) {
    go_.acquire();
    if (leave_) return;
    Cta* next = this;
    while (next == this) {
      run_slices();
      next = Machine::now().next_behind_a_cta();
    }
    (next == nullptr ? Machine::now().back_ : next->go_).release();
  }
}

void Cta::run_slices() {
  for (unsigned i = 0; i < slices_ && !(ready.empty() && polling.empty()); i++) {
    const bool poll = ready.empty() || (!polling.empty() && Machine::now().draw(kPollsAre) == 0);
    auto& from = poll ? polling : ready;
    const size_t chosen = Machine::now().draw(from.size());
    std::swap(from[chosen], from.back());
    Fiber* fiber = from.back();
    from.pop_back();
    running = fiber;
    resume(fiber);
    running = nullptr;
    if (fiber->ended && --live == 0) Machine::now().grids_changed();
  }
  Machine::now().steps_ += slices_;
}

// Apart from run_slices(), whose variables a jump must not touch.
void Cta::resume(Fiber* fiber) {
  if (_setjmp(scheduler_) != 0) return;  // the fiber has given the processor back
  if (fiber->entered) _longjmp(fiber->context, 1);
  fiber->entered = true;
  swapcontext(&unused_, &fiber->begin);
}

void Cta::commit(size_t index) {
  // An older store to the same place goes first.
  for (size_t i = 0; i < index; i++) {
    if (overlap(stores[i].to, stores[i].size, stores[index].to, stores[index].size)) {
      index = i;
      break;
    }
  }
  const Pending store = stores[index];
  stores.erase(stores.begin() + static_cast<std::ptrdiff_t>(index));
  std::memcpy(store.to, store.bytes, store.size);
}

void Cta::flush() {
  for (const Pending& store : stores) std::memcpy(store.to, store.bytes, store.size);
  stores.clear();
}

// ---- machine ----

Machine::Machine(uint64_t seed) : state_(seed) {
  if (machine != nullptr) throw std::logic_error("one emulator::Machine at a time");
  machine = this;
  // One thread runs at a time, and hands on faster to one of its own core.
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(static_cast<size_t>(sched_getcpu()), &one);
  sched_getaffinity(0, sizeof cores_, &cores_);
  sched_setaffinity(0, sizeof one, &one);
}

Stream::~Stream() {
  if (machine != nullptr) machine->forget(this);
}

Machine::~Machine() {
  for (Stream* stream : streams_) stream->grids.clear();
  for (std::byte* stack : stacks_) delete[] stack;
  sched_setaffinity(0, sizeof cores_, &cores_);
  machine = nullptr;
}

Machine& Machine::now() {
  return *machine;
}

std::byte* Machine::take_stack() {
  if (stacks_.empty()) return new std::byte[kStack];
  std::byte* stack = stacks_.back();
  stacks_.pop_back();
  return stack;
}

void Machine::launch(Stream* stream, std::unique_ptr<Grid> grid) {
  if (std::find(streams_.begin(), streams_.end(), stream) == streams_.end()) streams_.push_back(stream);
  grid->stream = stream;
  stream->grids.push_back(std::move(grid));
  grids_changed();
}

void Machine::start_and_end_grids() {
  for (Stream* stream : streams_) {
    auto& grids = stream->grids;
    while (!grids.empty() && grids.front()->started) {
      Grid& first = *grids.front();
      if (std::any_of(first.ctas.begin(), first.ctas.end(), [](const auto& cta) { return cta->live > 0; })) break;
      for (const auto& cta : first.ctas) {
        if (cta->copies > 0) throw std::runtime_error("a kernel ended with bulk copies under way");
        cta->flush();
      }
      grids.pop_front();
      if (!grids.empty()) {
        for (Fiber* fiber : grids.front()->waiting_for_previous) wake(fiber);
        grids.front()->waiting_for_previous.clear();
      }
    }
    for (size_t i = 0; i < grids.size() && i < 2; i++) {
      Grid& grid = *grids[i];
      if (grid.started) continue;
      if (i == 1) {
        const auto lets_in = [](const auto& cta) { return cta->lets_next_in || cta->live == 0; };
        const auto& before = *grids[0];
        if (!grid.programmatic || !std::all_of(before.ctas.begin(), before.ctas.end(), lets_in)) break;
      }
      grid.started = true;
      for (unsigned c = 0; c < grid.dim.x; c++) grid.ctas.push_back(std::make_unique<Cta>(grid, c));
    }
  }
}

std::string Machine::describe() const {
  std::string text;
  for (size_t s = 0; s < streams_.size(); s++) {
    for (const auto& grid : streams_[s]->grids) {
      if (!grid->started) continue;
      for (const auto& cta : grid->ctas) {
        text += "\n  stream " + std::to_string(s) + ", CTA " + std::to_string(cta->block.x) + " of " +
                std::to_string(grid->dim.x) + ": of " + std::to_string(cta->fibers.size()) + " threads " +
                std::to_string(cta->live) + " live, " + std::to_string(cta->ready.size()) + " ready, " +
                std::to_string(cta->polling.size()) + " polling";
        if (!cta->polling.empty()) text += ", thread " + std::to_string(cta->polling.front()->thread) + " for one";
      }
    }
  }
  return text;
}

void Machine::run(uint64_t most) {
  most_ = most, end_ = steps_ + most;
  change_ = 0, pace_ = 1;
  done_ = false;
  while (!done_) {
    start_and_end_grids();
    grids_change_ = false;
    if (Cta* cta = next()) {
      cta->go_.release();
      back_.acquire();
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    if (!failure_.empty()) throw std::runtime_error(failure_);
  }
}

// CTAs hand the processor to each other, which is one thread less to wake.
Cta* Machine::next_behind_a_cta() {
  if (!failure_.empty()) return nullptr;
  try {
    return next();
  } catch (...) {
    error_ = std::current_exception();
    return nullptr;
  }
}

Cta* Machine::next() {
  while (!grids_change_) {
    runnable_.clear();
    bool any = false;
    uint64_t weight = 0;
    for (Stream* stream : streams_) {
      for (size_t i = 0; i < stream->grids.size(); i++) {
        any = true;
        for (const auto& cta : stream->grids[i]->ctas) {
          for (uint64_t n = draw(8); n > 0 && !cta->stores.empty(); n--) cta->commit(draw(cta->stores.size()));
          if (cta->ready.empty() && cta->polling.empty()) continue;
          runnable_.push_back(cta.get());
          weight += weight_of(*cta);
        }
      }
    }
    if (!any && actions_.empty()) {
      done_ = true;
      return nullptr;
    }
    if (steps_ >= change_) {  // now and then another rank or CTA is slow, or stands still, or bulk copies do
      for (Stream* stream : streams_) {
        stream->weight = 1u << draw(7);
        for (const auto& grid : stream->grids) {
          for (const auto& cta : grid->ctas) cta->weight = 1u << draw(7);
        }
      }
      pace_ = 1u << draw(7);
      change_ = steps_ + 1000 + draw(20'000);
    }
    if (!actions_.empty() && (runnable_.empty() || draw(pace_) == 0)) {
      const size_t chosen = draw(actions_.size());
      const auto action = std::move(actions_[chosen]);
      actions_.erase(actions_.begin() + static_cast<std::ptrdiff_t>(chosen));
      action();
      continue;
    }
    if (runnable_.empty()) throw std::runtime_error("every thread waits for another:" + describe());
    if (steps_ >= end_) {
      throw std::runtime_error("kernels did not end within " + std::to_string(most_) + " steps:" + describe());
    }
    uint64_t chosen = draw(weight);
    Cta* cta = runnable_.front();
    for (Cta* each : runnable_) {
      cta = each;
      if (chosen < weight_of(*each)) break;
      chosen -= weight_of(*each);
    }
    cta->slices_ = 1 + static_cast<unsigned>(draw(64));
    return cta;
  }
  return nullptr;
}

// ---- for kernels ----

Fiber& self() {
  return *running;
}

void yield(bool polls) {
  Fiber* fiber = running;
  (polls ? fiber->cta->polling : fiber->cta->ready).push_back(fiber);
  block();
}

void block() {
  Fiber* fiber = running;
  if (_setjmp(fiber->context) == 0) _longjmp(fiber->cta->scheduler_, 1);
}

void fault(const std::string& what) {
  if (running == nullptr) throw std::runtime_error(what);
  const Fiber& fiber = *running;
  Machine::now().fail("CTA " + std::to_string(fiber.cta->block.x) + ", thread " + std::to_string(fiber.thread) + ": " +
                      what);
  for (;;) block();
}

bool arrive(Barrier& barrier, unsigned threads, bool value) {
  barrier.all &= value;
  if (++barrier.arrived < threads) return false;
  barrier.arrived = 0;
  barrier.result = barrier.all;
  barrier.all = true;
  for (Fiber* fiber : barrier.waiting) Machine::now().wake(fiber);
  barrier.waiting.clear();
  return true;
}

bool sync(Barrier& barrier, unsigned threads, bool value) {
  if (!arrive(barrier, threads, value)) {
    barrier.waiting.push_back(&self());
    block();
  } else {
    yield();
  }
  return barrier.result;
}

const uint32_t* exchange(uint32_t value) {
  Fiber& fiber = self();
  Cta::Warp& warp = fiber.cta->warps[fiber.thread / kWarp];
  thread_local uint32_t taken[kWarp];
  sync(warp.barrier, kWarp);
  warp.values[fiber.thread % kWarp] = value;
  sync(warp.barrier, kWarp);
  std::memcpy(taken, warp.values, sizeof taken);
  return taken;
}

void store(void* to, const void* from, size_t bytes) {
  Cta& cta = *self().cta;
  for (size_t i = 0; i < bytes; i += 8) {
    Pending half{static_cast<std::byte*>(to) + i, {}, static_cast<unsigned>(std::min<size_t>(8, bytes - i))};
    std::memcpy(half.bytes, static_cast<const std::byte*>(from) + i, half.size);
    cta.stores.push_back(half);
  }
  while (cta.stores.size() > kMostStores) cta.commit(Machine::now().draw(cta.stores.size()));
  if (Machine::now().draw(16) == 0) yield();
}

void load(void* to, const void* from, size_t bytes) {
  Fiber& fiber = self();
  if (fiber.looked_at == from) {
    yield(true);
  } else if (Machine::now().draw(16) == 0) {
    yield();
  }
  fiber.looked_at = from;
  std::memcpy(to, from, bytes);
  const auto* begin = static_cast<const std::byte*>(from);
  for (const Pending& store : fiber.cta->stores) {  // a CTA sees its own stores
    if (!overlap(store.to, store.size, begin, bytes)) continue;
    for (size_t i = 0; i < store.size; i++) {
      const std::byte* at = store.to + i;
      if (at >= begin && at < begin + bytes) static_cast<std::byte*>(to)[at - begin] = store.bytes[i];
    }
  }
}

void fence() {
  self().cta->flush();
}

Cta& cta_of_cluster(unsigned rank_in_cluster) {
  const Cta& here = *self().cta;
  return *here.grid.ctas[here.block.x / here.grid.cluster * here.grid.cluster + rank_in_cluster];
}

void* in_cta(void* p, unsigned rank_in_cluster) {
  const Cta& here = *self().cta;
  const Cta& there = cta_of_cluster(rank_in_cluster);
  auto* at = static_cast<std::byte*>(p);
  if (at >= here.shared.data() && at < here.shared.data() + here.shared.size()) {
    return const_cast<std::byte*>(there.shared.data()) + (at - here.shared.data());
  }
  return const_cast<std::byte*>(there.anchor) + (at - here.anchor);
}

}  // namespace emulator
