// SPDX-License-Identifier: Apache-2.0
// The header of a message over a network: which bytes go where in the receiver's objects for this link, and the signal
// that is stored once they are there. Short ones may lie in the header itself, the others are its data. Nothing in it
// is believed before it is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/platform.h"

namespace m2n {

inline constexpr uint32_t kNumAreas = 2;
inline constexpr uint32_t kMaxParts = 8;
inline constexpr uint32_t kMaxInlineBytes = 8192;

struct MessageHead {
  uint64_t key;  // what the receiver gave out for this link, at random
  uint32_t link;
  uint16_t num_parts;
  uint16_t num_inline;   // the first so many parts: their bytes follow the parts, one after another
  uint64_t word_offset;  // of the signal, in the last area
  uint64_t value;
};

struct MessagePart {
  uint32_t area;
  uint32_t zero;
  uint64_t offset;
  uint64_t num_bytes;
};
static_assert(sizeof(MessageHead) == 32 && sizeof(MessagePart) == 24, "part of the wire format");

struct Message {
  MessageHead head{};
  MessagePart parts[kMaxParts] = {};
  const unsigned char* inline_bytes = nullptr;  // in the header
};

// Copies what a header says of itself; false: it is too short to be one, and nobody's.
bool read_head(const void* header, size_t header_bytes, MessageHead* head);
// The whole header of a message with `data_bytes` of data, for areas of these sizes. Returns what is wrong with it, or
// "".
std::string read_message(const void* header, size_t header_bytes, size_t data_bytes,
                         const uint64_t (&area_bytes)[kNumAreas], Message* message);

}  // namespace m2n
