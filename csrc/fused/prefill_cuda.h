// The fused kernel of many tokens: y = round(sum over ranks of round(x_r @ w_r^T) (+ bias)), sums in fp32 in rank
// order. What launches it; the kernel is in prefill_sm90.cu and the headers that it includes.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "fused/launch_cuda.h"
#include "signal/pad_cuda.h"

namespace sglang_symm {

struct PrefillCuda {
  CallCuda call;        // the descriptor's dtype is bfloat16 or float16; more than two ranks: offset_out is y's
  void* y;              // [m, n], contiguous, 16-byte aligned; between more than two ranks in the arena
  const void* bias;     // [n], 4-byte aligned, or nullptr
  const void* partial;  // this rank's product [m, n], where the copy engine does not take its operands; else nullptr
  int m, n;
  int k_steps;     // stages of 64 columns
  int late_steps;  // of them, at the end of a CTA's last tile, by halves of the rows of the weight (two ranks)
  int stages;
  int tiles_m, tiles_n;  // of a cluster: 256 tokens x tile_n rows of the weight
  int share;             // of them, that a rank owns, the last ranks fewer; 0: two ranks, each sums all
  // No kernel that is in flight writes the weight: it is fetched while the previous kernel ends.
  bool static_weight;
  size_t slots;  // offset in every arena: [2 parities][slot_bytes]
  size_t slot_bytes;
  size_t partials;  // more than two ranks: offset in every arena of the staging memory that owners receive partials in
};

// Puts the kernel into the stream. x [m, k], weight [n, k]; `args` without what `config` gives.
void launch_prefill(const PrefillConfig& config, PrefillCuda args, const MatrixCuda& x, const MatrixCuda& weight,
                    cudaStream_t stream);

#ifdef SGLANG_SYMM_TRACE
// When the CTAs of the last prefill kernel of the current device were where: [CTA][visit][stamp] ns, 0 where they have
// not been. The device must be idle. Afterwards all are 0.
struct PrefillTrace {
  int ctas, visits;
  std::vector<std::string> stamps;
  std::vector<int64_t> times;
};
PrefillTrace take_prefill_trace();
#endif

}  // namespace sglang_symm
