// The fused CUDA kernels on the emulator: bits, protocol, failures.
#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <optional>
#include <variant>

#include "fused/decode_cuda.h"
#include "fused/prefill_cuda.h"
#include "fused/ptx_sm90.cuh"
#include "gpus.h"

namespace sglang_symm::testing {
namespace {

constexpr DType kTypes[] = {DType::bfloat16, DType::float16};
using Config = std::variant<GemmConfig, PrefillConfig>;

struct Options {
  bool bias = false;
  bool static_weight = false;
  int by_library = -1;            // the rank whose product is made before; -1: none
  bool wild = false;              // infinities and NaNs among the inputs
  bool y_inside = false;          // y lies in the arena
  bool from_collectives = false;  // an all_reduce before the call writes x, a broadcast the weight
  unsigned pairs = 0;  // decode: ranks, a bit each, whose CTAs share tiles; from bit 16 on how many pairs, less 1
};

// Rows of small integers; what lies between them, nobody may multiply.
struct Matrix {
  Matrix(int rows, int columns, int stride, DType dtype)
      : rows(rows),
        columns(columns),
        stride(stride),
        dtype(dtype),
        memory(static_cast<size_t>(rows) * static_cast<size_t>(stride), dtype) {
    std::memset(memory.data(), 0xFF, memory.bytes());
  }
  size_t index(int row, int column) const {
    return static_cast<size_t>(row) * static_cast<size_t>(stride) + static_cast<size_t>(column);
  }
  void set(int row, int column, uint16_t bits) { std::memcpy(memory.data() + 2 * index(row, column), &bits, 2); }
  float at(int row, int column) { return to_float32(memory.data(), index(row, column), dtype); }
  MatrixCuda of_kernel() { return {memory.data(), rows, columns, stride}; }

  int rows, columns, stride;
  DType dtype;
  Buffer memory;
};

uint16_t number(DType dtype, bool wild, std::mt19937_64& random) {
  const uint64_t draw = random();
  if (wild && draw % 301 == 0) {
    const float values[] = {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                            std::numeric_limits<float>::quiet_NaN()};
    return (draw >> 20) % 4 == 3 ? 0xFFFF : from_float(values[(draw >> 20) % 4], dtype);
  }
  return from_float(static_cast<float>(static_cast<int>((draw >> 32) % 7) - 3), dtype);
}

void fill(Matrix& m, bool wild, std::mt19937_64& random) {
  for (int row = 0; row < m.rows; row++) {
    for (int column = 0; column < m.columns; column++) m.set(row, column, number(m.dtype, wild, random));
  }
}

// One fused linear of all ranks, enqueued and not run.
class Linear {
 public:
  Linear(Gpus& gpus, const Config& config, DType dtype, int m, int n, const Options& options, std::mt19937_64& random)
      : options_(options),
        dtype_(dtype),
        m_(m),
        n_(n),
        config_(config),
        bias_(1, n, n, dtype),
        expected_(count(), dtype) {
    const bool same = options.from_collectives;
    const int most = static_cast<int>(random() % 3 == 0 ? 600 : 150),
              common = 8 * (1 + static_cast<int>(random() % 40));
    fill(bias_, options.wild, random);
    std::vector<const void*> sources;
    for (int r = 0; r < gpus.size(); r++) {
      // How long a rank's part of k is and how its tensors lie is its own affair.
      int k = same ? common : 8 * (1 + static_cast<int>(random() % static_cast<unsigned>(most / 8)));
      if (r == options.by_library) k -= 5;
      const int stride = (k + 7) / 8 * 8;
      x_.emplace_back(m, k, stride + (same ? 0 : 8 * static_cast<int>(random() % 3)), dtype);
      weight_.emplace_back(n, k, stride + (same ? 0 : 8 * static_cast<int>(random() % 3)), dtype);
      fill(x_.back(), options.wild, random);
      fill(weight_.back(), options.wild && random() % 4 == 0, random);
      if (same && r > 0) x_.back() = x_.front(), weight_.back() = weight_.front();
      multiply(x_.back(), weight_.back());
      y_outside_.emplace_back(count(), dtype);
      std::byte* y = options.y_inside ? gpus[r].inside<std::byte>(2 * count()) : y_outside_.back().data();
      y_.push_back(y);
    }
    for (Buffer& product : products_) sources.push_back(product.data());
    void* output = expected_.data();
    SumTask task{sources.data(), gpus.size(), &output, 1, count(), dtype};
    if (options.bias) task.bias = bias_.memory.data(), task.bias_length = static_cast<size_t>(n);
    sum_in_rank_order(task, CpuPath::portable);
    descriptor.op = OpCode::row_parallel_linear;
    descriptor.dtype = dtype;
    const bool one_shot = std::holds_alternative<GemmConfig>(config) ? !std::get<GemmConfig>(config).two_shot
                                                                     : std::get<PrefillConfig>(config).share == 0;
    descriptor.algorithm = one_shot ? Algorithm::one_shot : Algorithm::two_shot;
    descriptor.flags = Descriptor::kFused | (options.bias ? Descriptor::kHasBias : 0);
    descriptor.aux = static_cast<uint32_t>(n);
    descriptor.count = static_cast<uint64_t>(m);
    if (options.from_collectives) hide();
  }

