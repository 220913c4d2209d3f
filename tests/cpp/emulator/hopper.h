// What Hopper adds to a GPU, for the emulator: barriers in shared memory that count bytes, the bulk copy engine, matrix
// products that run on their own. fused/ptx_sm90.cuh beside it gives them the kernels' names.
//
// A copy is carried out at a time of the machine's choosing, in any order, and reads its source only then. A product is
// carried out when it is waited for, as late as a GPU may. Faults are told, not carried out: an address outside of the
// CTA's shared memory, a copy of what was stored without a fence, a CTA that has left, lanes that differ.
#pragma once

#include <cuda.h>

#include "emulator.h"

namespace emulator {

// Addresses of dynamic shared memory begin at no multiple of 1024.
constexpr uint32_t kSharedBase = 1024 + 48;

uint32_t shared_address(const void* p);
std::byte* shared_at(Cta& cta, uint32_t address, size_t bytes);
void store_shared(uint32_t to, const void* from, size_t bytes);
void fence_for_copies();

void barrier_init(uint64_t* barrier, int arrivals);
// expect: bytes that the phase waits for, beside the arrivals.
void barrier_arrive(Cta& cta, uint64_t* barrier, int expect = 0);
void barrier_wait(uint64_t* barrier, uint32_t parity);
void cluster_sync();
// Once a kernel, all threads of the cluster each.
void cluster_arrive();
void cluster_wait();
// To the same place in a CTA of the cluster, counted by its barrier.
void store_shared_at(uint32_t to, const void* from, size_t bytes, uint64_t* barrier, unsigned cta);

// To the CTAs of the cluster that have a bit in `ctas`, counted by the barrier of each.
void load_box(uint32_t to, const CUtensorMap& map, int column, int row, uint64_t* barrier, unsigned ctas);
void copy_out(void* to, uint32_t from, int bytes);
void copies_commit();
void copies_wait(bool arrived);  // else: until they have read their source

void multiply(float* sums, int columns, uint64_t a, uint64_t b, float (*number)(uint16_t bits));
void products_commit();
void products_wait(unsigned but_last);  // all committed groups but so many

}  // namespace emulator
