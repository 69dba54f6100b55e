// SPDX-License-Identifier: Apache-2.0
// Reading lists of transports as UCX does: names and patterns with commas between them; '^' before the first turns the
// list around, '\' before a name leaves out what it would bring along, and ':' ends it.
#include "transport/ucx/tls.h"

#include <fnmatch.h>

#include <algorithm>
#include <cstdlib>

namespace m2n::ucx {
namespace {

template <class Is>
bool is_any(std::string_view transports, Is&& is) {
  while (!transports.empty()) {
    const size_t end = std::min(transports.find(','), transports.size());
    if (is(transports.substr(0, end))) return true;
    transports.remove_prefix(std::min(end + 1, transports.size()));
  }
  return false;
}

bool is_pattern_of_tcp(std::string_view name) { return fnmatch(std::string(name).c_str(), "tcp", 0) == 0; }

}  // namespace

std::string tls_of(const std::vector<std::pair<std::string, std::string>>& variables) {
  const char* environment = std::getenv("UCX_TLS");
  std::string transports = environment == nullptr ? "" : environment;
  for (const auto& [name, value] : variables) {
    if (name == "TLS") transports = value;
  }
  return transports;
}

bool lets_tcp_in(std::string_view transports) {
  if (transports.empty()) return true;
  if (transports[0] == '^') {
    return !is_any(transports.substr(1), [](std::string_view name) { return name == "tcp" || name == "all"; });
  }
  // Rather one too many than one too few.
  return is_any(transports, [](std::string_view name) {
    const size_t begin = std::min(name.find_first_not_of(" \t\\^"), name.size());
    name = name.substr(begin, name.find_first_of(": \t", begin) - begin);
    return name == "all" || is_pattern_of_tcp(name);
  });
}

bool is_within_host(std::string_view transports) {
  constexpr std::string_view kWithin[] = {"posix", "sysv", "cma", "xpmem",     "knem",     "self",
                                          "shm",   "sm",   "mm",  "cuda_copy", "cuda_ipc", "gdr_copy"};
  return !transports.empty() && !is_any(transports, [&](std::string_view name) {
    return std::find(std::begin(kWithin), std::end(kWithin), name) == std::end(kWithin);
  });
}

}  // namespace m2n::ucx