  void enqueue(Gpus& gpus) {
    for (int r = 0; r < gpus.size(); r++) enqueue(gpus, r);
  }
  void enqueue(Gpus& gpus, int rank) {
    if (options_.from_collectives) bring(gpus, rank);
    if (std::holds_alternative<GemmConfig>(config_)) {
      enqueue_decode(gpus, rank, std::get<GemmConfig>(config_));
    } else {
      enqueue_prefill(gpus, rank, std::get<PrefillConfig>(config_));
    }
  }
  void fill_y(int byte) {
    for (std::byte* y : y_) std::memset(y, byte, 2 * count());
  }
  void clear() {
    fill_y(0);
    if (options_.from_collectives) hide();
  }

  // The first element that is not as expected, on any rank.
  std::string wrong() {
    for (size_t r = 0; r < y_.size(); r++) {
      for (size_t i = 0; i < count(); i++) {
        if (std::memcmp(y_[r] + 2 * i, expected_.data() + 2 * i, 2) == 0) continue;
        return what() + ": rank " + std::to_string(r) + ", token " + std::to_string(i / static_cast<size_t>(n_)) +
               ", column " + std::to_string(i % static_cast<size_t>(n_)) + ": expected " +
               std::to_string(to_float32(expected_.data(), i, dtype_)) + ", got " +
               std::to_string(to_float32(y_[r], i, dtype_));
      }
      if (!y_outside_[r].untouched_around()) return what() + ": bytes beside y of rank " + std::to_string(r);
    }
    return "";
  }
  bool is_right_or_nan(int rank) {
    const std::byte* y = y_[static_cast<size_t>(rank)];
    for (size_t i = 0; i < count(); i++) {
      const float f = to_float32(y, i, dtype_);
      if (f == f && std::memcmp(y + 2 * i, expected_.data() + 2 * i, 2) != 0) return false;
    }
    return true;
  }
  bool all_nan(int rank) const {
    for (size_t i = 0; i < count(); i++) {
      const float f = to_float32(y_[static_cast<size_t>(rank)], i, dtype_);
      if (f == f) return false;
    }
    return true;
  }
  std::string what() const {
    return to_string(descriptor) + " with " + std::visit([](const auto& c) { return to_string(c); }, config_) +
           (options_.bias ? ", bias" : "") + (options_.static_weight ? ", static weight" : "") +
           (options_.by_library >= 0 ? ", by the library on rank " + std::to_string(options_.by_library) : "") +
           (options_.pairs != 0 ? ", pairs " + std::to_string(options_.pairs & 0x300FF) : "");
  }

  Descriptor descriptor;

 private:
  size_t count() const { return static_cast<size_t>(m_) * static_cast<size_t>(n_); }

  // round(x @ w^T)
  void multiply(Matrix& x, Matrix& w) {
    const auto n = static_cast<size_t>(n_), k = static_cast<size_t>(x.columns);
    std::vector<float> columns(k * n);  // of the weight
    for (int row = 0; row < n_; row++) {
      for (int column = 0; column < w.columns; column++) {
        columns[static_cast<size_t>(column) * n + static_cast<size_t>(row)] = w.at(row, column);
      }
    }
    Buffer& product = products_.emplace_back(count(), dtype_);
    std::vector<float> sums(n);
    for (int token = 0; token < m_; token++) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int column = 0; column < x.columns; column++) {
        const float a = x.at(token, column);
        const float* b = columns.data() + static_cast<size_t>(column) * n;
        for (size_t i = 0; i < n; i++) sums[i] += a * b[i];
      }
      for (size_t i = 0; i < n; i++) {
        uint16_t bits = from_float(sums[i], dtype_);
        if (sums[i] != sums[i]) bits = 0xFFFF;  // the library may round to any NaN
        std::memcpy(product.data() + 2 * (static_cast<size_t>(token) * n + i), &bits, 2);
      }
    }
  }

