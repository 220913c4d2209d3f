// Errors of the core. The ops floor turns each kind into the exception that PyTorch's users expect.
//
// A message says what was expected, what was got, on which rank, in which group, and what to do.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace sglang_symm {

enum class ErrorKind {
  argument,       // the caller's mistake, raised before anything is sent       -> ValueError
  communication,  // a peer is dead, missing or disagrees; the group is broken  -> torch.distributed.DistBackendError
  out_of_memory,  // an arena (or the host) is full                             -> torch.OutOfMemoryError
  system,         // the operating system or the driver refused                 -> RuntimeError
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

// cat("rank ", 3, " of ", 4) == "rank 3 of 4"
template <class... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

template <class... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
  throw Error(kind, cat("sglang_symm: ", parts...));
}

// "call: reason (errno)" for a failed system call; reads errno.
[[noreturn]] void fail_errno(const std::string& call, const std::string& what_to_do = "");

}  // namespace sglang_symm
