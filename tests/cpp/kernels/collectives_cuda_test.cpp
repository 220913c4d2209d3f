// The collectives' CUDA kernels on the emulator: bits, protocol, failures.
#include <array>
#include <numeric>
#include <optional>

#include "collective/norm_cuda.h"
#include "gpus.h"

namespace sglang_symm::testing {
namespace {

constexpr DType kFloats[] = {DType::float32, DType::bfloat16, DType::float16};
constexpr Algorithm kSums[] = {Algorithm::one_shot, Algorithm::two_shot, Algorithm::two_shot_direct};

// A tensor of one rank, in its arena or outside of it.
struct Tensor {
  Tensor(Gpu& gpu, size_t count, DType dtype, bool inside, size_t misalignment = 0)
      : outside(count, dtype, misalignment) {
    data = inside && misalignment == 0 ? gpu.inside<std::byte>(count * element_size(dtype)) : outside.data();
  }
  Buffer outside;
  std::byte* data;
};

// One all_reduce of all ranks, enqueued and not run.
struct AllReduce {
  AllReduce(Gpus& gpus, Algorithm algorithm, DType dtype, size_t count, std::mt19937_64& random, bool with_bias = false)
      : dtype(dtype), count(count), bias(count / 3 + 1, dtype), expected(count, dtype) {
    const size_t world = static_cast<size_t>(gpus.size());
    fill_at_random(bias.data(), count / 3 + 1, dtype, random);
    for (int r = 0; r < gpus.size(); r++) {
      // Where tensors lie is each rank's own affair.
      const size_t misalignment = random() % 3 == 0 ? element_size(dtype) : 0;
      in.emplace_back(gpus[r], count, dtype, random() % 2 == 0, misalignment);
      out.emplace_back(gpus[r], count, dtype, random() % 2 == 0, random() % 3 == 0 ? element_size(dtype) : 0);
      fill_at_random(in.back().data, count, dtype, random);
    }
    std::vector<const void*> sources(world);
    for (size_t r = 0; r < world; r++) sources[r] = in[r].data;
    void* output = expected.data();
    SumTask task{sources.data(), gpus.size(), &output, 1, count, dtype};
    if (with_bias) task.bias = bias.data(), task.bias_length = count / 3 + 1;
    if (count > 0) sum_in_rank_order(task, CpuPath::portable);
    descriptor = describe(OpCode::all_reduce, algorithm, dtype, count);
    for (int r = 0; r < gpus.size(); r++) {
      AllReduceArgs args{in[static_cast<size_t>(r)].data, out[static_cast<size_t>(r)].data, count, dtype};
      args.bias = task.bias;
      args.bias_length = task.bias_length;
      calls.push_back(args);
    }
  }
  void enqueue(Gpus& gpus, int rank) {
    gpus[rank].collectives->all_reduce(descriptor, calls[static_cast<size_t>(rank)], &gpus[rank].stream);
  }
  void enqueue(Gpus& gpus) {
    for (int r = 0; r < gpus.size(); r++) enqueue(gpus, r);
  }
  // The first element that is not as expected, on any rank.
  std::optional<std::string> wrong() {
    const size_t size = element_size(dtype);
    for (size_t r = 0; r < out.size(); r++) {
      for (size_t i = 0; i < count; i++) {
        if (std::memcmp(out[r].data + i * size, expected.data() + i * size, size) != 0) {
          return "rank " + std::to_string(r) + ", element " + std::to_string(i) + " of " + to_string(descriptor);
        }
      }
      if (!in[r].outside.untouched_around() || !out[r].outside.untouched_around()) {
        return "rank " + std::to_string(r) + ": bytes beside a tensor, " + to_string(descriptor);
      }
    }
    return std::nullopt;
  }

