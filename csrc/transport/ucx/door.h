// SPDX-License-Identifier: Apache-2.0
// A door: how a rank is reached through UCX, as its peer reads it in the handshake.
#pragma once

#include <cstdint>
#include <string>

#include "transport/network/message.h"

namespace m2n::ucx {

// In this machine's byte order.
struct Door {
  uint32_t link = 0;  // the number and the key that messages to it carry
  uint64_t key = 0;
  uint32_t way = 0;
  std::string address;  // of UCX's worker
  struct Object {
    uint64_t address = 0;
    std::string key;  // of UCX, packed
  } objects[kNumAreas];
};
std::string write_door(const Door& door);
// False: it is none of this version, or of a machine of another byte order.
bool read_door(const std::string& bytes, Door* door);

}  // namespace m2n::ucx
