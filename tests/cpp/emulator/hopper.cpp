#include "hopper.h"

#include <algorithm>

namespace emulator {

namespace {

constexpr unsigned kUnit = 16;  // bytes that a copy moves, at least

// An mbarrier's 64 bits.
struct State {
  uint16_t pending;    // arrivals that the phase still waits for
  uint16_t count;      // of each phase
  int32_t bytes : 31;  // that it waits for; negative when they came before they were expected
  uint32_t phase : 1;
};
static_assert(sizeof(State) == sizeof(uint64_t));

State& state_of(uint64_t* barrier) {
  auto& state = *reinterpret_cast<State*>(barrier);
  if (state.count == 0) fault("a barrier is used before barrier_init");
  return state;
}

void end_phase(Cta& cta, uint64_t* barrier) {
  State& state = state_of(barrier);
  if (state.pending > 0 || state.bytes != 0) return;
  state.phase ^= 1;
  state.pending = state.count;
  std::erase_if(cta.waiting, [&](const Cta::Waiting& w) {
    if (w.barrier == barrier) Machine::now().wake(w.fiber);
    return w.barrier == barrier;
  });
}

void must_live(const Cta& cta) {
  if (cta.live == 0) fault("shared memory of a CTA that has left");
}

// Counts what copies bring.
void bring(Cta& cta, uint64_t* barrier, int bytes) {
  state_of(barrier).bytes -= bytes;
  end_phase(cta, barrier);
}

uint32_t swizzled(uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

// What threads stored and copies shall see must pass a fence.
void must_be_fenced(Cta& cta, uint32_t address, size_t bytes) {
  for (size_t i = (address - kSharedBase) / kUnit; i * kUnit < address - kSharedBase + bytes; i++) {
    if (!cta.stored.empty() && cta.stored[i] != 0) {
      fault("a copy of what thread " + std::to_string(cta.stored[i] - 1) + " stored, no fence for copies since");
    }
  }
}

void carry_out_load(Cta& cta, uint32_t to, const CUtensorMap& map, int column, int row, uint64_t* barrier) {
  must_live(cta);
  const uint32_t row_bytes = map.box_columns * 2, bytes = map.box_rows * row_bytes;
  if (to % 128 != 0) fault("a box to an address that is no multiple of 128");
  for (uint32_t r = 0; r < map.box_rows; r++) {
    for (uint32_t chunk = 0; chunk < row_bytes / kUnit; chunk++) {
      uint16_t elements[kUnit / 2] = {};
      for (unsigned i = 0; i < kUnit / 2; i++) {
        const int64_t y = int64_t{row} + r, x = int64_t{column} + chunk * (kUnit / 2) + i;
        const bool inside =
            y >= 0 && y < static_cast<int64_t>(map.rows) && x >= 0 && x < static_cast<int64_t>(map.columns);
        const auto* from = static_cast<const std::byte*>(map.data) + y * static_cast<int64_t>(map.row_bytes) + 2 * x;
        if (inside) std::memcpy(&elements[i], from, 2);
      }
      std::memcpy(shared_at(cta, swizzled(to + r * row_bytes + chunk * kUnit), kUnit), elements, kUnit);
    }
  }
  bring(cta, barrier, static_cast<int>(bytes));
}

void must_be_units(const void* global, uint32_t shared, int bytes) {
  if (reinterpret_cast<uintptr_t>(global) % kUnit != 0 || shared % kUnit != 0 || bytes <= 0 ||
      bytes % static_cast<int>(kUnit) != 0) {
    fault("a bulk copy of " + std::to_string(bytes) + " bytes that is not whole, aligned units of 16");
  }
}

// Element (row, k) of an operand: rows of 128 bytes, swizzled, eight rows 1024 bytes on.
uint16_t element(Cta& cta, uint64_t operand, uint32_t row, uint32_t k) {
  const uint32_t start = static_cast<uint32_t>(operand & 0x3FFF) << 4;
  const uint32_t eight_rows = static_cast<uint32_t>(operand >> 32 & 0x3FFF) << 4;
  if (operand >> 62 != 1) fault("an operand without the swizzle of 128 bytes");
  const uint32_t address = swizzled(start + row / 8 * eight_rows + row % 8 * 128 + 2 * k);
  uint16_t bits;
  std::memcpy(&bits, shared_at(cta, address, 2), 2);
  return bits;
}

// One product of one warp: rows 16 w .. 16 w + 15 of the warpgroup's 64.
template <int Columns>
void carry_out_product(Fiber* lanes, size_t index) {
  constexpr int kRows = 16, kDepth = 16;
  const Product& product = lanes[0].products[index];
  Cta& cta = *lanes[0].cta;
  const uint32_t first = lanes[0].thread / kWarp % 4 * kRows;
  float a[kRows][kDepth], b[kDepth][Columns], sums[kRows][Columns];
  for (uint32_t k = 0; k < kDepth; k++) {
    for (uint32_t row = 0; row < kRows; row++) a[row][k] = product.number(element(cta, product.a, first + row, k));
    for (uint32_t c = 0; c < Columns; c++) b[k][c] = product.number(element(cta, product.b, c, k));
  }
  const auto each = [&](const auto& f) {
    for (int lane = 0; lane < kWarp; lane++) {
      for (int i = 0; i < Columns / 2; i++) {
        f(lanes[lane].products[index].sums[i], sums[lane / 4 + 8 * (i >> 1 & 1)][8 * (i / 4) + 2 * (lane % 4) + i % 2]);
      }
    }
  };
  each([](float& of_lane, float& sum) { sum = of_lane; });
  for (int row = 0; row < kRows; row++) {
    for (int k = 0; k < kDepth; k++) {
      for (int c = 0; c < Columns; c++) sums[row][c] += a[row][k] * b[k][c];
    }
  }
  each([](float& of_lane, float& sum) { of_lane = sum; });
}

// False when `columns` is none of these.
template <int... Columns>
bool carry_out_one_of(Fiber* lanes, size_t index, int columns) {
  return ((columns == Columns && (carry_out_product<Columns>(lanes, index), true)) || ...);
}

size_t cluster_threads() {
  const Cta& cta = *self().cta;
  return cta.grid.cluster * cta.fibers.size();
}

}  // namespace

// ---- shared memory ----

uint32_t shared_address(const void* p) {
  const Cta& cta = *self().cta;
  const auto* at = static_cast<const std::byte*>(p);
  if (at < cta.shared.data() || at >= cta.shared.data() + cta.shared.size()) fault("no address of shared memory");
  return kSharedBase + static_cast<uint32_t>(at - cta.shared.data());
}

std::byte* shared_at(Cta& cta, uint32_t address, size_t bytes) {
  if (address < kSharedBase || address - kSharedBase + bytes > cta.shared.size()) {
    fault("shared memory at " + std::to_string(address) + ", the CTA has " + std::to_string(kSharedBase) + " to " +
          std::to_string(kSharedBase + cta.shared.size()));
  }
  return cta.shared.data() + (address - kSharedBase);
}

void store_shared(uint32_t to, const void* from, size_t bytes) {
  Fiber& fiber = self();
  Cta& cta = *fiber.cta;
  if (Machine::now().draw(16) == 0) yield();
  std::memcpy(shared_at(cta, to, bytes), from, bytes);
  cta.stored.resize(cta.shared.size() / kUnit + 1);
  const uint32_t unit = (to - kSharedBase) / kUnit;
  cta.stored[unit] = static_cast<uint16_t>(fiber.thread + 1);
  fiber.unfenced.push_back(unit);
}

void fence_for_copies() {
  Fiber& fiber = self();
  for (const uint32_t unit : fiber.unfenced) {
    uint16_t& by = fiber.cta->stored[unit];
    if (by == fiber.thread + 1) by = 0;
  }
  fiber.unfenced.clear();
}

// ---- barriers ----

void barrier_init(uint64_t* barrier, int arrivals) {
  const auto count = static_cast<uint16_t>(arrivals);
  const State state{count, count, 0, 0};
  std::memcpy(barrier, &state, sizeof state);
}

void barrier_arrive(Cta& cta, uint64_t* barrier, int expect) {
  must_live(cta);
  if (Machine::now().draw(8) == 0) yield();
  State& state = state_of(barrier);
  if (state.pending == 0) fault("more arrivals at a barrier than its phase has");
  state.bytes += expect;
  state.pending--;
  end_phase(cta, barrier);
}

void barrier_wait(uint64_t* barrier, uint32_t parity) {
  Fiber& fiber = self();
  if (Machine::now().draw(8) == 0) yield();
  while (state_of(barrier).phase == parity) {
    fiber.cta->waiting.push_back({barrier, &fiber});
    block();
  }
}

void cluster_sync() {
  unsigned threads = 0;
  for (unsigned c = 0; c < self().cta->grid.cluster; c++) threads += cta_of_cluster(c).live;
  sync(cta_of_cluster(0).cluster, threads);
}

void cluster_arrive() {
  if (++cta_of_cluster(0).cluster_arrived > cluster_threads()) fault("cluster_arrive, a second time");
}

void cluster_wait() {
  while (cta_of_cluster(0).cluster_arrived < cluster_threads()) yield(true);
}

void store_shared_at(uint32_t to, const void* from, size_t bytes, uint64_t* barrier, unsigned cta) {
  Cta& there = cta_of_cluster(cta);
  auto* counts = static_cast<uint64_t*>(in_cta(barrier, cta));
  const std::vector<std::byte> data(static_cast<const std::byte*>(from), static_cast<const std::byte*>(from) + bytes);
  Machine::now().later([=, &there] {
    must_live(there);
    std::memcpy(shared_at(there, to, bytes), data.data(), bytes);
    bring(there, counts, static_cast<int>(bytes));
  });
  if (Machine::now().draw(4) == 0) yield();
}

// ---- the bulk copy engine ----

void load_box(uint32_t to, const CUtensorMap& map, int column, int row, uint64_t* barrier, unsigned ctas) {
  Cta& here = *self().cta;
  for (unsigned c = 0; c < here.grid.cluster; c++) {
    if ((ctas >> c & 1) == 0) continue;
    Cta& there = cta_of_cluster(c);
    auto* counts = static_cast<uint64_t*>(in_cta(barrier, c));
    here.copies++;
    Machine::now().later([=, &here, &there] {
      carry_out_load(there, to, map, column, row, counts);
      here.copies--;
    });
  }
  if (Machine::now().draw(4) == 0) yield();
}

void copy_out(void* to, uint32_t from, int bytes) {
  must_be_units(to, from, bytes);
  Fiber& fiber = self();
  Cta& cta = *fiber.cta;
  auto copy = std::make_shared<CopyOut>();
  fiber.copies.push_back(copy);
  cta.copies++;
  Machine::now().later([=, &cta] {
    must_live(cta);
    must_be_fenced(cta, from, static_cast<size_t>(bytes));
    const std::byte* source = shared_at(cta, from, static_cast<size_t>(bytes));
    auto data = std::make_shared<std::vector<std::byte>>(source, source + bytes);
    copy->read = true;
    Machine::now().later([=, &cta] {
      std::memcpy(to, data->data(), data->size());
      copy->arrived = true;
      cta.copies--;
    });
  });
  if (Machine::now().draw(8) == 0) yield();
}

void copies_commit() {
  for (const auto& copy : self().copies) copy->committed = true;
}

void copies_wait(bool arrived) {
  auto& copies = self().copies;
  const auto under_way = [&](const auto& copy) { return copy->committed && !(arrived ? copy->arrived : copy->read); };
  while (std::any_of(copies.begin(), copies.end(), under_way)) yield(true);
  std::erase_if(copies, [](const auto& copy) { return copy->arrived; });
}

// ---- matrix products ----

void multiply(float* sums, int columns, uint64_t a, uint64_t b, float (*number)(uint16_t bits)) {
  Fiber& fiber = self();
  fiber.products.push_back({sums, a, b, columns, number, fiber.groups});
}

void products_commit() {
  self().groups++;
}

void products_wait(unsigned but_last) {
  Fiber& fiber = self();
  Cta::Warp& warp = fiber.cta->warps[fiber.thread / kWarp];
  sync(warp.barrier, kWarp);
  if (fiber.thread % kWarp == 0) {
    Fiber* lanes = &fiber;
    size_t count = 0;
    while (count < fiber.products.size() && fiber.products[count].group + but_last < fiber.groups) count++;
    for (size_t i = 0; i < count; i++) {
      const Product& first = fiber.products[i];
      for (int lane = 1; lane < kWarp; lane++) {
        const auto& others = lanes[lane].products;
        if (others.size() <= i || others[i].a != first.a || others[i].b != first.b || others[i].group != first.group) {
          fault("lane " + std::to_string(lane) + " issued another matrix product than lane 0");
        }
      }
      if (!carry_out_one_of<16, 32, 64, 128, 256>(lanes, i, first.columns)) {
        fault("a matrix product of " + std::to_string(first.columns) + " columns");
      }
    }
    for (int lane = 0; lane < kWarp; lane++) {
      auto& products = lanes[lane].products;
      products.erase(products.begin(), products.begin() + static_cast<std::ptrdiff_t>(count));
    }
  }
  sync(warp.barrier, kWarp);
}

}  // namespace emulator
