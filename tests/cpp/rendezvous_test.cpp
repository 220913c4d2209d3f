#include <gtest/gtest.h>
#include <sys/socket.h>

#include <random>
#include <thread>

#include "base/error.h"
#include "memory/segment_cpu.h"
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

TEST(Rendezvous, ManyStrangersDoNotKeepTheMembersApart) {
  Rendezvous zero(identity(0, 2));
  Rendezvous one(identity(1, 2));
  const std::vector<std::string> addresses{zero.address(), one.address()};
  const std::string socket =
      addresses[0].substr(addresses[0].find('|') + 1, addresses[0].find('|', 15) - addresses[0].find('|') - 1);
  std::thread stranger([&] {
    std::mt19937 random(3);
    for (int i = 0; i < 200; i++) {
      try {
        const Fd fd = connect_abstract(socket);
        std::vector<char> noise(random() % 900 + 1);
        for (char& c : noise) c = static_cast<char>(random());
        send_message(fd.get(), noise.data(), noise.size(), {});
      } catch (const Error&) {
        return;  // the members have met, and listening has ended
      }
    }
  });
  std::vector<Peer> of_zero, of_one;
  std::thread other([&] { of_one = one.connect(addresses, {}, Deadline(20)); });
  of_zero = zero.connect(addresses, {}, Deadline(20));
  other.join();
  stranger.join();
  ASSERT_EQ(of_zero.size(), 1u);
  EXPECT_EQ(of_zero[0].rank, 1);
  EXPECT_EQ(of_one[0].rank, 0);
  EXPECT_EQ(of_one[0].pid, getpid());
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

TEST(Rendezvous, AForgerWithoutTheTokenIsNoMember) {
  Rendezvous zero(identity(0, 2));
  Rendezvous one(identity(1, 2));
  const std::vector<std::string> addresses{zero.address(), one.address()};
  const size_t begin = addresses[0].find('|') + 1;
  const Fd forger = connect_abstract(addresses[0].substr(begin, addresses[0].find('|', begin) - begin));
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
