// Unix sockets in the abstract namespace: they pass file descriptors, prove who the peer is, and close when it dies.
// Nothing here appears in a file system.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <string>
#include <vector>

#include "base/clock.h"
#include "memory/fd.h"

namespace sglang_symm {

struct Credentials {
  pid_t pid;
  uid_t uid;
};

struct Listener {
  Fd fd;
  std::string name;  // abstract name without the leading zero byte
};

// A listening socket with a random name.
Listener listen_abstract(int backlog);
// Throws ErrorKind::communication when nobody listens under that name.
Fd connect_abstract(const std::string& name);
// The next connection, or an empty Fd at the deadline.
Fd accept_before(int listener, const Deadline& deadline);
Credentials peer_credentials(int socket);

enum class Received { whole, closed, timed_out, malformed };

// One message of exactly `bytes` with descriptors attached. False when the peer has gone.
bool send_message(int socket, const void* data, size_t bytes, const std::vector<int>& fds);
// Receives exactly `bytes` and exactly `fd_count` descriptors; anything else is malformed, and its descriptors are
// closed.
Received receive_message(int socket, void* data, size_t bytes, size_t fd_count, std::vector<Fd>* fds,
                         const Deadline& deadline);

// 32 hexadecimal digits from the kernel.
std::string random_token();
// Equal for two processes exactly when they can reach each other's abstract sockets: boot id and network namespace.
std::string host_identity();

}  // namespace sglang_symm