  // What collectives shall bring is not there before them.
  void hide() {
    for (size_t r = 0; r < x_.size(); r++) {
      if (r == 0 && x_parts_.empty()) {
        for (size_t part = 0; part < x_.size(); part++) {
          x_parts_.push_back(x_[0].memory);
          if (part > 0) std::memset(x_parts_.back().data(), 0, x_parts_.back().bytes());
        }
        weight_source_ = weight_[0].memory;
      }
      std::memset(x_[r].memory.data(), 0xFF, x_[r].memory.bytes());
      if (r == 0) {
        weight_[r].memory = *weight_source_;
      } else {
        std::memset(weight_[r].memory.data(), 0xFF, weight_[r].memory.bytes());
      }
    }
  }
  void bring(Gpus& gpus, int rank) {
    const auto r = static_cast<size_t>(rank);
    const size_t elements = x_[r].memory.bytes() / 2, bytes = weight_[r].memory.bytes();
    gpus[rank].collectives->broadcast(describe(OpCode::broadcast, Algorithm::one_shot, DType::bytes, bytes),
                                      weight_[r].memory.data(), bytes, 0, &gpus[rank].stream);
    gpus[rank].collectives->all_reduce(describe(OpCode::all_reduce, Algorithm::two_shot, dtype_, elements),
                                       {x_parts_[r].data(), x_[r].memory.data(), elements, dtype_}, &gpus[rank].stream);
  }

  template <class Args>
  void fill_in(Args* args, Gpus& gpus, int rank) {
    const auto r = static_cast<size_t>(rank);
    args->call = gpus[rank].collectives->enter(descriptor, &gpus[rank].stream);
    args->y = y_[r];
    args->bias = options_.bias ? bias_.memory.data() : nullptr;
    args->partial = rank == options_.by_library ? products_[r].data() : nullptr;
    args->m = m_;
    args->n = n_;
    args->static_weight = options_.static_weight && args->partial == nullptr;
    args->slots = gpus.layout().slots;
    args->slot_bytes = gpus.layout().slot_bytes;
  }
  // Any two matrices where there is a product.
  MatrixCuda operand(Matrix& matrix, int rank) {
    if (rank != options_.by_library) return matrix.of_kernel();
    return {products_[static_cast<size_t>(rank)].data(), m_, n_, n_};
  }
  void enqueue_decode(Gpus& gpus, int rank, const GemmConfig& config) {
    const auto r = static_cast<size_t>(rank);
    ASSERT_LE(slot_bytes(config, gpus.size()), gpus.layout().slot_bytes);
    DecodeCuda args{};
    fill_in(&args, gpus, rank);
    const bool pair = args.partial == nullptr && (options_.pairs >> rank & 1) != 0;
    GemmConfig mine = config;
    if (pair) {
      mine.k_parts = 2;
      mine.ctas = 2 * std::min(config.tiles, 1 + static_cast<int>(options_.pairs >> 16 & 3));
    }
    launch_decode(mine, args, operand(x_[r], rank), operand(weight_[r], rank), &gpus[rank].stream);
  }
  void enqueue_prefill(Gpus& gpus, int rank, const PrefillConfig& config) {
    const auto r = static_cast<size_t>(rank);
    const LayoutCuda& layout = gpus.layout();
    ASSERT_LE(slot_bytes(config, gpus.size()), layout.slot_bytes);
    ASSERT_LE(staging_bytes(config, m_, n_, gpus.size()), layout.staging_bytes);
    PrefillCuda args{};
    fill_in(&args, gpus, rank);
    if (config.share > 0) {  // peers write y
      Arena& arena = *gpus[rank].arena;
      args.call.offset_out = options_.y_inside ? static_cast<size_t>(y_[r] - arena.base()) : layout.staging_out;
      args.y = args.call.window[rank] + args.call.offset_out;
    }
    args.partials = layout.staging_in;
    launch_prefill(config, args, operand(x_[r], rank), operand(weight_[r], rank), &gpus[rank].stream);
    if (args.y != y_[r]) {
      check_cuda(cudaMemcpyAsync(y_[r], args.y, 2 * count(), cudaMemcpyDeviceToDevice, &gpus[rank].stream), "copy");
    }
  }

