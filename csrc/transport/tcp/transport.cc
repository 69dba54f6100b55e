// SPDX-License-Identifier: Apache-2.0
// Across hosts without any library: one connection a link, which the handshake has made. With "auto" peers of this host
// share memory.
#include "transport/tcp/links.h"

namespace m2n {

std::unique_ptr<Transport> make_tcp_transport(const Choice& choice) {
  return make_network_transport(choice, [] { return std::make_unique<tcp::Links>(); });
}

}  // namespace m2n
