// SPDX-License-Identifier: Apache-2.0
// Reading what a peer has written: each offset and length within what there is, without overflow.
#include "transport/network/message.h"

#include <cstring>

namespace m2n {
namespace {

bool is_within(uint64_t offset, uint64_t num_bytes, uint64_t area_bytes) {
  return num_bytes <= area_bytes && offset <= area_bytes - num_bytes;
}

}  // namespace

bool read_head(const void* header, size_t header_bytes, MessageHead* head) {
  if (header_bytes < sizeof *head) return false;
  std::memcpy(head, header, sizeof *head);
  return true;
}

std::string read_message(const void* header, size_t header_bytes, size_t data_bytes,
                         const uint64_t (&area_bytes)[kNumAreas], Message* message) {
  if (!read_head(header, header_bytes, &message->head)) return "a header of " + std::to_string(header_bytes) + " bytes";
  const MessageHead& head = message->head;
  const size_t parts_bytes = head.num_parts * sizeof(MessagePart);
  if (head.num_parts > kMaxParts || head.num_inline > head.num_parts) return std::to_string(head.num_parts) + " parts";
  if (header_bytes < sizeof head + parts_bytes) return "a header of " + std::to_string(header_bytes) + " bytes";
  if (head.word_offset % sizeof(uint64_t) != 0 ||
      !is_within(head.word_offset, sizeof(uint64_t), area_bytes[kNumAreas - 1])) {
    return "a signal at " + std::to_string(head.word_offset);
  }
  const auto* at = static_cast<const unsigned char*>(header) + sizeof head;
  std::memcpy(message->parts, at, parts_bytes);
  message->inline_bytes = at + parts_bytes;
  uint64_t num_bytes[2] = {0, 0};  // of the data, and in the header
  for (uint32_t i = 0; i < head.num_parts; ++i) {
    const MessagePart& part = message->parts[i];
    if (part.area >= kNumAreas || !is_within(part.offset, part.num_bytes, area_bytes[part.area])) {
      return std::to_string(part.num_bytes) + " bytes at " + std::to_string(part.offset) + " of object " +
             std::to_string(part.area);
    }
    num_bytes[i < head.num_inline] += part.num_bytes;  // at most kMaxParts times an area: no overflow
  }
  if (num_bytes[0] != data_bytes || num_bytes[1] != header_bytes - sizeof head - parts_bytes) {
    return std::to_string(data_bytes) + " bytes of data and a header of " + std::to_string(header_bytes) +
           " bytes for parts of " + std::to_string(num_bytes[0]) + " and " + std::to_string(num_bytes[1]);
  }
  return "";
}

}  // namespace m2n