  Options options_;
  DType dtype_;
  int m_, n_;
  Config config_;
  Matrix bias_;
  Buffer expected_;
  std::deque<Matrix> x_, weight_;
  std::deque<Buffer> products_, y_outside_, x_parts_;
  std::optional<Buffer> weight_source_;
  std::vector<std::byte*> y_;
};

// ---- configurations ----

// The table's, for a GPU of few SMs, with as few stages as the kernel takes: the ring goes round more often.
GemmConfig decode_config(int world, int m, int n, int sms, int stages = 2) {
  auto config = choose_decode({m, n, world, sms});
  EXPECT_TRUE(config.has_value());
  const bool overlapped = config->tile_n == 128 || config->tile_m == 64;  // then a stage more is under way
  config->stages = std::max(stages, overlapped ? 2 : 1);
  return *config;
}

PrefillConfig prefill_config(int world, int m, int n, int clusters, int tile_n = 128, int stages = 2) {
  const PrefillConfig config{.tile_n = tile_n, .stages = stages, .ctas = kPrefillCluster * clusters};
  return with_tokens(config, m, n, world);
}

Options any_options(int world, std::mt19937_64& random) {
  Options options;
  options.bias = random() % 2 == 0;
  options.static_weight = random() % 2 == 0;
  options.by_library = random() % 4 == 0 ? static_cast<int>(random() % static_cast<unsigned>(world)) : -1;
  options.wild = random() % 4 == 0;
  options.y_inside = random() % 2 == 0;
  options.pairs = static_cast<unsigned>(random());
  return options;
}

int any(std::initializer_list<int> of, std::mt19937_64& random) {
  return *(of.begin() + random() % of.size());
}

// ---- bits ----

// Of two bfloat16 numbers all that matters: mantissas, signs, how far the exponents lie apart, and both ends of their
// range; of float16, which has more, numbers at random with exponents near to each other.
template <class Type, class Numbers>
int sums_that_differ(const Numbers& numbers) {
  int wrong = 0;
  numbers([&](uint16_t a, uint16_t b) {
    const float sum[2] = {Type::load(a) + Type::load(b), 0};
    wrong += device::add_pairs<Type>(a, b) != Type::round(sum);
  });
  return wrong;
}

TEST(FusedCuda, ASumThatIsRoundedOnceHasTheBitsOfOneInFp32ThatIsRoundedThen) {
  EXPECT_EQ(sums_that_differ<device::BFloat16>([](const auto& check) {
              for (const int larger : {0, 1, 40, 254, 255}) {
                for (int gap = 0; gap <= std::min(larger, 40); gap++) {
                  for (int i = 0; i < 2 * 128 * 128; i++) {
                    const int a = larger << 7 | (i & 127), b = (larger - gap) << 7 | (i >> 7 & 127) | (i >> 14) << 15;
                    check(static_cast<uint16_t>(a), static_cast<uint16_t>(b));
                  }
                }
              }
            }),
            0);
  std::mt19937_64 random(1);
  EXPECT_EQ(sums_that_differ<device::Float16>([&](const auto& check) {
              for (int a = 0; a < 0x8000; a++) {
                for (int gap = 0; gap <= std::min(a >> 10, 14); gap++) {
                  for (int i = 0; i < 8; i++) {
                    const auto b = static_cast<int>(random() % 1024 | (random() & 0x8000));
                    check(static_cast<uint16_t>(a), static_cast<uint16_t>(b | ((a >> 10) - gap) << 10));
                  }
                }
              }
            }),
            0);
}

TEST(FusedCuda, DecodeGivesTheBitsOfTheSumOfRoundedProducts) {
  for (uint64_t seed = 0; seed < seeds(1); seed++) {
    for (const int world : {2, 4, 8}) {
      for (const int m : {1, 2, 5, 7, 9, 16, 20, 32, 33, 64}) {
        std::mt19937_64 random(seed * 1000 + static_cast<uint64_t>(10 * m + world));
        const DType dtype = kTypes[(seed + static_cast<uint64_t>(m)) % 2];
        Gpus gpus(world, random());
        const int n = 8 * (1 + static_cast<int>(random() % (world == 2 ? 50 : 30)));
        GemmConfig config = decode_config(world, m, n, any({1, 2, 3}, random), any({1, 2, 3}, random));
        if (world > 2 && random() % 3 == 0) config.two_shot = !config.two_shot;
        std::deque<Linear> calls;
        for (int i = 0; i < 3; i++) {
          calls.emplace_back(gpus, config, dtype, m, n, any_options(world, random), random).enqueue(gpus);
        }
        gpus.run();
        for (Linear& call : calls) ASSERT_EQ(call.wrong(), "") << "seed " << seed;
        expect_at_rest(gpus);
      }
    }
  }
}

