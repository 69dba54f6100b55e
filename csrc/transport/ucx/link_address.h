// SPDX-License-Identifier: Apache-2.0
// An address: how a rank is reached through UCX, as its peer reads it in the handshake.
#pragma once

#include <cstdint>
#include <string>

#include "transport/network/message.h"

namespace m2n::ucx {

// In this machine's byte order.
struct LinkAddress {
  uint32_t link = 0;  // the number and the key that messages to it carry
  uint64_t key = 0;
  uint32_t way = 0;
  std::string worker;  // address of UCX's worker
  struct Object {
    uint64_t address = 0;
    std::string key;  // of UCX, packed
  } objects[kNumAreas];
};
std::string write_address(const LinkAddress& address);
// False: it is none of this version, or of a machine of another byte order.
bool read_address(const std::string& bytes, LinkAddress* address);

}  // namespace m2n::ucx
