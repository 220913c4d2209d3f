// Which tiles a fused GEMM takes: a pure function of the shape, printable, tested by a table.
//
// Operands are swapped: rows of the weight are the MMA's M (64 or 128 of them a tile), tokens are its N, because the
// weight is what must stream and its rows are many.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace sglang_symm {

// Without k: ranks' parts may differ, and whether a call is fused is for all of them to know alike.
struct GemmShape {
  int64_t m;  // tokens
  int64_t n;  // rows of the weight
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
  int k_parts;    // 1; or 2: CTAs 2 b and 2 b + 1 take half of k each of tiles b, b + ctas / 2, ...
  int max_world;  // ranks that the kernel has registers for
  bool two_shot;  // a rank sums its share of every tile and pushes the sums; else everybody sums everything
  friend bool operator==(const GemmConfig&, const GemmConfig&) = default;
};

constexpr int kBoxColumns = 64;  // 128 bytes, the width of a swizzled row
constexpr int kMaxDecodeTokens = 64;

// Many tokens. A tile is 256 tokens x tile_n rows of the weight, by a cluster of two CTAs on neighbouring SMs, with 128
// of the tokens each.
struct PrefillConfig {
  int tile_n;  // rows of the weight a tile
  int stages;  // of 64 columns in shared memory
  int ctas;    // an even number
  // What follows from them and a shape:
  int tiles_m = 0, tiles_n = 0;  // tiles along the tokens, along the weight
  int share = 0;  // of them, that a rank owns: tile t is of rank t / share, who sums it and sends the sums; 0 between
                  // two ranks: each sums all for itself
  int late_steps = 0;  // of k, at the end of a cluster's last tile: half of the rows first, then the others (two ranks)
  friend bool operator==(const PrefillConfig&, const PrefillConfig&) = default;
};

constexpr int kPrefillTokens = 256;  // a tile
constexpr int kPrefillCluster = 2;   // CTAs

// Nothing when the decode kernel does not take this shape. tile_n, tile_m, tiles and two_shot say where a partial lies
// in a slot; the shape is all that they depend on, and all ranks know it to be equal.
std::optional<GemmConfig> choose_decode(const GemmShape& shape);

// The same for k columns: CTAs take their tiles in pairs where all SMs are busier then. A rank's own affair, as k is.
GemmConfig with_columns(GemmConfig config, int64_t k, int sms);

// Whether a residual and a norm behind the layer make the library's GEMM and one kernel that reduces and normalises
// faster than this config and a norm.
bool is_faster_apart_with_norm(const GemmConfig& config, const GemmShape& shape);

// Nothing when the library's GEMM and an all-reduce are faster, or the shape is not the kernel's. Ranks must give the
// same: it says where a partial lies, and which CTAs wait for each other.
std::optional<PrefillConfig> choose_prefill(const GemmShape& shape);

// The same tiles for another number of tokens.
PrefillConfig with_tokens(PrefillConfig config, int64_t m, int64_t n, int world_size);
// A call that outgrows slots or staging memory goes in rounds of at least this many tokens.
constexpr int64_t kLeastRound = 1024;
// Of the shortest rounds that a call of m tokens may go in.
int64_t least_round(int64_t m);
// Tokens of each round but the last; 0 when they are too small for rounds.
int64_t tokens_a_round(const PrefillConfig& config, int64_t m, int64_t n, int world_size, size_t slot_bytes,
                       size_t staging_bytes);
// Of staging memory, twice: for the partials that an owner receives, and for a y that lies outside of the arena.
size_t staging_bytes(const PrefillConfig& config, int64_t m, int64_t n, int world_size);

// Bytes of slots a parity: every source's whole result, and the sums that owners push (two_shot).
size_t slot_bytes(const GemmConfig& config, int world_size);
// Between two ranks the other's part of all tiles, else flags of partials.
size_t slot_bytes(const PrefillConfig& config, int world_size);
// How many tiles a cluster takes, at most.
int visits(const PrefillConfig& config);
// Dynamic shared memory a CTA.
size_t shared_bytes(const GemmConfig& config);
size_t shared_bytes(const PrefillConfig& config);
// "64x16 tiles, 128 in 128 CTAs, 5 stages of 256 columns, 4 reducers, one-shot"; "64x16 tiles, 64 in 128 CTAs by half
// of k, ..."
std::string to_string(const GemmConfig& config);
// "256x256 tiles, 8 x 32 in 132 CTAs, 3 stages, one-shot"
std::string to_string(const PrefillConfig& config);

}  // namespace sglang_symm
