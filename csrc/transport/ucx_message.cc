// SPDX-License-Identifier: Apache-2.0
// Reading what a peer has written: each offset and length within what there is, without overflow.
#include "transport/ucx_message.h"

#include <cstring>

namespace m2n::ucx {
namespace {

bool is_within(uint64_t offset, uint64_t num_bytes, uint64_t area_bytes) {
  return num_bytes <= area_bytes && offset <= area_bytes - num_bytes;
}

struct DoorHead {
  static constexpr uint32_t kMagic = 0x6D326E01;
  uint32_t magic = kMagic;
  uint32_t link = 0;
  uint64_t key = 0;
  uint32_t way = 0;
  uint32_t address_bytes = 0;
  uint64_t objects[kNumAreas] = {};
  uint32_t key_bytes[kNumAreas] = {};
};

}  // namespace

std::string write_door(const Door& door) {
  DoorHead head;
  head.link = door.link;
  head.key = door.key;
  head.way = door.way;
  head.address_bytes = static_cast<uint32_t>(door.address.size());
  std::string keys;
  for (uint32_t i = 0; i < kNumAreas; ++i) {
    head.objects[i] = door.objects[i].address;
    head.key_bytes[i] = static_cast<uint32_t>(door.objects[i].key.size());
    keys += door.objects[i].key;
  }
  return std::string(reinterpret_cast<const char*>(&head), sizeof head) + door.address + keys;
}

bool read_door(const std::string& bytes, Door* door) {
  DoorHead head;
  if (bytes.size() < sizeof head) return false;
  std::memcpy(&head, bytes.data(), sizeof head);
  uint64_t num_bytes = sizeof head + uint64_t{head.address_bytes};
  for (uint32_t key_bytes : head.key_bytes) num_bytes += key_bytes;
  if (head.magic != DoorHead::kMagic || num_bytes != bytes.size()) return false;
  door->link = head.link;
  door->key = head.key;
  door->way = head.way;
  size_t at = sizeof head;
  const auto take = [&](uint32_t count) {
    at += count;
    return bytes.substr(at - count, count);
  };
  door->address = take(head.address_bytes);
  for (uint32_t i = 0; i < kNumAreas; ++i) door->objects[i] = {head.objects[i], take(head.key_bytes[i])};
  return true;
}

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

}  // namespace m2n::ucx
