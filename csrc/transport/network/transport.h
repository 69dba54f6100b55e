// SPDX-License-Identifier: Apache-2.0
// A transport whose peers are reached over a network: windows in this host's memory, which a GPU may use too. Kinds of
// networks differ in their links alone.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "transport/network/links.h"
#include "transport/transport.h"

namespace m2n {

struct NetworkSettings {
  std::string device;          // a GPU that uses the windows too; "": none
  std::string rows;            // the transport in whose memory rows lie; "": in that of the host
  bool shares_memory = false;  // with peers of this host
};

// Calls take(key, value, part) for each ";key=value" of a transport's name; value "": there is no "=".
void for_each_option(const std::string& name,
                     const std::function<void(const std::string&, const std::string&, const std::string&)>& take);

// `make_links`: called when a comm needs them.
std::unique_ptr<Transport> make_network_transport(const NetworkSettings& settings,
                                                  std::function<std::unique_ptr<NetworkLinks>()> make_links);

}  // namespace m2n
