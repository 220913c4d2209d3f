#include "rendezvous/peers.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/dtype.h"
#include "base/error.h"

namespace sglang_symm {

namespace {

constexpr uint32_t kProtocolVersion = 1;
constexpr char kMagic[8] = {'S', 'G', 'S', 'Y', 'M', 'M', '0', '1'};
constexpr char kBye[8] = {'b', 'y', 'e', '.', '.', '.', '.', '.'};

struct Hello {
  char magic[8];
  uint32_t version;
  int32_t rank;
  int32_t world_size;
  uint32_t fd_count;
  char token[32];  // the receiver's
  char group[128];
  char settings[512];
};

struct Address {
  std::string socket, token, host, pid;
};

Address parse_address(const std::string& text, int rank) {
  std::vector<std::string> fields;
  size_t begin = 0;
  for (size_t bar; (bar = text.find('|', begin)) != std::string::npos; begin = bar + 1) {
    fields.push_back(text.substr(begin, bar - begin));
  }
  fields.push_back(text.substr(begin));
  if (fields.size() != 5 || fields[0] != cat("sglang_symm/", kProtocolVersion) || fields[2].size() != 32) {
    fail(ErrorKind::communication, "the address of rank ", rank, " is '", text, "', expected one of protocol version ",
         kProtocolVersion, ". Do all ranks run the same sglang_symm?");
  }
  return {fields[1], fields[2], fields[3], fields[4]};
}

template <size_t N>
void put(char (&field)[N], const std::string& text, const char* what) {
  if (text.size() >= N) fail(ErrorKind::argument, what, " of ", text.size(), " characters, expected fewer than ", N);
  std::memset(field, 0, N);
  std::memcpy(field, text.data(), text.size());
}

template <size_t N>
std::string get(const char (&field)[N]) {
  return std::string(field, strnlen(field, N));
}

Hello make_hello(const Identity& identity, const std::string& receiver_token, size_t fd_count) {
  Hello hello{};
  std::memcpy(hello.magic, kMagic, sizeof kMagic);
  hello.version = kProtocolVersion;
  hello.rank = identity.rank;
  hello.world_size = identity.world_size;
  hello.fd_count = static_cast<uint32_t>(fd_count);
  std::memcpy(hello.token, receiver_token.data(), sizeof hello.token);
  put(hello.group, identity.group, "group name");
  put(hello.settings, identity.settings, "settings");
  return hello;
}

// A stranger's message: dropped without a word. A member's with other settings: an error that names both.
bool is_from_member(const Hello& hello, const std::string& my_token, int socket) {
  return std::memcmp(hello.magic, kMagic, sizeof kMagic) == 0 && hello.version == kProtocolVersion &&
         std::memcmp(hello.token, my_token.data(), sizeof hello.token) == 0 &&
         peer_credentials(socket).uid == geteuid();
}

void require_agreement(const Hello& hello, const Identity& mine) {
  const std::string theirs = get(hello.settings);
  if (get(hello.group) != mine.group || hello.world_size != mine.world_size || theirs != mine.settings) {
    fail(ErrorKind::communication, "ranks disagree about group '", mine.group, "': rank ", mine.rank, " has ",
         mine.world_size, " ranks and ", mine.settings, "; rank ", hello.rank, " has group '", get(hello.group), "', ",
         hello.world_size, " ranks and ", theirs, ". Give every rank the same arguments and environment");
  }
}

std::string join(const std::vector<int>& ranks) {
  std::string text;
  for (const int rank : ranks) text += (text.empty() ? "" : ", ") + std::to_string(rank);
  return text;
}

}  // namespace

void check_members(int rank, int world_size) {
  if (world_size < 1 || world_size > kMaxWorldSize) {
    fail(ErrorKind::argument, "a group of ", world_size, " ranks, expected 1 to ", kMaxWorldSize);
  }
  if (rank < 0 || rank >= world_size) {
    fail(ErrorKind::argument, "rank ", rank, " in a group of ", world_size, " ranks");
  }
}

Rendezvous::Rendezvous(const Identity& identity)
    : identity_(identity), listener_(listen_abstract(2 * kMaxWorldSize)), token_(random_token()) {
  check_members(identity.rank, identity.world_size);
}

std::string Rendezvous::address() const {
  return cat("sglang_symm/", kProtocolVersion, "|", listener_.name, "|", token_, "|", host_identity(), "|", getpid());
}

std::vector<Peer> Rendezvous::connect(const std::vector<std::string>& addresses, const std::vector<int>& fds,
                                      const Deadline& deadline) {
  const int world = identity_.world_size;
  const int rank = identity_.rank;
  if (addresses.size() != static_cast<size_t>(world)) {
    fail(ErrorKind::argument, addresses.size(), " addresses for a group of ", world, " ranks");
  }
  std::vector<Address> parsed;
  for (int r = 0; r < world; r++) {
    parsed.push_back(parse_address(addresses[static_cast<size_t>(r)], r));
    if (parsed.back().host != host_identity()) {
      fail(ErrorKind::communication, "rank ", r, " of group '", identity_.group, "' is on another host (or in another ",
           "network namespace) than rank ", rank, ". Symmetric memory reaches the processes of one host: use ",
           "communicator='process_group' for this group");
    }
  }
  std::vector<Peer> peers;
  const auto receive = [&](Fd socket, bool from_stranger) {
    Hello hello;
    std::vector<Fd> received;
    const Received result = receive_message(socket.get(), &hello, sizeof hello, fds.size(), &received, deadline);
    if (result != Received::whole || !is_from_member(hello, token_, socket.get())) return false;
    require_agreement(hello, identity_);
    const bool expected = hello.rank >= 0 && hello.rank < world && hello.rank != rank &&
                          std::none_of(peers.begin(), peers.end(), [&](const Peer& p) { return p.rank == hello.rank; });
    if (!expected) return false;
    if (from_stranger) {  // an accepted connection is answered
      const Hello answer = make_hello(identity_, parsed[static_cast<size_t>(hello.rank)].token, fds.size());
      if (!send_message(socket.get(), &answer, sizeof answer, fds)) return false;
    }
    const pid_t pid = peer_credentials(socket.get()).pid;
    peers.push_back(Peer{hello.rank, pid, std::move(socket), std::move(received)});
    return true;
  };

  std::vector<Fd> outgoing;
  for (int r = 0; r < rank; r++) {
    outgoing.push_back(connect_abstract(parsed[static_cast<size_t>(r)].socket));
    const Hello hello = make_hello(identity_, parsed[static_cast<size_t>(r)].token, fds.size());
    if (!send_message(outgoing.back().get(), &hello, sizeof hello, fds)) {
      fail(ErrorKind::communication, "rank ", r, " of group '", identity_.group,
           "' closed the connection during set-up");
    }
  }
  while (std::count_if(peers.begin(), peers.end(), [&](const Peer& p) { return p.rank > rank; }) < world - 1 - rank) {
    Fd socket = accept_before(listener_.fd.get(), deadline);
    if (!socket) break;
    receive(std::move(socket), true);
  }
  for (Fd& socket : outgoing) receive(std::move(socket), false);

  std::vector<int> missing;
  for (int r = 0; r < world; r++) {
    if (r != rank && std::none_of(peers.begin(), peers.end(), [&](const Peer& p) { return p.rank == r; })) {
      missing.push_back(r);
    }
  }
  if (!missing.empty()) {
    fail(ErrorKind::communication, "group '", identity_.group, "': rank(s) ", join(missing), " of ", world,
         " did not connect to rank ", rank, " within ", deadline.seconds(),
         " s, or closed the connection during set-up");
  }
  std::sort(peers.begin(), peers.end(), [](const Peer& a, const Peer& b) { return a.rank < b.rank; });
  listener_.fd.reset();
  return peers;
}

Watcher::Watcher(std::vector<Peer> peers, Callback callback)
    : callback_(std::move(callback)), stop_(eventfd(0, EFD_CLOEXEC)), owner_(getpid()) {
  if (!stop_) fail_errno("eventfd");
  for (Peer& peer : peers) {
    Fd process;
#ifdef SYS_pidfd_open
    // Ranks that are threads of one process share it; a pid of 0 belongs to another pid namespace.
    if (peer.pid > 0 && peer.pid != getpid()) process = Fd(static_cast<int>(syscall(SYS_pidfd_open, peer.pid, 0)));
#endif
    watched_.push_back({peer.rank, peer.pid, std::move(peer.socket), std::move(process)});
  }
  thread_ = std::thread([this] { run(); });
}

Watcher::~Watcher() {
  if (getpid() != owner_) {
    thread_.detach();  // the thread does not exist in a forked child
    return;
  }
  for (const Watched& peer : watched_) {
    if (peer.socket) send_message(peer.socket.get(), kBye, sizeof kBye, {});
  }
  const uint64_t one = 1;
  if (write(stop_.get(), &one, sizeof one) != sizeof one) std::terminate();  // an eventfd takes 8 bytes or is broken
  thread_.join();
}

void Watcher::run() {
  std::vector<bool> gone(watched_.size(), false);
  std::vector<pollfd> polled;
  std::vector<size_t> owner;
  for (;;) {
    polled.assign(1, {stop_.get(), POLLIN, 0});
    owner.assign(1, 0);
    for (size_t i = 0; i < watched_.size(); i++) {
      if (gone[i]) continue;
      polled.push_back({watched_[i].socket.get(), POLLIN, 0});
      owner.push_back(i);
      if (watched_[i].process) {
        polled.push_back({watched_[i].process.get(), POLLIN, 0});
        owner.push_back(i);
      }
    }
    if (poll(polled.data(), polled.size(), -1) < 0) {
      if (errno == EINTR) continue;
      return;
    }
    if (polled[0].revents != 0) return;
    for (size_t p = 1; p < polled.size(); p++) {
      const size_t i = owner[p];
      if (polled[p].revents == 0 || gone[i]) continue;
      // Whichever descriptor woke us: a `bye` that is already in the socket makes it a clean exit.
      char word[sizeof kBye];
      ssize_t got = 0;
      // A peer that closed with a word of ours unread resets the connection: that error comes before its `bye`, once.
      do {
        got = recv(watched_[i].socket.get(), word, sizeof word, MSG_DONTWAIT);
      } while (got < 0 && (errno == ECONNRESET || errno == EINTR));
      if (got < 0 && errno == EAGAIN && polled[p].fd == watched_[i].socket.get()) continue;
      const bool bye = got == sizeof kBye && std::memcmp(word, kBye, sizeof kBye) == 0;
      gone[i] = true;
      callback_(watched_[i].rank, watched_[i].pid, bye ? PeerEvent::left : PeerEvent::died);
    }
  }
}

}  // namespace sglang_symm
