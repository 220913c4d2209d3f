// The kernel of many tokens: a persistent GEMM whose tiles are summed over ranks while later tiles are computed.
//
// Between two ranks both visit the same tiles and send their partials to each other: as many bytes as if one of them
// summed a tile and sent the sums, but no MMA waits for a peer, and y is stored by its own rank alone.
//
//   rank 0    math      | MMA 0  | MMA 1           | MMA 2           | MMA 3, all columns | half 0 | half 1 |   | sum 1
//             mover     |        | partial of 0 -> | partial of 1 -> | partial of 2 ->    |        | half 0 | half 1 ->
//             storers   |        | sum, y of 0     | sum, y of 1     | sum, y of 2        |        | sum 0  |
//   rank 1    the same
//
// Nothing hides the way of the last tile. So half of it leaves early: its last steps of k are those of half of the
// columns of y, and then those of the other half (their tokens are fetched twice, hence no more steps than the way
// takes).
//
// Between more ranks a tile has an owner. Every rank visits its own tiles last and in the same order as the others send
// them, so a partial has come long before it is summed, and both halves of the traffic hide under the MMAs; what is
// left is the way of the last tiles' sums.
//
//   rank 0    | tiles that others own            | tiles that it owns itself              | closing
//   math      | MMA 0  | MMA 1  | MMA 2  | ..    | MMA + sum  | MMA + sum  | ..           | barrier
//   mover     |        | 0 ->   | 1 ->   | ..            |            |            |         |
//   storers   |                                          | y -> all   | y -> all   |         |
//
// A cluster of two CTAs takes 256 tokens x kTileN rows of the weight, each CTA 128 of the tokens; each fetches half of
// the weight for both. A CTA: 8 math warps (2 warpgroups, 64 tokens each), a producer, a mover, two storers.
//
//   stage s    full[s]: its bytes have landed, of both CTAs' copies     empty[s]: 16 math warps of both have read it;
//              halves have a ring of their own over the same memory, with smaller stages
//   staging    math warp w: pushed[w] = i + 1, tile i lies there        mover: freed = i + 1, it has been read out,
//              also by the storers, each of which says stored = i + 1
//   heard      two ranks: whether headers agree, before anything is read of what the peer sent
//   abandoned  what a peer was to send will not come: for all who wait for it, whose time the mover keeps; between more
//              ranks for storers, who then send nobody a sum of it
//   arrived    more ranks: a barrier, a phase a tile of the own: its partials are here
//   partials   more ranks: in the owner's arena, with a flag a tile in its slots: 1 when all of it has been written,
//              then the sentinel again. The closing barrier holds a rank until its peers have summed what it sent, and
//              nothing is sent before the call before has ended, hence staging memory is free between calls
#pragma once

#include "fused/prefill_exchange_sm90.cuh"
#include "fused/prefill_owners_sm90.cuh"