TEST(FusedCuda, PrefillOfTwoRanksGivesTheBitsOfTheSumOfRoundedProducts) {
  for (uint64_t seed = 0; seed < seeds(4); seed++) {
    std::mt19937_64 random(seed);
    const DType dtype = kTypes[random() % 2];
    Gpus gpus(2, random(), 1e6, 2, 16 << 20);
    std::deque<Linear> calls;
    for (int i = 0; i < 3; i++) {
      // One to four visits, the last of some clusters or of all.
      const int clusters = any({1, 2}, random), tile_n = any({128, 256}, random);
      const int tiles = clusters == 1 ? any({1, 2, 3, 4}, random) : any({2, 3, 4, 5, 6, 7}, random);
      const int rows = tiles % 2 == 0 ? 2 : 1, m = (rows == 2 ? 256 : 0) + any({70, 150, 256}, random);
      const int n = tile_n * tiles / rows - 8 * static_cast<int>(random() % 16);
      PrefillConfig config = prefill_config(2, m, n, clusters, tile_n, any({2, 3}, random));
      ASSERT_EQ(config.tiles_m * config.tiles_n, tiles);
      config.late_steps = any({0, 1, 2, 5, 100}, random);
      calls.emplace_back(gpus, config, dtype, m, n, any_options(2, random), random).enqueue(gpus);
    }
    gpus.run();
    for (Linear& call : calls) ASSERT_EQ(call.wrong(), "") << "seed " << seed;
    expect_at_rest(gpus);
  }
}

TEST(FusedCuda, PrefillOfMoreRanksGivesTheBitsOfTheSumOfRoundedProducts) {
  for (uint64_t seed = 0; seed < seeds(2); seed++) {
    for (const int world : {3, 4}) {
      std::mt19937_64 random(seed * 10 + static_cast<uint64_t>(world));
      const DType dtype = kTypes[random() % 2];
      Gpus gpus(world, random(), 1e6, 2, 8 << 20);
      const int m = any({70, 200, 256, 300}, random), tiles = (m + 255) / 256;
      const int clusters = any({1, 2}, random), wide = any({1, 2, 3, 4}, random);
      const int n = std::max(128 * wide / tiles, 128) - 8 * static_cast<int>(random() % 16);
      std::deque<Linear> calls;
      for (int i = 0; i < 2; i++) {
        const PrefillConfig config = prefill_config(world, m, n, clusters, 128, any({2, 3}, random));
        Options options = any_options(world, random);
        if (i == 1) options.wild = true;
        calls.emplace_back(gpus, config, dtype, m, n, options, random).enqueue(gpus);
      }
      gpus.run();
      for (Linear& call : calls) ASSERT_EQ(call.wrong(), "") << "seed " << seed;
      expect_at_rest(gpus);
    }
  }
}

TEST(FusedCuda, TheTablesOwnChoicesRun) {
  std::mt19937_64 random(1);
  const struct {
    int world, n;
    const char* text;
  } rows[] = {{2, 504, "256x256 tiles, 1 x 2 in 2 CTAs, 3 stages, one-shot"},
              {2, 256, "256x256 tiles, 1 x 1 in 2 CTAs, 3 stages, one-shot"},
              {2, 376, "256x128 tiles, 1 x 3 in 2 CTAs, 6 stages, one-shot"},
              {2, 760, "256x256 tiles, 1 x 3 in 2 CTAs, 3 stages, one-shot"},
              {3, 376, "256x128 tiles, 1 x 3 in 2 CTAs, 6 stages, two-shot"},
              {4, 504, "256x128 tiles, 1 x 4 in 2 CTAs, 6 stages, two-shot"}};
  for (const auto& [world, n, text] : rows) {
    const int m = 250;
    const auto config = choose_prefill({m, n, world, kPrefillCluster});
    ASSERT_TRUE(config.has_value());
    EXPECT_EQ(to_string(*config), text);
    Gpus gpus(world, random(), 1e6, 2, 8 << 20);
    Linear call(gpus, *config, DType::bfloat16, m, n, {.bias = true, .static_weight = true}, random);
    call.enqueue(gpus);
    gpus.run();
    EXPECT_EQ(call.wrong(), "");
    expect_at_rest(gpus);
  }
}

// ---- calls in a row ----

