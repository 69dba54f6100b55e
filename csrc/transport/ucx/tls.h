// SPDX-License-Identifier: Apache-2.0
// What a list of UCX's transports (UCX_TLS) lets in.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace m2n::ucx {

// Without TCP, which UCX listens on whatever carries the messages: whoever connects there can read and write all memory
// of the process.
inline constexpr const char* kWithoutTcp = "^tcp";

// The list that is set: by these variables of UCX, without their UCX_, or by the environment; "": none.
std::string tls_of(const std::vector<std::pair<std::string, std::string>>& variables);
// May TCP be among these? "": whatever there is.
bool lets_tcp_in(std::string_view transports);
// Are these transports of shared memory alone, a GPU's too? Those never tell that a peer is gone, and refuse to be
// asked.
bool is_within_host(std::string_view transports);

}  // namespace m2n::ucx
