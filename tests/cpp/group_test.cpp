#include "group/group.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <random>

#include "ranks.h"

namespace sglang_symm {
namespace {

using testing::all_reduce;
using testing::describe;
using testing::expect_no_errors;
using testing::repetitions;
using testing::run_ranks;
using testing::value;

constexpr Algorithm kNative[] = {Algorithm::one_shot, Algorithm::two_shot, Algorithm::two_shot_direct};

TEST(Group, AllReduceIsRightForEveryWorldSizeCountAndAlgorithm) {
  for (const int world : {1, 2, 3, 5, 16}) {
    expect_no_errors(run_ranks(world, [&](Group& group) {
      for (const Algorithm algorithm : kNative) {
        for (const size_t count : {0, 1, 63, 64, 1000, 16384, 16385, 40000}) {  // a slot of 64 KiB holds 16384
          std::vector<float> x(count);
          for (size_t i = 0; i < count; i++) x[i] = value(group.rank(), i);
          all_reduce(group, algorithm, x);
          for (size_t i = 0; i < count; i++) {
            float expected = 0;
            for (int r = 0; r < world; r++) expected += value(r, i);
            if (x[i] != expected) throw std::runtime_error(cat(name(algorithm), " count ", count, " element ", i));
          }
        }
      }
    }));
  }
}

TEST(Group, RanksWhoseTensorsLieInTheArenaAndOutsideGiveTheSameSum) {
  expect_no_errors(run_ranks(3, [&](Group& group) {
    constexpr size_t kCount = 50000;
    std::vector<float> outside(kCount);
    const bool inside = group.rank() != 1;
    float* x = inside ? static_cast<float*>(group.arena()->allocate(kCount * sizeof(float))) : outside.data();
    for (int repeat = 0; repeat < 20; repeat++) {
      for (size_t i = 0; i < kCount; i++) x[i] = value(group.rank(), i + static_cast<size_t>(repeat));
      group.collectives().all_reduce(describe(OpCode::all_reduce, Algorithm::two_shot_direct, DType::float32, kCount),
                                     {x, x, kCount, DType::float32});
      for (size_t i = 0; i < kCount; i++) {
        float expected = 0;
        for (int r = 0; r < 3; r++) expected += value(r, i + static_cast<size_t>(repeat));
        if (x[i] != expected) throw std::runtime_error(cat("repeat ", repeat, " element ", i));
      }
    }
    if (inside) group.arena()->free(x);
  }));
}

TEST(Group, ReduceScatterAllGatherAndBroadcastMoveUnevenParts) {
  for (const Algorithm algorithm : {Algorithm::one_shot, Algorithm::two_shot_direct}) {
    expect_no_errors(run_ranks(3, [&](Group& group) {
      const std::vector<size_t> sizes{40000, 0, 17};
      const size_t me = static_cast<size_t>(group.rank());
      const size_t total = 40017;
      std::vector<float> in(total), out(sizes[me]);
      for (size_t i = 0; i < total; i++) in[i] = value(group.rank(), i);
      group.collectives().reduce_scatter(describe(OpCode::reduce_scatter, algorithm, DType::float32, total), in.data(),
                                         out.data(), sizes);
      const size_t begin = me == 2 ? 40000 : 0;
      for (size_t i = 0; i < sizes[me]; i++) {
        const float expected = value(0, begin + i) + value(1, begin + i) + value(2, begin + i);
        if (out[i] != expected) throw std::runtime_error(cat("reduce_scatter element ", i));
      }
      std::vector<size_t> bytes;
      for (const size_t n : sizes) bytes.push_back(n * sizeof(float));
      std::vector<float> all(total);
      group.collectives().all_gather(describe(OpCode::all_gather, algorithm, DType::float32, total), out.data(),
                                     all.data(), bytes);
      for (size_t i = 0; i < total; i++) {
        const float expected = value(0, i) + value(1, i) + value(2, i);
        if (all[i] != expected) throw std::runtime_error(cat("all_gather element ", i));
      }
      for (int src = 0; src < 3; src++) {
        std::vector<float> data(30000, static_cast<float>(group.rank()));
        group.collectives().broadcast(describe(OpCode::broadcast, algorithm, DType::float32, data.size()), data.data(),
                                      data.size() * sizeof(float), src);
        for (const float x : data) {
          if (x != static_cast<float>(src)) throw std::runtime_error("broadcast");
        }
      }
    }));
  }
}

TEST(Group, ManyCallsOfMixedAlgorithmsNeverReadAnOldSlot) {
  expect_no_errors(run_ranks(2, [&](Group& group) {
    std::vector<float> x(257);
    for (int call = 0; call < 3000; call++) {
      for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<float>(call * (group.rank() + 1));
      all_reduce(group, kNative[call % 3], x);
      for (const float y : x) {
        if (y != static_cast<float>(call * 3)) throw std::runtime_error(cat("call ", call, ": ", y));
      }
    }
  }));
}

TEST(Group, DisagreeingRanksRaiseTheSameSentence) {
  const auto errors = run_ranks(3, [&](Group& group) {
    std::vector<float> x(group.rank() == 1 ? 3 : 4);
    all_reduce(group, Algorithm::one_shot, x);
  });
  EXPECT_NE(errors[0].find("rank 0 called all_reduce(float32, 4 elements, sum), rank 1 called all_reduce(float32, 3 "),
            std::string::npos)
      << errors[0];
  EXPECT_EQ(errors[0], errors[1]);
  EXPECT_EQ(errors[0], errors[2]);
}

TEST(Group, NoDisagreementIsMissedWhateverFieldOfACallDiffers) {
  const int n = repetitions(300);
  std::mt19937 random(11);
  const auto pick = [&](int limit) { return static_cast<int>(random() % static_cast<unsigned>(limit)); };
  for (int i = 0; i < n; i++) {
    const int world = 2 + pick(3);
    const int culprit = pick(world);
    const Algorithm algorithm = kNative[pick(3)];
    Descriptor agreed = describe(OpCode::all_reduce, algorithm, DType::float32, 1 + static_cast<uint64_t>(pick(100)));
    Descriptor other = agreed;
    const int field = pick(6);
    if (field == 0) other.op = pick(2) == 0 ? OpCode::barrier : OpCode::row_parallel_linear;
    if (field == 1) other.dtype = DType::bfloat16;
    if (field == 2) other.count += 1 + static_cast<uint64_t>(pick(1 << 20));
    if (field == 3) other.aux = 1 + static_cast<uint32_t>(pick(1000));
    if (field == 4) other.flags = Descriptor::kHasBias;
    if (field == 5) other.flags = static_cast<uint8_t>(ReduceOp::max);
    const int calls_before = pick(3);
    const auto errors = run_ranks(world, [&](Group& group) {
      std::vector<float> x(agreed.count);
      for (int call = 0; call < calls_before; call++) all_reduce(group, algorithm, x);
      group.collectives().exchange(group.rank() == culprit ? other : agreed);
    });
    for (const std::string& error : errors) {
      ASSERT_NE(error.find(cat("ranks disagree in call ", calls_before + 1)), std::string::npos)
          << "repetition " << i << ", field " << field << ": '" << error << "'";
      ASSERT_EQ(error, errors[0]) << "repetition " << i;
    }
    ASSERT_NE(errors[0].find(cat("rank ", culprit == 0 ? 1 : culprit, " called")), std::string::npos) << errors[0];
  }
}

TEST(Group, AMissingRankIsNamedAtTheDeadlineAndFindsTheSentenceItself) {
  const auto errors = run_ranks(
      3,
      [&](Group& group) {
        std::vector<float> x(4);
        all_reduce(group, Algorithm::one_shot, x);
        if (group.rank() == 2) {
          const Deadline patience(20);
          while (group.failure().empty() && !patience.passed()) std::this_thread::yield();
        }
        all_reduce(group, Algorithm::two_shot, x);
      },
      [](GroupConfig& config) {
        config.deadlines = {5, 0.2};
      });
  EXPECT_NE(errors[0].find("rank(s) 2 did not arrive within 0.2 s in call 2"), std::string::npos) << errors[0];
  EXPECT_EQ(errors[0], errors[1]);
  EXPECT_EQ(errors[0], errors[2]);
}

TEST(Group, ARankThatLeftIsNoDeathUntilSomebodyWaitsForIt) {
  std::vector<std::string> addresses(2);
  std::barrier together(2);
  std::string error;
  std::thread leaver([&] {
    Group group(testing::small_config(1, 2));
    addresses[1] = group.address();
    together.arrive_and_wait();
    group.connect(addresses);
    std::vector<float> x(4);
    all_reduce(group, Algorithm::one_shot, x);
  });
  Group group(testing::small_config(0, 2));
  addresses[0] = group.address();
  together.arrive_and_wait();
  group.connect(addresses);
  std::vector<float> x(4);
  all_reduce(group, Algorithm::one_shot, x);
  leaver.join();
  EXPECT_EQ(group.failure(), "");
  const int64_t start = now_ns();
  try {
    all_reduce(group, Algorithm::one_shot, x);
    FAIL() << "the peer has left";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("rank(s) 1 left"), std::string::npos) << e.what();
  }
  EXPECT_LT(now_ns() - start, int64_t{2} * 1'000'000'000) << "leaving is noticed before the deadline of 3 s";
}

TEST(Group, AnOffsetOutsideOfTheArenaIsRefused) {
  const auto errors = run_ranks(2, [&](Group& group) {
    // A rank whose header lies: the reader must not follow it.
    std::vector<float> x(1 << 16);
    all_reduce(group, Algorithm::one_shot, x);
    group.collectives().broadcast(
        describe(OpCode::broadcast, Algorithm::one_shot, DType::float32, 4), x.data(), 16,
        group.rank() == 0 ? 1 : 0);  // both think that the other is the source: no offset was sent
  });
  EXPECT_NE(errors[0].find("outside of its arena"), std::string::npos) << errors[0];
}

TEST(Group, ABrokenGroupHandsOutNoMemory) {
  expect_no_errors(run_ranks(2, [&](Group& group) {
    void* before = group.allocate_output(64, /*required=*/true);
    group.arena()->free(before);
    try {
      std::vector<float> x(group.rank() == 0 ? 4 : 5);
      all_reduce(group, Algorithm::one_shot, x);
      throw std::runtime_error("no disagreement");
    } catch (const Error&) {
    }
    // A slow peer may still write into the block that was given back.
    if (group.allocate_output(64, /*required=*/false) != nullptr) throw std::runtime_error("a block was handed out");
    EXPECT_THROW(group.allocate_output(64, /*required=*/true), Error);
  }));
}

TEST(Group, ARankThatTriesAgainAfterAFailureLeavesTheSlotThatASlowPeerMayRead) {
  const auto errors = run_ranks(
      2,
      [&](Group& group) {
        std::vector<float> x(4, 1.0f);
        all_reduce(group, Algorithm::one_shot, x);
        if (group.rank() == 1) return;  // it might be reading still: it has sent no header of call 2
        x.assign(4, 2.0f);
        for (int attempt = 0; attempt < 2; attempt++) EXPECT_THROW(all_reduce(group, Algorithm::one_shot, x), Error);
        constexpr size_t kSlot = 64 << 10;  // of parity 1, as call 1 and the second attempt
        float staged;
        std::memcpy(&staged, group.arena()->base() + kSlot, sizeof staged);
        EXPECT_EQ(staged, 1.0f);
      },
      [](GroupConfig& config) {
        config.deadlines = {5, 0.1};
      });
  EXPECT_EQ(errors[0], "");
}

TEST(GroupRegistry, AForkedChildCannotCallItsParentsGroups) {
  GroupConfig config = testing::small_config(0, 1);
  config.name = "parents";
  config.symmetric = false;
  GroupRegistry::instance().add(std::make_shared<Group>(config));
  const pid_t child = fork();
  if (child == 0) {
    try {
      GroupRegistry::instance().find("parents");
    } catch (const Error& error) {
      _exit(std::string(error.what()).find("forked") != std::string::npos ? 0 : 1);
    }
    _exit(2);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_NO_THROW(GroupRegistry::instance().find("parents"));
  GroupRegistry::instance().remove("parents");
}

TEST(GroupConfig, NamesAnUnknownSettingAndABadValue) {
  GroupConfig config;
  EXPECT_THROW(config.apply({"speed=11"}), Error);
  EXPECT_THROW(config.apply({"timeout=-1"}), Error);
  EXPECT_THROW(config.apply({"timeout=soon"}), Error);
  EXPECT_THROW(config.apply({"pinned=perhaps"}), Error);
  EXPECT_THROW(config.apply({"tuning=fast"}), Error);
  config.apply({"timeout=1.5", "first_timeout=3", "algo=two_shot", "pinned=1", "strict=1"});
  EXPECT_EQ(config.deadlines.seconds, 1.5);
  EXPECT_EQ(config.agreed.forced, Algorithm::two_shot);
}

TEST(GroupRegistry, NamesTheGroupsThatThereAre) {
  GroupConfig config = testing::small_config(0, 1);
  config.name = "registry-test";
  config.symmetric = false;
  GroupRegistry::instance().add(std::make_shared<Group>(config));
  EXPECT_THROW(GroupRegistry::instance().add(std::make_shared<Group>(config)), Error);
  try {
    GroupRegistry::instance().find("nowhere");
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("registry-test"), std::string::npos);
  }
  GroupRegistry::instance().remove("registry-test");
  EXPECT_THROW(GroupRegistry::instance().find("registry-test"), Error);
}

}  // namespace
}  // namespace sglang_symm