Config any_config(int world, int* m, int* n, std::mt19937_64& random) {
  if (world == 8 || random() % 2 == 0) {
    *m = any({1, 8, 12, 30}, random);
    *n = 8 * (1 + static_cast<int>(random() % 20));
    return decode_config(world, *m, *n, any({1, 2}, random));
  }
  *m = any({66, 150}, random);
  const int tile_n = world == 2 ? any({128, 256}, random) : 128;
  const int tiles = world == 2 ? any({1, 2, 3}, random) : world;  // as many visits
  *n = tile_n * tiles - 8 * static_cast<int>(random() % 3);
  return prefill_config(world, *m, *n, 1, tile_n);
}

TEST(FusedCuda, WhatTheCallBeforeWritesIsReadOnlyThen) {
  for (uint64_t seed = 0; seed < seeds(6); seed++) {
    std::mt19937_64 random(seed);
    const int world = any({2, 4}, random);
    Gpus gpus(world, seed, 1e6, 2, 8 << 20);
    std::deque<Linear> calls;
    for (int i = 0; i < 3; i++) {
      int m, n;
      const Config config = any_config(world, &m, &n, random);
      Options options{.bias = i == 0, .y_inside = random() % 2 == 0, .from_collectives = true};
      options.pairs = static_cast<unsigned>(random());
      calls.emplace_back(gpus, config, kTypes[random() % 2], m, n, options, random);
    }
    for (int r = 0; r < world; r++) {
      for (Linear& call : calls) call.enqueue(gpus, r);
    }
    gpus.run();
    for (Linear& call : calls) EXPECT_EQ(call.wrong(), "") << "seed " << seed;
    expect_at_rest(gpus);
  }
}

TEST(FusedCuda, AReplayIsTheSameLaunchesAgain) {
  for (uint64_t seed = 0; seed < seeds(2); seed++) {
    std::mt19937_64 random(seed);
    const int world = seed % 2 == 0 ? 2 : 4;
    Gpus gpus(world, seed, 1e6, 2, 8 << 20);
    std::deque<Linear> calls;
    for (int i = 0; i < 3; i++) {
      int m, n;
      const Config config = any_config(world, &m, &n, random);
      calls.emplace_back(gpus, config, DType::bfloat16, m, n, any_options(world, random), random);
    }
    for (int replay = 0; replay < 3; replay++) {
      for (Linear& call : calls) call.clear();
      for (int r = 0; r < world; r++) {
        for (Linear& call : calls) call.enqueue(gpus, r);
        // An eager call between: the parity of each graph's calls changes.
        const Descriptor descriptor = describe(OpCode::barrier, Algorithm::one_shot, DType::bytes, 0);
        if (replay != 1) gpus[r].collectives->announce(descriptor, &gpus[r].stream);
      }
      gpus.run();
      for (Linear& call : calls) EXPECT_EQ(call.wrong(), "") << "seed " << seed << ", replay " << replay;
      expect_at_rest(gpus);
    }
  }
}

// ---- failures ----

constexpr size_t kArena = 8 << 20;
struct Kind {
  int world, m, n;
  Config config;
  unsigned pairs = 0;
  uint64_t seed = 0;
  Options options(bool bias = false) const { return {.bias = bias, .pairs = pairs}; }
};
std::vector<Kind> every_kind(uint64_t seeds) {
  GemmConfig two_shot = decode_config(4, 20, 200, 1);
  two_shot.two_shot = true;
  const Kind each[] = {{2, 20, 96, decode_config(2, 20, 96, 2)},
                       {4, 3, 200, decode_config(4, 3, 200, 2)},
                       {4, 20, 200, two_shot},
                       {8, 12, 120, decode_config(8, 12, 120, 2)},
                       {2, 12, 312, decode_config(2, 12, 312, 1), 1},    // five tiles of a pair on rank 0
                       {2, 40, 184, decode_config(2, 40, 184, 1), 0x3},  // three on both
                       {4, 20, 200, two_shot, 0x10005},                  // two pairs on ranks 0 and 2
                       {2, 100, 136, prefill_config(2, 100, 136, 2)},
                       {2, 100, 248, prefill_config(2, 100, 248, 1, 256)},
                       {2, 100, 504, prefill_config(2, 100, 504, 1, 256)},
                       {2, 100, 376, prefill_config(2, 100, 376, 1)},
                       {3, 100, 376, prefill_config(3, 100, 376, 2)},
                       {4, 100, 632, prefill_config(4, 100, 632, 1)}};
  std::vector<Kind> all;
  for (uint64_t seed = 0; seed < seeds; seed++) {
    for (const Kind& kind : each) all.push_back(kind), all.back().seed = seed;
  }
  return all;
}

