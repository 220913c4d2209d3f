// What CollectivesCuda launches. Each function puts one kernel into a stream; the kernels are in the .cu files.
//
//   one_shot        (P-1) n bytes out   1 step    everybody pushes all of x into everybody's slots and sums
//   two_shot        2 (P-1)/P n         2 steps   pushes shares to their owners, owners sum and push the results
//   two_shot_direct 2 (P-1)/P n         2 + end   pushes shares to their owners, owners write to everybody's result
//   reduce_scatter  (P-1)/P n           1 step    the first half of two_shot
//   copy_small      (P-1) n             1 step    8 bytes of data with 8 of epoch, all_gather and broadcast
//   copy_direct     (P-1) n             1 + end   into everybody's result
//   headers         -                   1 step    barrier
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "base/dtype.h"
#include "signal/pad_cuda.h"

namespace sglang_symm {

// Threads of a CTA that move data. With the signal warp 544, so each has 96 registers.
constexpr int kMaxWorkers = 512;

// A grid whose CTAs all wait must be resident as a whole: ctas <= the SMs that the rank may fill, one a SM.
struct GridCuda {
  int ctas;
  int threads;  // without the signal warp
};

// Ranks agree on the grid (direct algorithms pair CTAs), so it depends on the call alone.
GridCuda grid_for(size_t chunks, int max_ctas);

struct SumCuda {
  CallCuda call;
  const void* in;
  void* out;
  size_t count;      // elements
  const void* bias;  // or nullptr
  size_t bias_length;
  size_t bias_start;
  size_t slots;  // offset in every arena: [2 parities][slot_bytes]; of two_shot_direct, staging memory for one call
  size_t slot_bytes;
  size_t part;     // bytes of a source in a parity; of two_shot, in half a parity
  uint32_t share;  // chunks of an owner, of two_shot and two_shot_direct
};

struct ScatterCuda : SumCuda {       // `count`: of my part
  size_t part_begin[kMaxWorldSize];  // where the parts begin in `in`, elements
  size_t part_count[kMaxWorldSize];
};

void launch_one_shot(const SumCuda& sum, const GridCuda& grid, cudaStream_t stream);
void launch_two_shot(const SumCuda& sum, const GridCuda& grid, cudaStream_t stream);
// Peers write into the arena (call.offset_out); `out` receives a copy if it is elsewhere. Peers read x there too if
// it has an offset (call.offset_in), else it is pushed to them.
void launch_two_shot_direct(const SumCuda& sum, const GridCuda& grid, cudaStream_t stream);
void launch_reduce_scatter(const ScatterCuda& sum, const GridCuda& grid, cudaStream_t stream);

struct CopyCuda {
  CallCuda call;
  const void* in;               // my contribution
  void* out;                    // everybody's, rank r's at begin[r]
  size_t begin[kMaxWorldSize];  // bytes
  size_t bytes[kMaxWorldSize];  // 0 for a rank that sends nothing
  bool in_place;                // my contribution lies in `out` already
  size_t small;                 // offset in every arena: [2 parities][rank][2 * small_bytes]
  size_t small_bytes;
};

void launch_copy_small(const CopyCuda& copy, int max_ctas, cudaStream_t stream);
// Peers write into call.offset_out; it is copied to `out` if that lies elsewhere.
void launch_copy_direct(const CopyCuda& copy, int max_ctas, cudaStream_t stream);

void launch_headers(const CallCuda& call, cudaStream_t stream);

}  // namespace sglang_symm
