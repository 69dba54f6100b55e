// SPDX-License-Identifier: Apache-2.0
// A transport whose peers are reached over a network: windows in this host's memory, which a GPU may use too. Kinds of
// networks differ in their links alone.
#pragma once

#include <functional>
#include <memory>

#include "transport/choice.h"
#include "transport/network/links.h"

namespace m2n {

// `make_links`: called when a comm needs them.
std::unique_ptr<Transport> make_network_transport(const Choice& choice,
                                                  std::function<std::unique_ptr<NetworkLinks>()> make_links);

}  // namespace m2n