TEST(FusedCuda, AMissingRankIsNamedYIsNanAndTheNextCallLeavesAtOnce) {
  for (const Kind& kind : every_kind(seeds(1))) {
    std::mt19937_64 random(kind.seed);
    Gpus gpus(kind.world, kind.seed, 80, 2, kArena);
    Linear fine(gpus, kind.config, DType::bfloat16, kind.m, kind.n, kind.options(), random),
        late(gpus, kind.config, DType::bfloat16, kind.m, kind.n, kind.options(), random),
        after(gpus, kind.config, DType::bfloat16, kind.m, kind.n, kind.options(), random);
    fine.enqueue(gpus);
    gpus.run();
    EXPECT_EQ(fine.wrong(), "");
    late.clear();
    after.clear();
    const int missing = kind.world - 1;
    for (int r = 0; r < missing; r++) {
      late.enqueue(gpus, r);
      after.enqueue(gpus, r);
    }
    gpus.run();
    for (int r = 0; r < missing; r++) {
      const AbortRecord& record = gpus[r].signal->own_pad()->device;
      EXPECT_EQ(record.state.load(), AbortRecord::kComplete) << late.what();
      EXPECT_EQ(record.kind, AbortKind::missing);
      EXPECT_EQ(record.culprits, 1u << missing) << "rank " << r << " of " << late.what();
      EXPECT_EQ(record.epoch, 2u);
      expect_broken(gpus.pad(r));
      EXPECT_TRUE(late.all_nan(r)) << "rank " << r << " of " << late.what();
      EXPECT_TRUE(after.all_nan(r)) << "rank " << r << " of " << after.what();
    }
  }
}

// Deadlines that end in the middle of a call, for some of its CTAs.
TEST(FusedCuda, WhatACallThatGaveUpLeavesIsRightOrNan) {
  int broken = 0;
  for (const Kind& kind : every_kind(seeds(8))) {
    std::mt19937_64 random(kind.seed);
    const double hurry = 0.1 * std::pow(200.0, static_cast<double>(random() % 1000) / 1000.0);
    Gpus gpus(kind.world, kind.seed, hurry, 2, kArena);
    Linear call(gpus, kind.config, DType::bfloat16, kind.m, kind.n, kind.options(), random);
    call.fill_y(0x11);
    call.enqueue(gpus);
    gpus.run();
    for (int r = 0; r < kind.world; r++) {
      broken += gpus.pad(r).gate[0].broken != 0 ? 1 : 0;
      ASSERT_TRUE(call.is_right_or_nan(r))
          << "seed " << kind.seed << ", " << hurry << " s, rank " << r << " of " << call.what();
    }
  }
  EXPECT_GT(broken, 5);
}

// A rank that took part and then stands still, its bulk copies apart: nobody may wait for it longer than the deadline.
TEST(FusedCuda, ARankThatStopsInTheMiddleIsWaitedForInVainAndYIsRightOrNan) {
  int broken = 0;
  for (const Kind& kind : every_kind(seeds(3))) {
    std::mt19937_64 random(kind.seed);
    Gpus gpus(kind.world, random(), 5, 2, kArena);
    Linear call(gpus, kind.config, DType::bfloat16, kind.m, kind.n, kind.options(), random);
    call.fill_y(0x11);
    call.enqueue(gpus);
    const double steps = 500 * std::pow(60.0, static_cast<double>(random() % 1000) / 1000.0);
    const int stopped = kind.world - 1;
    try {
      gpus.run(static_cast<uint64_t>(steps));
    } catch (const std::runtime_error&) {  // the kernels did not end within so many
      gpus.machine.forget(&gpus[stopped].stream);
      gpus.run();
    }
    for (int r = 0; r < stopped; r++) {
      const AbortRecord& record = gpus[r].signal->own_pad()->device;
      const bool gave_up = gpus.pad(r).gate[0].broken != 0;
      broken += gave_up ? 1 : 0;
      if (gave_up && kind.world == 2) {
        EXPECT_EQ(record.culprits, 1u << stopped) << call.what();
      }
      ASSERT_TRUE(call.is_right_or_nan(r))
          << "seed " << kind.seed << ", " << steps << " steps, rank " << r << " of " << call.what();
    }
  }
  EXPECT_GT(broken, 5);
}

