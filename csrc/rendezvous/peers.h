// How the members of a group find each other, and how they notice that one has gone.
//
// Each rank listens, its address travels through the store (in Python), then every pair of ranks holds one socket:
//
//   rank i -> rank j < i   connect, Hello with descriptors      (connecting needs no accept: nobody waits for anybody)
//   rank j -> rank i       Hello with descriptors
//
// A Hello counts only if it carries the receiver's secret token (known through the store alone), the same user id
// (SO_PEERCRED), the group's name and size, and equal settings. Anything else is dropped and listening goes on.
// Afterwards the sockets carry one word, `bye`; a socket that closes without it, or a process that ends, is a death.
#pragma once

#include <sys/types.h>

#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "memory/fd.h"
#include "rendezvous/socket.h"

namespace sglang_symm {

struct Identity {
  std::string group;
  int rank;
  int world_size;
  std::string settings;  // what all members must agree on, readable
};

struct Peer {
  int rank = -1;
  pid_t pid = 0;
  Fd socket;
  std::vector<Fd> fds;  // the peer's segments, in its order
};

// Raises unless 1 <= world_size <= kMaxWorldSize and 0 <= rank < world_size.
void check_members(int rank, int world_size);

class Rendezvous {
 public:
  explicit Rendezvous(const Identity& identity);
  // One line of text: version | socket | token | host | pid
  std::string address() const;
  // Collective. Sends `fds` to every peer and returns the peers in rank order (without this rank).
  std::vector<Peer> connect(const std::vector<std::string>& addresses, const std::vector<int>& fds,
                            const Deadline& deadline);

 private:
  Identity identity_;
  Listener listener_;
  std::string token_;
};

enum class PeerEvent { died, left };

// Watches the peers' sockets and processes in a thread of its own. It makes no CUDA call.
class Watcher {
 public:
  using Callback = std::function<void(int rank, pid_t pid, PeerEvent event)>;
  Watcher(std::vector<Peer> peers, Callback callback);
  // Says `bye` to every peer (not in a forked child: the sockets are the parent's) and ends the thread.
  ~Watcher();

 private:
  void run();

  struct Watched {
    int rank;
    pid_t pid;
    Fd socket;
    Fd process;  // pidfd: notices a death although a forked child still holds the socket
  };
  std::vector<Watched> watched_;
  Callback callback_;
  Fd stop_;
  pid_t owner_;
  std::thread thread_;
};

}  // namespace sglang_symm
