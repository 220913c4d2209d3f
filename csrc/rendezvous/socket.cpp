#include "rendezvous/socket.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "base/error.h"

namespace sglang_symm {

namespace {

constexpr size_t kMaxFds = 8;

socklen_t abstract_address(const std::string& name, sockaddr_un* address) {
  if (name.empty() || name.size() > sizeof address->sun_path - 1) {
    fail(ErrorKind::argument, "socket name of ", name.size(), " characters, expected 1 to ",
         sizeof address->sun_path - 1);
  }
  *address = {};
  address->sun_family = AF_UNIX;
  std::memcpy(address->sun_path + 1, name.data(), name.size());  // sun_path[0] == 0: abstract
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

Fd new_socket() {
  // SEQPACKET keeps messages whole: a truncated or merged hello cannot be mistaken for a good one.
  Fd fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!fd) fail_errno("socket(AF_UNIX)");
  return fd;
}

bool wait_readable(int fd, const Deadline& deadline) {
  for (;;) {
    pollfd p{fd, POLLIN, 0};
    const int ready = poll(&p, 1, deadline.left_ms());
    if (ready > 0) return true;
    if (ready == 0 && deadline.passed()) return false;
    if (ready < 0 && errno != EINTR) fail_errno("poll");
  }
}

}  // namespace

std::string random_token() {
  unsigned char bytes[16];
  size_t got = 0;
  while (got < sizeof bytes) {
    const ssize_t n = getrandom(bytes + got, sizeof bytes - got, 0);
    if (n < 0 && errno != EINTR) fail_errno("getrandom");
    if (n > 0) got += static_cast<size_t>(n);
  }
  std::string token;
  for (const unsigned char byte : bytes) {
    token += "0123456789abcdef"[byte >> 4];
    token += "0123456789abcdef"[byte & 15];
  }
  return token;
}

std::string host_identity() {
  std::string boot_id = "unknown";
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot_id;
  struct stat status;
  const bool known = stat("/proc/self/ns/net", &status) == 0;
  return cat(boot_id, "/", known ? static_cast<unsigned long>(status.st_ino) : 0UL);
}

Listener listen_abstract(int backlog) {
  Listener listener{new_socket(), cat("sglang_symm-", getpid(), "-", random_token())};
  sockaddr_un address;
  const socklen_t length = abstract_address(listener.name, &address);
  if (bind(listener.fd.get(), reinterpret_cast<sockaddr*>(&address), length) != 0) fail_errno("bind");
  if (listen(listener.fd.get(), backlog) != 0) fail_errno("listen");
  return listener;
}

Fd connect_abstract(const std::string& name) {
  Fd fd = new_socket();
  sockaddr_un address;
  const socklen_t length = abstract_address(name, &address);
  if (connect(fd.get(), reinterpret_cast<sockaddr*>(&address), length) != 0) {
    fail(ErrorKind::communication, "no connection to the peer's socket '", name, "': ", std::strerror(errno),
         ". It died during set-up, or runs in another network namespace");
  }
  return fd;
}

Fd accept_before(int listener, const Deadline& deadline) {
  for (;;) {
    if (!wait_readable(listener, deadline)) return Fd();
    Fd fd(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
    if (fd) return fd;
    if (errno != EINTR && errno != ECONNABORTED && errno != EAGAIN) fail_errno("accept");
  }
}

Credentials peer_credentials(int socket) {
  ucred credentials{};
  socklen_t length = sizeof credentials;
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) fail_errno("getsockopt(SO_PEERCRED)");
  return {credentials.pid, credentials.uid};
}

bool send_message(int socket, const void* data, size_t bytes, const std::vector<int>& fds) {
  if (fds.size() > kMaxFds) fail(ErrorKind::argument, fds.size(), " descriptors in one message, at most ", kMaxFds);
  iovec part{const_cast<void*>(data), bytes};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxFds)] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
    std::memcpy(CMSG_DATA(header), fds.data(), sizeof(int) * fds.size());
  }
  for (;;) {
    const ssize_t sent = sendmsg(socket, &message, MSG_NOSIGNAL);
    if (sent == static_cast<ssize_t>(bytes)) return true;
    if (sent < 0 && errno == EINTR) continue;
    return false;
  }
}

Received receive_message(int socket, void* data, size_t bytes, size_t fd_count, std::vector<Fd>* fds,
                         const Deadline& deadline) {
  iovec part{data, bytes};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxFds)] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  ssize_t got = 0;
  do {
    if (!wait_readable(socket, deadline)) return Received::timed_out;
    got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  } while (got < 0 && (errno == EINTR || errno == EAGAIN));
  std::vector<Fd> received;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; i++) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof fd);
      received.emplace_back(fd);
    }
  }
  if (got <= 0) return Received::closed;
  const bool truncated = (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0;
  if (truncated || static_cast<size_t>(got) != bytes || received.size() != fd_count) return Received::malformed;
  if (fds != nullptr) *fds = std::move(received);
  return Received::whole;
}

}  // namespace sglang_symm
