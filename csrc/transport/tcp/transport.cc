// SPDX-License-Identifier: Apache-2.0
// Across hosts without any library: one connection a link, which the handshake has made.
#include "transport/network/transport.h"
#include "core/error.h"
#include "transport/tcp/links.h"
#include "transport/transport.h"

namespace m2n {

// "tcp;device=cuda:0"; with "auto" in the place of "tcp" peers of this host share memory.
std::unique_ptr<Transport> make_tcp_transport(const std::string& name) {
  NetworkSettings settings;
  const auto refuse = [&](const std::string& part) {
    throw Error(Failure::kSetup,
                "transport: expected 'tcp' or 'auto' and ';device=...', got '" + part + "' in '" + name + "'");
  };
  const std::string kind = name.substr(0, name.find(';'));
  if (kind != "tcp" && kind != "auto") refuse(kind);
  settings.shares_memory = kind == "auto";
  for_each_option(name, [&](const std::string& key, const std::string& value, const std::string& part) {
    if (key != "device" || value.empty()) refuse(part);
    settings.device = value;
  });
  return make_network_transport(settings, [] { return std::make_unique<tcp::Links>(); });
}

}  // namespace m2n
