#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <atomic>
#include <barrier>
#include <csignal>
#include <cstring>
#include <random>
#include <thread>

#include "base/error.h"
#include "memory/segment_cpu.h"
#include "ranks.h"
#include "rendezvous/peers.h"

namespace sglang_symm {
namespace {

TEST(Socket, PassesDescriptorsAndRefusesAnyOtherMessage) {
  int pair[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair), 0);
  const Fd a(pair[0]), b(pair[1]);
  const auto segment = SegmentCpu::create(4096, "test");
  segment->data()[5] = std::byte{9};
  const char text[4] = {'a', 'b', 'c', 'd'};
  char got[4];
  std::vector<Fd> fds;
  ASSERT_TRUE(send_message(a.get(), text, 4, {segment->fd()}));
  ASSERT_EQ(receive_message(b.get(), got, 4, 1, &fds, Deadline(1)), Received::whole);
  EXPECT_EQ(SegmentCpu::import(std::move(fds[0]), 4096)->data()[5], std::byte{9});

  ASSERT_TRUE(send_message(a.get(), text, 3, {}));  // too short
  EXPECT_EQ(receive_message(b.get(), got, 4, 0, nullptr, Deadline(1)), Received::malformed);
  ASSERT_TRUE(send_message(a.get(), text, 4, {segment->fd()}));  // a descriptor too many
  EXPECT_EQ(receive_message(b.get(), got, 4, 0, nullptr, Deadline(1)), Received::malformed);
  EXPECT_EQ(receive_message(b.get(), got, 4, 0, nullptr, Deadline(0.01)), Received::timed_out);
}

Identity identity(int rank, int world, const std::string& settings = "s=1") {
  return {"g", rank, world, settings};
}

std::string field_of(const std::string& address, int index) {
  size_t begin = 0;
  for (int i = 0; i < index; i++) begin = address.find('|', begin) + 1;
  return address.substr(begin, address.find('|', begin) - begin);
}

// A message that is well formed in all but the token, as somebody would send who knows the protocol but not the store.
struct ForgedHello {
  char magic[8] = {'S', 'G', 'S', 'Y', 'M', 'M', '0', '1'};
  uint32_t version = 1;
  int32_t rank = 1, world_size = 2;
  uint32_t fd_count = 0;
  char token[32] = {};
  char group[128] = "g";
  char settings[512] = "s=1";
};

TEST(Rendezvous, NoMalformedTruncatedOrReplayedMessageIsAccepted) {
  const int n = testing::repetitions(1000);
  std::mt19937 random(3);
  int sent = 0;
  while (sent < n) {
    Rendezvous zero(identity(0, 2));
    Rendezvous one(identity(1, 2));
    const std::vector<std::string> addresses{zero.address(), one.address()};
    // As many as the listener's queue holds, all ahead of the member.
    std::vector<Fd> strangers;
    for (int i = 0; i < 20; i++, sent++) {
      strangers.push_back(connect_abstract(field_of(addresses[0], 1)));
      ForgedHello hello;
      std::vector<int> fds;
      size_t bytes = sizeof hello;
      std::memcpy(hello.token, field_of(addresses[0], 2).data(), sizeof hello.token);  // the right one
      auto* raw = reinterpret_cast<unsigned char*>(&hello);
      switch (random() % 8) {
        case 0:  // noise of the right length
          for (size_t k = 0; k < sizeof hello; k++) raw[k] = static_cast<unsigned char>(random());
          break;
        case 1:  // cut off
          bytes = random() % sizeof hello;
          break;
        case 2:  // a message of an earlier set-up: its token was another
          std::memcpy(hello.token, field_of(Rendezvous(identity(0, 2)).address(), 2).data(), sizeof hello.token);
          break;
        case 3:
          hello.rank = static_cast<int32_t>(random() % 3 == 0 ? 0 : random());  // not the one who is missing
          if (hello.rank == 1) hello.rank = 7;
          break;
        case 4:  // a descriptor that nobody asked for
          fds.push_back(1);
          break;
        case 5:
          hello.version = 1 + static_cast<uint32_t>(random() % 1000 + 1);
          break;
        case 6:
          hello.magic[random() % 8] ^= 1;
          break;
        default:  // one bit of the token
          hello.token[random() % 32] ^= 1;
      }
      if (bytes == 0) bytes = 1;
      send_message(strangers.back().get(), &hello, bytes, fds);
    }
    std::vector<Peer> of_zero, of_one;
    std::thread other([&] { EXPECT_NO_THROW(of_one = one.connect(addresses, {}, Deadline(5))); });
    EXPECT_NO_THROW(of_zero = zero.connect(addresses, {}, Deadline(5)));
    other.join();
    ASSERT_EQ(of_zero.size(), 1u) << "after " << sent << " messages";
    ASSERT_EQ(of_one.size(), 1u);
    // The connection is the member's: a word of its goes through.
    const char word[4] = {'p', 'i', 'n', 'g'};
    char got[4];
    ASSERT_TRUE(send_message(of_one[0].socket.get(), word, 4, {}));
    ASSERT_EQ(receive_message(of_zero[0].socket.get(), got, 4, 0, nullptr, Deadline(1)), Received::whole);
  }
}

TEST(Rendezvous, AProcessOfAnotherUserIsNoMemberEvenIfItKnowsTheToken) {
  if (geteuid() != 0) GTEST_SKIP() << "only root can become another user";
  Rendezvous zero(identity(0, 2));
  Rendezvous one(identity(1, 2));
  const std::vector<std::string> addresses{zero.address(), one.address()};
  int done[2];
  ASSERT_EQ(pipe(done), 0);
  const pid_t child = fork();
  if (child == 0) {
    if (setresuid(65534, 65534, 65534) != 0) _exit(1);
    ForgedHello hello;
    std::memcpy(hello.token, field_of(addresses[0], 2).data(), sizeof hello.token);
    const Fd fd = connect_abstract(field_of(addresses[0], 1));
    const bool sent = send_message(fd.get(), &hello, sizeof hello, {});
    if (write(done[1], sent ? "y" : "n", 1) != 1) _exit(1);
    pause();  // the connection stays open until the test ends it
  }
  char sent = 'n';
  ASSERT_EQ(read(done[0], &sent, 1), 1);
  ASSERT_EQ(sent, 'y');
  std::vector<Peer> of_zero;
  std::thread other([&] { EXPECT_NO_THROW(one.connect(addresses, {}, Deadline(5))); });
  EXPECT_NO_THROW(of_zero = zero.connect(addresses, {}, Deadline(5)));
  other.join();
  EXPECT_EQ(of_zero.at(0).pid, getpid()) << "the stranger took the member's place";
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  close(done[0]);
  close(done[1]);
}

TEST(Watcher, PeersThatLeaveAtTheSameMomentAreNoDeaths) {
  for (int i = 0; i < testing::repetitions(300); i++) {
    int pair[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    std::atomic<int> deaths{0};
    std::barrier together(2);
    std::vector<std::thread> ranks;
    for (int r = 0; r < 2; r++) {
      ranks.emplace_back([&, r] {
        std::vector<Peer> peers;
        peers.push_back(Peer{1 - r, getpid(), Fd(pair[r]), {}});
        auto watcher = std::make_unique<Watcher>(
            std::move(peers), [&](int, pid_t, PeerEvent event) { deaths += event == PeerEvent::died; });
        together.arrive_and_wait();
        watcher.reset();
      });
    }
    for (std::thread& rank : ranks) rank.join();
    ASSERT_EQ(deaths.load(), 0) << "repetition " << i;
  }
}

TEST(Watcher, AByeBehindAResetConnectionIsStillAGoodbye) {
  int pair[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
  Fd peer(pair[1]);
  ASSERT_EQ(send(pair[0], "bye.....", 8, 0), 8);  // unread by the peer when it closes: its close resets us
  ASSERT_EQ(send(peer.get(), "bye.....", 8, 0), 8);
  peer.reset();
  std::atomic<int> events{0}, left{0};
  {
    std::vector<Peer> peers;
    peers.push_back(Peer{1, getpid(), Fd(pair[0]), {}});
    Watcher watcher(std::move(peers), [&](int, pid_t, PeerEvent event) {
      left += event == PeerEvent::left;
      events++;
    });
    const Deadline patience(5);
    while (events.load() == 0 && !patience.passed()) std::this_thread::yield();
  }
  EXPECT_EQ(events.load(), 1);
  EXPECT_EQ(left.load(), 1);
}

TEST(Rendezvous, AForgerWithoutTheTokenIsNoMember) {
  Rendezvous zero(identity(0, 2));
  Rendezvous one(identity(1, 2));
  const std::vector<std::string> addresses{zero.address(), one.address()};
  const Fd forger = connect_abstract(field_of(addresses[0], 1));
  const ForgedHello hello;
  ASSERT_TRUE(send_message(forger.get(), &hello, sizeof hello, {}));  // first in the queue, before the member
  std::vector<Peer> of_one;
  std::thread other([&] { EXPECT_NO_THROW(of_one = one.connect(addresses, {}, Deadline(3))); });
  EXPECT_NO_THROW(zero.connect(addresses, {}, Deadline(3)));
  other.join();
  EXPECT_EQ(of_one.size(), 1u);
}

TEST(Rendezvous, NamesTheRanksThatDoNotCome) {
  Rendezvous zero(identity(0, 3));
  Rendezvous two(identity(2, 3));
  Rendezvous one(identity(1, 3));
  const std::vector<std::string> addresses{zero.address(), one.address(), two.address()};
  try {
    zero.connect(addresses, {}, Deadline(0.05));
    FAIL() << "nobody came";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("rank(s) 1, 2 of 3"), std::string::npos) << error.what();
  }
}

TEST(Rendezvous, DisagreeingSettingsAreNamedOnBothSides) {
  Rendezvous zero(identity(0, 2, "algo=auto"));
  Rendezvous one(identity(1, 2, "algo=two_shot"));
  const std::vector<std::string> addresses{zero.address(), one.address()};
  std::string other_error;
  std::thread other([&] {
    try {
      one.connect(addresses, {}, Deadline(5));
    } catch (const Error& error) {
      other_error = error.what();
    }
  });
  try {
    zero.connect(addresses, {}, Deadline(5));
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("algo=two_shot"), std::string::npos) << error.what();
  }
  other.join();
  EXPECT_NE(other_error, "");
}

TEST(Rendezvous, RefusesAnAddressOfAnotherVersionOrHost) {
  Rendezvous zero(identity(0, 2));
  EXPECT_THROW(zero.connect({zero.address(), "nonsense"}, {}, Deadline(1)), Error);
  std::string elsewhere = zero.address();
  elsewhere.replace(elsewhere.rfind('|') - 5, 5, "00000");
  try {
    zero.connect({zero.address(), elsewhere}, {}, Deadline(1));
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("another host"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace sglang_symm
