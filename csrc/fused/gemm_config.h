// Which tiles a fused GEMM takes: a pure function of the shape, printable, tested by a table.
//
// Operands are swapped: rows of the weight are the MMA's M (64 or 128 of them a tile), tokens are its N (padded with
// zeros), because the weight is what must stream and its rows are many.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace sglang_symm {

struct GemmShape {
  int64_t m;  // tokens
  int64_t n;  // rows of the weight
  int64_t k;  // columns of this rank's part
  int world_size;
  int sms;  // that the rank may fill
};

struct GemmConfig {
  int tile_n;     // rows of the weight a tile
  int tile_m;     // tokens a tile, at least m
  int boxes;      // of 64 columns a stage
  int stages;     // in shared memory
  int reducers;   // warps that sum: a group of four takes a part of each tile
  int tiles;      // tile_n rows each
  int ctas;       // one an SM; CTA b takes tiles b, b + ctas, ...
  int max_world;  // ranks that the kernel has registers for
  bool two_shot;  // a rank sums its share of every tile and pushes the sums; else everybody sums everything
  friend bool operator==(const GemmConfig&, const GemmConfig&) = default;
};

constexpr int kBoxColumns = 64;  // 128 bytes, the width of a swizzled row
constexpr int kMaxDecodeTokens = 64;

// Nothing when the decode kernel does not take this shape. tile_n, tile_m and tiles say where a partial lies in a slot,
// so they depend on nothing but m, n and world_size, which all ranks know to be equal; the rest is a rank's own.
std::optional<GemmConfig> choose_decode(const GemmShape& shape);

// Bytes of slots a parity: every source's whole result, and the sums that owners push (two_shot).
size_t slot_bytes(const GemmConfig& config, int world_size);
// Dynamic shared memory a CTA.
size_t shared_bytes(const GemmConfig& config);
// "64x16 tiles, 128 in 128 CTAs, 5 stages of 256 columns, 4 reducers, one-shot"
std::string to_string(const GemmConfig& config);

}  // namespace sglang_symm