  DType dtype;
  size_t count;
  Buffer bias;
  Buffer expected;
  Descriptor descriptor;
  std::deque<Tensor> in, out;
  std::vector<AllReduceArgs> calls;
};

TEST(CollectivesCuda, AllReduceGivesTheBitsOfTheCpusSumInEveryAlgorithm) {
  for (const int world : {2, 3, 4, 5, 8, 16}) {
    for (const Algorithm algorithm : kSums) {
      for (const DType dtype : kFloats) {
        std::mt19937_64 random(static_cast<uint64_t>(world) * 100 + static_cast<uint64_t>(algorithm));
        Gpus gpus(world, random(), 1e6, 2, world > 8 ? 8 << 20 : 4 << 20);
        std::deque<AllReduce> calls;
        for (const size_t count : {size_t{0}, size_t{1}, size_t{9}, size_t{203}, size_t{2048}}) {
          if (world > 4 && count > 1000) break;
          calls.emplace_back(gpus, algorithm, dtype, count, random, count % 2 == 1).enqueue(gpus);
        }
        gpus.run();
        for (AllReduce& call : calls) EXPECT_EQ(call.wrong().value_or(""), "") << world << " ranks";
        expect_at_rest(gpus);
      }
    }
  }
}

TEST(CollectivesCuda, CallsOfAllAlgorithmsAndSizesOverlapAndEachIsItsOwn) {
  for (uint64_t seed = 0; seed < seeds(12); seed++) {
    std::mt19937_64 random(seed);
    const int world = 2 + static_cast<int>(random() % 4);
    Gpus gpus(world, seed, 1e6, 1 + static_cast<int>(random() % 3));
    std::deque<AllReduce> calls;
    for (int i = 0; i < 8; i++) {
      const size_t most[] = {4, 300, 3000};
      calls.emplace_back(gpus, kSums[random() % 3], kFloats[random() % 3], random() % most[random() % 3], random,
                         random() % 2 == 0);
    }
    // Ranks are ahead of each other by as many calls as the protocol lets them.
    for (int r = 0; r < world; r++) {
      for (AllReduce& call : calls) call.enqueue(gpus, r);
    }
    gpus.run();
    for (AllReduce& call : calls) EXPECT_EQ(call.wrong().value_or(""), "") << "seed " << seed;
    expect_at_rest(gpus);
  }
}

// Headers come from CTA 0 alone, so they say nothing about what the other CTAs have sent.
TEST(CollectivesCuda, EveryCtaOfADirectCallWaitsForTheContributionsOfItsPeers) {
  for (uint64_t seed = 0; seed < seeds(12); seed++) {
    std::mt19937_64 random(seed);
    const int world = 2 + static_cast<int>(random() % 2);
    Gpus gpus(world, seed, 1e6, 3);
    std::deque<AllReduce> calls;
    for (int i = 0; i < 4; i++) {
      calls.emplace_back(gpus, Algorithm::two_shot_direct, DType::float32, 2400 + random() % 600, random,
                         random() % 2 == 0);
    }
    for (AllReduce& call : calls) call.enqueue(gpus);
    gpus.run();
    for (AllReduce& call : calls) EXPECT_EQ(call.wrong().value_or(""), "") << "seed " << seed;
    expect_at_rest(gpus);
  }
}

TEST(CollectivesCuda, ACallLargerThanTheSlotsGoesInRounds) {
  for (const Algorithm algorithm : kSums) {
    std::mt19937_64 random(7);
    Gpus gpus(2, 7);
    const size_t count = gpus.layout().slot_bytes / 4 + 4099;
    AllReduce call(gpus, algorithm, DType::float32, count, random, true);
    call.enqueue(gpus);
    gpus.run(500'000'000);
    EXPECT_EQ(call.wrong().value_or(""), "");
    expect_at_rest(gpus);
  }
}

TEST(CollectivesCuda, AReplayIsTheSameLaunchesAgain) {
  std::mt19937_64 random(3);
  Gpus gpus(3, 3);
  AllReduce first(gpus, Algorithm::one_shot, DType::bfloat16, 500, random);
  AllReduce second(gpus, Algorithm::two_shot, DType::bfloat16, 700, random);
  for (int replay = 0; replay < 5; replay++) {
    for (Tensor& out : first.out) std::memset(out.data, 0, 1000);
    first.enqueue(gpus);
    second.enqueue(gpus);
    if (replay % 2 == 0) first.enqueue(gpus);  // an eager call between
    gpus.run();
    EXPECT_EQ(first.wrong().value_or(""), "");
    EXPECT_EQ(second.wrong().value_or(""), "");
  }
  EXPECT_EQ(gpus.pad(0).epoch(0), 13u);
  expect_at_rest(gpus);
}

TEST(CollectivesCuda, ReduceScatterAllGatherAndBroadcastMixed) {
  for (uint64_t seed = 0; seed < seeds(12); seed++) {
    std::mt19937_64 random(seed);
    const int world = 2 + static_cast<int>(random() % 4);
    const size_t ranks = static_cast<size_t>(world);
    Gpus gpus(world, seed);
    std::deque<std::vector<std::byte>> tensors, wants;
    std::deque<std::pair<std::byte*, std::vector<std::byte>*>> results;
    for (int i = 0; i < 6; i++) {
      std::vector<size_t> sizes(ranks);
      for (size_t& size : sizes) size = random() % (random() % 3 == 0 ? 2000 : 40);
      if (random() % 6 == 0) sizes[random() % ranks] = 8192 + random() % 8192;  // more than two rounds of the grid
      const size_t total = std::accumulate(sizes.begin(), sizes.end(), size_t{0});
      const bool direct = random() % 2 == 0;
      const auto tensor = [&](int rank, size_t bytes) {
        if (random() % 2 == 0) return gpus[rank].inside<std::byte>(bytes + 1);
        return tensors.emplace_back(bytes + 32).data() + random() % 16;
      };
      const int kind = static_cast<int>(random() % 3);
      if (kind == 0) {  // reduce_scatter of float32
        std::vector<std::byte*> in(ranks);
        std::vector<const void*> sources(ranks);
        for (int r = 0; r < world; r++) {
          sources[static_cast<size_t>(r)] = in[static_cast<size_t>(r)] = tensor(r, total * 4 + 16) + 0;
          // Elements are aligned to themselves.
          const auto address = reinterpret_cast<uintptr_t>(in[static_cast<size_t>(r)]);
          in[static_cast<size_t>(r)] += (4 - address % 4) % 4;
          sources[static_cast<size_t>(r)] = in[static_cast<size_t>(r)];
          fill_at_random(in[static_cast<size_t>(r)], total, DType::float32, random);
        }
        std::vector<std::byte> sum(total * 4 + 1);
        void* output = sum.data();
        if (total > 0) {
          sum_in_rank_order({sources.data(), world, &output, 1, total, DType::float32}, CpuPath::portable);
        }
        size_t begin = 0;
        for (int r = 0; r < world; r++) {
          const size_t mine = sizes[static_cast<size_t>(r)];
          std::byte* out = tensor(r, mine * 4 + 16);
          out += (4 - reinterpret_cast<uintptr_t>(out) % 4) % 4;
          auto& want = wants.emplace_back(sum.begin() + static_cast<std::ptrdiff_t>(begin * 4),
                                          sum.begin() + static_cast<std::ptrdiff_t>((begin + mine) * 4));
          begin += mine;
          results.emplace_back(out, &want);
          gpus[r].collectives->reduce_scatter(
              describe(OpCode::reduce_scatter, Algorithm::one_shot, DType::float32, total), in[static_cast<size_t>(r)],
              out, sizes, &gpus[r].stream);
        }
      } else {  // copies of bytes
        const Algorithm algorithm = direct ? Algorithm::two_shot_direct : Algorithm::one_shot;
        const int src = static_cast<int>(random() % ranks);
        auto& want = wants.emplace_back(kind == 1 ? total : sizes[0]);
        for (std::byte& byte : want) byte = static_cast<std::byte>(random());
        size_t begin = 0;
        for (int r = 0; r < world; r++) {
          std::byte* out = tensor(r, want.size());
          results.emplace_back(out, &want);
          if (kind == 1) {
            std::byte* in = tensor(r, sizes[static_cast<size_t>(r)]);
            std::memcpy(in, want.data() + begin, sizes[static_cast<size_t>(r)]);
            begin += sizes[static_cast<size_t>(r)];
            gpus[r].collectives->all_gather(describe(OpCode::all_gather, algorithm, DType::bytes, total), in, out,
                                            sizes, &gpus[r].stream);
          } else {
            if (r == src) std::memcpy(out, want.data(), want.size());
            gpus[r].collectives->broadcast(describe(OpCode::broadcast, algorithm, DType::bytes, sizes[0]), out,
                                           want.size(), src, &gpus[r].stream);
          }
        }
      }
    }
    for (int r = 0; r < world; r++) {
      gpus[r].collectives->announce(describe(OpCode::barrier, Algorithm::one_shot, DType::bytes, 0), &gpus[r].stream);
    }
    gpus.run();
    for (const auto& [out, want] : results) {
      EXPECT_EQ(std::memcmp(out, want->data(), want->size()), 0) << "seed " << seed;
    }
    expect_at_rest(gpus);
  }
}

// ---- failures ----

bool all_nan(const std::byte* data, size_t count) {
  for (size_t i = 0; i < count; i++) {
    float f;
    std::memcpy(&f, data + i * 4, 4);
    if (f == f) return false;
  }
  return true;
}

TEST(CollectivesCuda, AMissingRankIsNamedTheOutputIsNanAndTheNextCallLeavesAtOnce) {
  for (const Algorithm algorithm : kSums) {
    std::mt19937_64 random(5);
    Gpus gpus(3, 5, 10);
    AllReduce fine(gpus, algorithm, DType::float32, 200, random), late(gpus, algorithm, DType::float32, 200, random),
        after(gpus, algorithm, DType::float32, 200, random);
    fine.enqueue(gpus);
    gpus.run();
    EXPECT_EQ(fine.wrong().value_or(""), "");
    for (const int r : {0, 2}) {
      late.enqueue(gpus, r);
      after.enqueue(gpus, r);
    }
    gpus.run();
    for (const int r : {0, 2}) {
      const AbortRecord& record = gpus[r].signal->own_pad()->device;
      EXPECT_EQ(record.state.load(), AbortRecord::kComplete);
      EXPECT_EQ(record.kind, AbortKind::missing);
      EXPECT_EQ(record.culprits, 1u << 1) << "rank " << r;
      EXPECT_EQ(record.epoch, 2u);
      EXPECT_EQ(record.seconds, 10);
      expect_broken(gpus.pad(r));
      // Somebody's share may have come; what has not is NaN. Nothing of the call after is left to chance.
      EXPECT_TRUE(all_nan(after.out[static_cast<size_t>(r)].data, 200));
      if (algorithm != Algorithm::two_shot) {
        EXPECT_TRUE(all_nan(late.out[static_cast<size_t>(r)].data, 200));
      }
    }
  }
}

// Deadlines that end in the middle of a call, for some of its CTAs.
Gpus in_a_hurry(int world, uint64_t seed, std::mt19937_64& random) {
  return Gpus(world, seed, 0.05 + static_cast<double>(random() % 400) / 100.0, 3);
}

TEST(CollectivesCuda, WhatACallThatGaveUpLeavesIsRightOrNan) {
  int broken = 0;
  for (uint64_t seed = 0; seed < seeds(90); seed++) {
    std::mt19937_64 random(seed);
    const int world = 2 + static_cast<int>(random() % 2);
    Gpus gpus = in_a_hurry(world, seed, random);
    AllReduce call(gpus, kSums[seed % 3], DType::float32, 2400 + random() % 600, random);
    for (Tensor& t : call.out) std::memset(t.data, 0x11, call.count * 4);
    call.enqueue(gpus);
    gpus.run();
    for (int r = 0; r < world; r++) {
      broken += gpus.pad(r).gate[0].broken != 0 ? 1 : 0;
      for (size_t i = 0; i < call.count; i++) {
        float got;
        std::memcpy(&got, call.out[static_cast<size_t>(r)].data + 4 * i, 4);
        const bool right = std::memcmp(&got, call.expected.data() + 4 * i, 4) == 0;
        ASSERT_TRUE(right || got != got) << "seed " << seed << ", rank " << r << ", element " << i << " of "
                                         << to_string(call.descriptor);
      }
    }
  }
  EXPECT_GT(broken, 5);
}

TEST(CollectivesCuda, WhatACopyThatGaveUpLeavesIsRightOrAllBitsSet) {
  int broken = 0;
  for (uint64_t seed = 0; seed < seeds(90); seed++) {
    std::mt19937_64 random(seed);
    const int world = 2 + static_cast<int>(random() % 2);
    Gpus gpus = in_a_hurry(world, seed, random);
    const bool gathers = seed % 3 != 2, inside = random() % 2 == 0;
    std::vector<size_t> sizes;
    for (int r = 0; r < world; r++) sizes.push_back(gathers ? 4 * (2000 + random() % 600) : r == 0 ? 9000 : 0);
    const size_t total = std::accumulate(sizes.begin(), sizes.end(), size_t{0});
    const Descriptor descriptor = describe(gathers ? OpCode::all_gather : OpCode::broadcast, Algorithm::two_shot_direct,
                                           DType::float32, total / 4);
    const auto of_rank = [](int r) { return 0x20 + r; };
    std::deque<Tensor> in, out;
    for (int r = 0; r < world; r++) {
      in.emplace_back(gpus[r], total / 4, DType::float32, true);
      out.emplace_back(gpus[r], total / 4, DType::float32, inside);
      std::memset(in.back().data, of_rank(r), total);
      std::memset(out.back().data, gathers || r != 0 ? 0x11 : of_rank(0), total);
    }
    for (int r = 0; r < world; r++) {
      std::byte *from = in[static_cast<size_t>(r)].data, *to = out[static_cast<size_t>(r)].data;
      if (gathers) gpus[r].collectives->all_gather(descriptor, from, to, sizes, &gpus[r].stream);
      if (!gathers) gpus[r].collectives->broadcast(descriptor, to, total, 0, &gpus[r].stream);
    }
    gpus.run();
    for (int r = 0; r < world; r++) {
      broken += gpus.pad(r).gate[0].broken != 0 ? 1 : 0;
      const std::byte* got = out[static_cast<size_t>(r)].data;
      for (int s = 0; s < world; s++) {
        for (size_t i = 0; i < sizes[static_cast<size_t>(s)]; i++, got++) {
          ASSERT_TRUE(*got == std::byte(of_rank(s)) || *got == std::byte{0xFF})
              << "seed " << seed << ", rank " << r << ", byte " << i << " of rank " << s << "'s";
        }
      }
    }
  }
  EXPECT_GT(broken, 5);
}

TEST(CollectivesCuda, RanksThatDisagreeReportTheSame) {
  for (uint64_t seed = 0; seed < seeds(12); seed++) {
    std::mt19937_64 random(seed);
    Gpus gpus(3, seed, 500);
    // Of several CTAs each: some begin when others have seen the difference.
    const Algorithm algorithm = kSums[seed % 3];
    AllReduce a(gpus, algorithm, DType::float32, 3000, random), b(gpus, algorithm, DType::float32, 3000, random);
    b.descriptor.aux = 1;
    a.enqueue(gpus, 0);
    a.enqueue(gpus, 1);
    b.enqueue(gpus, 2);
    gpus.run();
    for (int r = 0; r < 3; r++) {
      const AbortRecord& record = gpus[r].signal->own_pad()->device;
      EXPECT_EQ(record.kind, AbortKind::disagree) << "rank " << r << ", seed " << seed;
      EXPECT_EQ(record.culprits, 1u << 2);
      EXPECT_EQ(record.expected, a.descriptor);
      EXPECT_EQ(record.got, b.descriptor);
      expect_broken(gpus.pad(r));
    }
  }
}

TEST(CollectivesCuda, ARankThatLeftIsNamedBeforeTheDeadline) {
  std::mt19937_64 random(9);
  Gpus gpus(2, 9, 1000);
  AllReduce call(gpus, Algorithm::two_shot_direct, DType::float32, 50, random);
  gpus[0].signal->own_pad()->left.store(1u << 1);
  call.enqueue(gpus, 0);
  gpus.run();
  EXPECT_EQ(gpus[0].signal->own_pad()->device.kind, AbortKind::left);
  EXPECT_EQ(gpus[0].signal->own_pad()->device.culprits, 1u << 1);
  EXPECT_TRUE(all_nan(call.out[0].data, 50));
}

TEST(CollectivesCuda, TheHostsAbortEndsAWaitBeforeTheDeadline) {
  std::mt19937_64 random(9);
  Gpus gpus(2, 9, 1000);
  AllReduce call(gpus, Algorithm::one_shot, DType::float32, 50, random);
  const_cast<AbortRecord*>(gpus[0].signal->abort_record())->state.store(AbortRecord::kComplete);
  call.enqueue(gpus, 1);
  gpus.run();
  expect_broken(gpus.pad(1));
  EXPECT_EQ(gpus[1].signal->own_pad()->device.state.load(), AbortRecord::kEmpty) << "the hosts know already";
  EXPECT_TRUE(all_nan(call.out[1].data, 50));
}

TEST(CollectivesCuda, AReplayAfterTheGroupsEndTouchesNobody) {
  std::mt19937_64 random(2);
  Gpus gpus(2, 2);
  AllReduce call(gpus, Algorithm::one_shot, DType::float32, 50, random);
  mark_broken(&gpus.pad(0));  // as the group's end does
  const std::vector<std::byte> before(gpus[1].arena->base(), gpus[1].arena->base() + gpus.layout().heap);
  call.enqueue(gpus, 0);
  gpus.run();
  EXPECT_EQ(std::memcmp(before.data(), gpus[1].arena->base(), before.size()), 0);
  EXPECT_TRUE(all_nan(call.out[0].data, 50));
}

TEST(CollectivesCuda, AWindowThatShowsAnotherArenaIsFoundByNameBeforeTheFirstCall) {
  struct Mistake {
    int rank, arena;  // in which that rank finds it
    Mapping mapping;
  };
  const Mistake mistakes[] = {
      // Two, the wrong way round; one for two; one for another.
      {0, 1, [](int rank, int peer) { return rank == 0 ? 3 - peer : peer; }},
      {2, 0, [](int rank, int peer) { return rank == 2 ? 1 : peer; }},
      {1, 0, [](int rank, int peer) { return rank == 1 && peer == 0 ? 2 : peer; }},
      // Its own for another: what it wrote there is in place of its own.
      {1, 1, [](int rank, int peer) { return rank == 1 && peer == 2 ? 1 : peer; }},
  };
  for (const Mistake& mistake : mistakes) {
    const Gpus gpus(3, 1, 1e6, 2, 4 << 20, mistake.mapping);
    const std::string& said = gpus.errors[static_cast<size_t>(mistake.rank)];
    EXPECT_NE(said.find(cat("group 'g': rank ", mistake.rank, " (cuda:0) reads ")), std::string::npos) << said;
    EXPECT_NE(said.find(cat(" from the arena of rank ", mistake.arena, ", expected ")), std::string::npos) << said;
    EXPECT_NE(said.find(cat("the memory that it maps is not rank ", mistake.arena, "'s")), std::string::npos) << said;
    // The others miss what that rank was to write, or find what it was not to: nobody goes on without it.
    for (const std::string& error : gpus.errors) EXPECT_NE(error, "") << said;
  }
}

// ---- residual and norm ----

TEST(CollectivesCuda, AllReduceNormIsTheSumAddedAndScaledRowByRow) {
  for (uint64_t seed = 0; seed < seeds(6); seed++) {
    std::mt19937_64 random(seed);
    const int world = 2 + static_cast<int>(random() % 3);
    const DType dtype = kFloats[random() % 3];
    Gpus gpus(world, seed);
    const uint32_t columns = 1 + static_cast<uint32_t>(random() % 300), rows = 1 + static_cast<uint32_t>(random() % 5);
    const size_t count = size_t{rows} * columns;
    const auto numbers = [&](size_t n) {
      Buffer b(n, dtype);
      for (size_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(static_cast<float>(static_cast<int>(random() % 17) - 8) / 4, dtype);
        std::memcpy(b.data() + i * element_size(dtype), &bits, element_size(dtype));
      }
      return b;
    };
    Buffer residual = numbers(count), weight = numbers(columns);
    std::deque<Buffer> in, y, hidden;
    for (int r = 0; r < world; r++) {
      in.push_back(numbers(count));
      y.emplace_back(count, dtype);
      hidden.emplace_back(count, dtype);
    }
    const Descriptor descriptor = describe(OpCode::all_reduce_add_rms_norm, Algorithm::one_shot, dtype, count);
    for (int r = 0; r < world; r++) {
      const size_t i = static_cast<size_t>(r);
      NormCuda norm{};
      norm.call = gpus[r].collectives->enter(descriptor, &gpus[r].stream);
      norm.dtype = dtype;
      norm.in = in[i].data();
      norm.residual = residual.data();
      norm.weight = weight.data();
      norm.y = y[i].data();
      norm.hidden = hidden[i].data();
      norm.rows = rows;
      norm.columns = columns;
      norm.eps = 1e-5f;
      norm.slots = gpus.layout().slots;
      norm.slot_bytes = gpus.layout().slot_bytes;
      launch_all_reduce_norm(norm, 2, &gpus[r].stream);
    }
    gpus.run();
    for (uint32_t row = 0; row < rows; row++) {
      double squares = 0;
      for (uint32_t c = 0; c < columns; c++) {
        const size_t i = size_t{row} * columns + c;
        float sum = 0;
        for (Buffer& x : in) sum += to_float32(x.data(), i, dtype);
        const float h = sum + to_float32(residual.data(), i, dtype);  // exact: small multiples of 1/4
        EXPECT_EQ(to_float32(hidden[0].data(), i, dtype), h);
        squares += double{h} * h;
      }
      const double scale = 1 / std::sqrt(squares / columns + 1e-5);
      const double unit = dtype == DType::float32 ? 1e-6 : dtype == DType::bfloat16 ? 1.0 / 128 : 1.0 / 1024;
      for (uint32_t c = 0; c < columns; c++) {
        const size_t i = size_t{row} * columns + c;
        const double want = to_float32(weight.data(), c, dtype) * to_float32(hidden[0].data(), i, dtype) * scale;
        EXPECT_NEAR(to_float32(y[0].data(), i, dtype), want, unit * std::abs(want) + 1e-7);
      }
    }
    for (size_t r = 1; r < y.size(); r++) {
      EXPECT_TRUE(y[r] == y[0]) << "rank " << r;
      EXPECT_TRUE(hidden[r] == hidden[0]) << "rank " << r;
    }
    expect_at_rest(gpus);
  }
}

}  // namespace
}  // namespace sglang_symm::testing