TEST(FusedCuda, RanksThatDisagreeReportTheSame) {
  for (const Kind& kind : every_kind(seeds(2))) {
    std::mt19937_64 random(kind.seed);
    Gpus gpus(kind.world, kind.seed, 600, 2, kArena);
    // The same tiles: nothing but the headers tells.
    Linear a(gpus, kind.config, DType::bfloat16, kind.m, kind.n, kind.options(true), random),
        b(gpus, kind.config, DType::bfloat16, kind.m, kind.n, kind.options(), random);
    const int other = kind.world - 1;
    for (int r = 0; r < other; r++) a.enqueue(gpus, r);
    b.enqueue(gpus, other);
    gpus.run();
    for (int r = 0; r < kind.world; r++) {
      const AbortRecord& record = gpus[r].signal->own_pad()->device;
      EXPECT_EQ(record.kind, AbortKind::disagree) << "rank " << r << " of " << a.what();
      EXPECT_EQ(record.culprits, 1u << other);
      EXPECT_EQ(record.expected, a.descriptor);
      EXPECT_EQ(record.got, b.descriptor);
      expect_broken(gpus.pad(r));
    }
  }
}

// All_reduce pushes to slots before it has seen a header; what rank 0 sends lies at their beginning.
TEST(FusedCuda, WhatARankSentInAnotherCallIsNotSummed) {
  for (const Kind& kind : every_kind(seeds(2))) {
    if (!std::holds_alternative<PrefillConfig>(kind.config)) continue;
    std::mt19937_64 random(kind.seed);
    Gpus gpus(kind.world, kind.seed, 600, 2, kArena);
    Linear linear(gpus, kind.config, DType::bfloat16, kind.m, kind.n, kind.options(), random);
    linear.clear();
    const size_t elements = 32 << 10;
    Buffer x(elements, DType::bfloat16), y(elements, DType::bfloat16);
    std::memset(x.data(), 0, x.bytes());
    const int last = kind.world - 1;
    for (int r = 0; r < last; r++) {
      gpus[r].collectives->all_reduce(describe(OpCode::all_reduce, Algorithm::one_shot, DType::bfloat16, elements),
                                      {x.data(), y.data(), elements, DType::bfloat16}, &gpus[r].stream);
    }
    linear.enqueue(gpus, last);
    gpus.run();
    EXPECT_EQ(gpus[last].signal->own_pad()->device.kind, AbortKind::disagree) << linear.what();
    EXPECT_TRUE(linear.all_nan(last)) << linear.what();
  }
}

TEST(FusedCuda, ARankThatLeftIsNamedBeforeTheDeadline) {
  for (const Kind& kind : every_kind(seeds(1))) {
    std::mt19937_64 random(kind.seed);
    Gpus gpus(kind.world, kind.seed, 1000, 2, kArena);
    Linear call(gpus, kind.config, DType::float16, kind.m, kind.n, kind.options(), random);
    call.clear();
    gpus[0].signal->own_pad()->left.store(1u << 1);
    call.enqueue(gpus, 0);
    gpus.run();
    EXPECT_EQ(gpus[0].signal->own_pad()->device.kind, AbortKind::left) << call.what();
    EXPECT_EQ(gpus[0].signal->own_pad()->device.culprits, 1u << 1);
    EXPECT_TRUE(call.all_nan(0)) << call.what();
  }
}

TEST(FusedCuda, AReplayAfterTheGroupsEndTouchesNobody) {
  for (const Kind& kind : every_kind(1)) {
    std::mt19937_64 random(kind.seed);
    Gpus gpus(kind.world, kind.seed, 1e6, 2, kArena);
    Linear call(gpus, kind.config, DType::bfloat16, kind.m, kind.n, kind.options(), random);
    call.clear();
    mark_broken(&gpus.pad(0));  // as the group's end does
    std::vector<std::vector<std::byte>> before;
    for (int r = 1; r < kind.world; r++) {
      before.emplace_back(gpus[r].arena->base(), gpus[r].arena->base() + gpus[r].arena->bytes());
    }
    call.enqueue(gpus, 0);
    gpus.run();
    for (int r = 1; r < kind.world; r++) {
      const auto& then = before[static_cast<size_t>(r - 1)];
      EXPECT_EQ(std::memcmp(then.data(), gpus[r].arena->base(), then.size()), 0) << call.what();
    }
    EXPECT_TRUE(call.all_nan(0)) << call.what();
  }
}

}  // namespace
}  // namespace sglang_symm::testing
