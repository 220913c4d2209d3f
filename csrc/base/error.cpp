#include "base/error.h"

#include <cerrno>
#include <cstring>

namespace sglang_symm {

void fail_errno(const std::string& call, const std::string& what_to_do) {
  const int code = errno;
  char buffer[128] = {};
  // GNU strerror_r may return a static string instead of filling the buffer.
  const char* reason = strerror_r(code, buffer, sizeof buffer);
  fail(ErrorKind::system, call, ": ", reason, " (errno ", code, ")", what_to_do.empty() ? "" : ". ", what_to_do);
}

}  // namespace sglang_symm
