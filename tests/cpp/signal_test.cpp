#include "signal/signal_cpu.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <thread>
#include <vector>

#include "base/error.h"
#include "base/process.h"

namespace sglang_symm {
namespace {

// The pads of three ranks in one thread: calls are interleaved by hand.
struct Three {
  explicit Three(double seconds) {
    for (int r = 0; r < 3; r++) ranks.push_back(std::make_unique<SignalCpu>("g", r, 3, Deadlines{seconds, seconds}));
    for (int r = 0; r < 3; r++) {
      for (int peer = 0; peer < 3; peer++) {
        if (peer != r) ranks[static_cast<size_t>(r)]->attach(peer, Fd(dup(ranks[static_cast<size_t>(peer)]->fd())));
      }
    }
  }
  SignalCpu& operator[](size_t r) { return *ranks[r]; }
  std::vector<std::unique_ptr<SignalCpu>> ranks;
};

Descriptor reduce(uint64_t count) {
  Descriptor d;
  d.op = OpCode::all_reduce;
  d.count = count;
  return d;
}

TEST(Signal, HeadersCarryOffsetsAndEndACallOnlyTogether) {
  Three ranks(5);
  std::vector<Call> calls;
  for (size_t r = 0; r < 3; r++) calls.push_back(ranks[r].start(reduce(7), 100 + r, 200 + r));
  for (size_t r = 0; r < 3; r++) ranks[r].arrive(calls[r]);
  EXPECT_EQ(ranks[0].header(calls[0], 2).offset_in, 102u);
  EXPECT_EQ(ranks[2].header(calls[2], 1).offset_out, 201u);
}

TEST(Signal, ARankThatFinishesAfterOthersGaveUpRaisesAlthoughAllDoneFlagsAreThere) {
  // Rank 1 dies in the call; rank 0 gives up waiting for rank 2 and its caller reuses the tensor that rank 2 still
  // reads.
  Three ranks(5);
  std::vector<Call> calls;
  for (size_t r = 0; r < 3; r++) calls.push_back(ranks[r].start(reduce(7), 0, 0));
  for (size_t r = 0; r < 3; r++) ranks[r].arrive(calls[r]);
  ranks[0].on_peer(1, 4711, PeerEvent::died);
  EXPECT_THROW(ranks[0].finish(calls[0]), Error);
  EXPECT_THROW(ranks[1].finish(calls[1]), Error);
  EXPECT_THROW(ranks[2].finish(calls[2]), Error) << "it read what rank 0 may have overwritten";
}

TEST(Signal, ARankThatFailsWhileTheGroupIsMadeEndsTheWaitOfTheOthers) {
  Three ranks(60);
  ranks[2].fail_call(AbortKind::unmade, Descriptor{}, 0, 0);
  EXPECT_THROW(ranks[0].exchange(reduce(0)), Error);
  EXPECT_NE(ranks[1].failure().find("rank 2 failed while the group was made"), std::string::npos);
}

TEST(Signal, AKernelOfNcclThatDoesNotEndAndOneThatNcclRefusesAreToldToAllRanksByCallAndRank) {
  // As the thread that watches NCCL's kernels reports them.
  struct Failure {
    AbortKind kind;
    uint64_t epoch;
    const char* sentence;
  };
  const Failure failures[] = {
      {AbortKind::unfinished, 17,
       "NCCL's kernel of call 17, all_reduce(bytes, 7 elements, sum), did not end within 2.5 s on rank 1, "
       "though every rank had begun the call"},
      {AbortKind::refused, 17, "NCCL failed on rank 1 after call 17, all_reduce(bytes, 7 elements, sum); that rank's"},
      {AbortKind::refused, 0, "NCCL failed on rank 1 when its communicator was made; that rank's exception says why"},
  };
  for (const Failure& failure : failures) {
    Three ranks(60);
    ranks[1].fail_call(failure.kind, reduce(7), failure.epoch, 2.5);
    EXPECT_THROW(ranks[0].start(reduce(7), 0, 0), Error) << "a broken group goes on";
    for (size_t r = 0; r < 3; r++) {
      EXPECT_NE(ranks[r].failure().find(failure.sentence), std::string::npos) << ranks[r].failure();
    }
  }
}

TEST(Signal, RanksBoundToACoreEachKnowThatThereIsOneForEverybody) {
  cpu_set_t all;
  ASSERT_EQ(sched_getaffinity(0, sizeof all, &all), 0);
  if (CPU_COUNT(&all) < 2) GTEST_SKIP() << "one core";
  std::vector<std::unique_ptr<SignalCpu>> ranks;
  for (int core = 0; ranks.size() < 2; core++) {
    if (!CPU_ISSET(core, &all)) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
    ranks.push_back(std::make_unique<SignalCpu>("g", static_cast<int>(ranks.size()), 2, Deadlines{5, 5}));
  }
  EXPECT_EQ(sched_setaffinity(0, sizeof all, &all), 0);
  EXPECT_EQ(ranks[0]->cores(), 1);
  ranks[0]->attach(1, Fd(dup(ranks[1]->fd())));
  EXPECT_EQ(ranks[0]->cores(), 2);
}

TEST(Signal, TwoLateRanksCostOneDeadlineNotTwo) {
  Three ranks(0.5);
  const Call call = ranks[0].start(reduce(1), 0, 0);
  const int64_t start = now_ns();
  try {
    ranks[0].arrive(call);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("rank(s) 1, 2 did not arrive"), std::string::npos) << error.what();
  }
  EXPECT_LT(now_ns() - start, 950'000'000);
}

TEST(Signal, AHeaderThatCannotBeTrueBreaksTheGroupForAll) {
  Three ranks(5);
  std::vector<Call> calls;
  for (size_t r = 0; r < 3; r++) calls.push_back(ranks[r].start(reduce(7), 0, 0));
  EXPECT_THROW(ranks[1].damaged(calls[1], 2), Error);
  EXPECT_NE(ranks[0].failure().find("rank 2 sent an offset outside of its arena"), std::string::npos);
  EXPECT_EQ(ranks[0].failure(), ranks[2].failure());
}

TEST(Signal, EveryRankSaysWhatTheFirstReportSays) {
  Three ranks(5);
  ranks[2].on_peer(1, 11, PeerEvent::died);
  ranks[1].on_peer(0, 12, PeerEvent::died);
  for (size_t r = 0; r < 3; r++) {
    EXPECT_NE(ranks[r].failure().find("rank 1 died (process 11"), std::string::npos) << ranks[r].failure();
  }
}

TEST(Signal, AnInterruptedWaitIsToldToAll) {
  Three ranks(5);
  const Call call = ranks[0].start(reduce(1), 0, 0);
  set_interrupt_hook([] { return true; });
  EXPECT_THROW(ranks[0].arrive(call), Error);
  set_interrupt_hook(nullptr);
  EXPECT_NE(ranks[2].failure().find("rank 0 was interrupted"), std::string::npos) << ranks[2].failure();
}

TEST(Signal, ClosingWakesACallThatWaits) {
  Three ranks(20);
  const Call call = ranks[0].start(reduce(1), 0, 0);
  std::thread closer([&] {
    timespec nap{0, 50'000'000};
    nanosleep(&nap, nullptr);
    ranks[0].close();
  });
  const int64_t start = now_ns();
  EXPECT_THROW(ranks[0].arrive(call), Error);
  EXPECT_LT(now_ns() - start, int64_t{5} * 1'000'000'000);
  closer.join();
  EXPECT_NE(ranks[1].failure().find("rank(s) 0 left"), std::string::npos) << "a peer may still read this rank's tensor";
}

TEST(Signal, ARecordWhoseWriterStoppedIsReadByNobody) {
  Three ranks(5);
  auto* record = const_cast<AbortRecord*>(ranks[0].abort_record());
  record->kind = AbortKind::died;  // a writer that was stopped between its fields
  record->state.store(AbortRecord::kBeingWritten);
  const std::string sentence = ranks[1].failure();
  EXPECT_NE(sentence.find("stopped or died while it reported"), std::string::npos) << sentence;
  ranks[2].on_peer(0, 5, PeerEvent::died);  // too late: the sentence stands
  EXPECT_EQ(ranks[2].failure(), sentence);
  EXPECT_EQ(ranks[0].failure(), sentence);
}

TEST(Signal, ADepartedRankIsNamedOnlyByAWaiter) {
  Three ranks(5);
  ranks[0].on_peer(2, 13, PeerEvent::left);
  EXPECT_FALSE(ranks[0].broken());
  const Call call = ranks[0].start(reduce(1), 0, 0);
  ranks[1].start(reduce(1), 0, 0);
  try {
    ranks[0].arrive(call);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("rank(s) 2 left"), std::string::npos) << error.what();
  }
}

// A call whose header says everything but how its data moves.
std::vector<Descriptor> calls_of_every_kind() {
  std::vector<Descriptor> calls{reduce(7), reduce(0)};
  for (uint32_t root = 0; root < 3; root++) {
    calls.push_back(reduce(7));
    calls.back().op = OpCode::broadcast;
    calls.back().aux = root;
  }
  return calls;
}

TEST(Signal, EveryCallSendsAHeaderToAllAndEndsOnlyWithAllHeaders) {
  for (const Descriptor& descriptor : calls_of_every_kind()) {
    Three ranks(0.1);
    for (int call = 0; call < 3; call++) {
      const size_t present = call < 2 ? 3 : 2;  // the last time rank 2 is missing, its old header of this parity is not
      std::vector<Call> calls;
      for (size_t r = 0; r < present; r++) calls.push_back(ranks[r].start(descriptor, 0, 0));
      for (size_t r = 0; r < present; r++) {
        if (present == 3) {
          EXPECT_NO_THROW(ranks[r].arrive(calls[r])) << to_string(descriptor);
        } else {
          EXPECT_THROW(ranks[r].arrive(calls[r]), Error) << to_string(descriptor);
        }
      }
      EXPECT_EQ(ranks[0].failure().find("rank(s) 2 did not arrive") != std::string::npos, present == 2);
    }
  }
}

TEST(Signal, AHeaderThatArrivedCountsAlthoughItsSenderHasGone) {
  Three ranks(5);
  std::vector<Call> calls;
  for (size_t r = 0; r < 3; r++) calls.push_back(ranks[r].start(reduce(7), 0, 0));
  ranks[0].on_peer(1, 11, PeerEvent::left);
  ranks[0].on_peer(2, 12, PeerEvent::died);
  EXPECT_NO_THROW(ranks[0].arrive(calls[0]));
}

TEST(Signal, ALateRankOfABrokenGroupSendsNothing) {
  Three ranks(5);
  ranks[0].on_peer(1, 11, PeerEvent::died);
  EXPECT_THROW(ranks[2].start(reduce(7), 0, 0), Error);
  EXPECT_EQ(ranks[0].own_pad()->from[2].header[1].epoch.load(), 0u);
}

TEST(Signal, AWaitingRankRaisesFromTheRecordLongBeforeItsDeadline) {
  Three ranks(12);
  const Call call = ranks[0].start(reduce(7), 0, 0);
  ranks[2].on_peer(1, 11, PeerEvent::died);
  const int64_t start = now_ns();
  try {
    ranks[0].arrive(call);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("rank 1 died (process 11"), std::string::npos)
        << "it raised its own sentence, that two ranks did not arrive: " << error.what();
  }
  EXPECT_LT(now_ns() - start, int64_t{10} * 1'000'000'000);
}

TEST(Signal, AReaderNeverSeesHalfARecord) {
  for (int i = 0; i < 300; i++) {
    Three ranks(5);
    std::string seen;
    std::thread reader([&] {
      const Deadline patience(5);
      while ((seen = ranks[1].failure()).empty() && !patience.passed()) {
      }
    });
    ranks[2].on_peer(0, 11, PeerEvent::died);
    reader.join();
    ASSERT_NE(seen, "") << "repetition " << i;
    ASSERT_EQ(seen, ranks[2].failure()) << "repetition " << i;
  }
}

}  // namespace
}  // namespace sglang_symm