namespace sglang_symm::device {

// More than two ranks: what cannot be had is NaN. All threads. A CTA waits for what the CTAs of its number sum, here
// and (in the closing barrier) on every other rank: those tiles are its to fill. Together they are all of y.
template <class T>
__device__ __forceinline__ void fill_tiles(const PrefillCuda& a, const PrefillSchedule<T>& schedule) {
  constexpr int kRowChunks = T::kTileN / 8;
  const int visits = schedule.visits();
#pragma unroll 1
  for (int i = 0; i < visits * a.call.world_size; i++) {
    const int rank = i / visits;
    const PrefillPlace at = schedule.place_on(rank, i % visits);
    if (at.owner != rank) continue;
#pragma unroll 1
    for (int j = threadIdx.x; j < T::kTileM * kRowChunks; j += T::kThreads) {
      const int row = at.token + j / kRowChunks, column = at.column + 8 * (j % kRowChunks);
      if (row >= a.m || column >= a.n) continue;
      auto* y = static_cast<uint16_t*>(a.y) + static_cast<size_t>(row) * a.n + column;
      *reinterpret_cast<uint4*>(y) = all_bits_set();
    }
  }
}

// ---- the kernel ----

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    prefill(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap token_map,
            const __grid_constant__ PrefillCuda a) {
  std::byte* const memory = dynamic_shared_memory();
  static_assert(has_barriers<T>);
  __shared__ uint64_t full[kMaxPrefillRings], empty[kMaxPrefillRings];
  __shared__ Handover handover;
  const uint32_t base = (shared_address(memory) + 1023) & ~1023u;
  const Ring ring{base, full, empty, a.stages};
  const int halves = half_stages<T>(a.stages);
  const Ring half_ring{base, full + a.stages, empty + a.stages, halves};
  const uint32_t staging = base + a.stages * T::kStageBytes;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x & (kWarp - 1);
  const PrefillSchedule<T> schedule{a, static_cast<int>(cluster_rank())};
  const PrefillProducer<T> producer{a, &weight_map, &token_map, ring, half_ring, schedule, &handover.step};

  if (warp == T::kProducer && elect_one()) {
    prefetch_map(&weight_map);
    prefetch_map(&token_map);
    for (int stage = 0; stage < a.stages + halves; stage++) {
      barrier_init(&full[stage], 1);
      barrier_init(&empty[stage], T::kCluster * T::kMathWarps);
    }
    barrier_init(&handover.arrived, 1);
    barrier_init_visible();
  }
  if (threadIdx.x < T::kMathWarps) handover.pushed[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    handover.stored[0] = handover.stored[1] = handover.freed = handover.abandoned = handover.heard = 0;
    handover.step = 2 * producer.ahead();
  }
  let_next_kernel_in();
  __syncthreads();
  cluster_arrive();
  cluster_wait();  // the other CTA's barriers count what is fetched for it
  if (warp == T::kProducer && elect_one()) {
    if (a.static_weight) producer.fill_weights();
    wait_for_previous_kernel();
    stamp(Stamp::previous_ended);
    if (!a.static_weight) producer.fill_weights();
    producer.fill_tokens();
  }
  const Session s = begin_together(a.call);

  using Mover = std::conditional_t<T::kTwoRanks, ExchangeMover<T>, OwnerMover<T>>;
  using Storer = std::conditional_t<T::kTwoRanks, ExchangeStorer<T>, OwnerStorer<T>>;
  bool fine = s.alive;
  if (warp >= T::kMathWarps) {
    if (warp == T::kProducer && elect_one()) producer.stream();
    if (warp == T::kMover) {
      if (s.alive && blockIdx.x == 0) send_headers(s);
      if (s.alive) fine = await_headers(s);  // in every CTA: nothing goes to who does not take part
      fine = Mover{a, s, schedule, staging, &handover, lane}.move(fine);
    }
    if (warp >= T::kFirstStorer) {
      Storer{a, s, schedule, warp - T::kFirstStorer, lane, staging, &handover}.store();
    }
    __syncwarp();
  } else {
    Position at;
    [[maybe_unused]] int own = 0;
    const int visits = schedule.visits();
#pragma unroll 1
    for (int visit = 0; visit < visits; visit++) {
      const PrefillPlace place = schedule.place(visit);
      if constexpr (T::kTwoRanks) {
        if (schedule.ends_by_halves(visit)) {
          exchange_last<T>(a, s, place, schedule.cta, visit, warp, lane, ring, half_ring, &at, staging, &handover);
          break;
        }
      }
      float d[T::kTileN / 2];
      multiply_tile<T>(ring, a.k_steps, visit, warp / 4, lane, &at, d);
      if constexpr (T::kTwoRanks) {
        hand_halves_over<T>(a, s, place, visit, warp, lane, staging, &handover, d);
      } else {
        hand_over<T>(a, s, place, schedule.cta, visit, own, warp, lane, staging, &handover, d);
        own += place.owner == s.call.rank ? 1 : 0;
      }
    }
  }
  cluster_sync();  // no CTA leaves while the other one still arrives at its barriers
  if constexpr (!T::kTwoRanks) {
    if (__syncthreads_and(fine) == 0) fill_tiles(a, schedule);
  }
  end(s);
  stamp(Stamp::end);
}

}  // namespace sglang_symm::device
