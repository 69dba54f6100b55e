// SPDX-License-Identifier: Apache-2.0
// Reading what a peer has written: each length within what there is, without overflow.
#include "transport/ucx/link_address.h"

#include <cstring>

namespace m2n::ucx {
namespace {

struct LinkAddressHead {
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

std::string write_address(const LinkAddress& address) {
  LinkAddressHead head;
  head.link = address.link;
  head.key = address.key;
  head.way = address.way;
  head.address_bytes = static_cast<uint32_t>(address.worker.size());
  std::string keys;
  for (uint32_t i = 0; i < kNumAreas; ++i) {
    head.objects[i] = address.objects[i].address;
    head.key_bytes[i] = static_cast<uint32_t>(address.objects[i].key.size());
    keys += address.objects[i].key;
  }
  return std::string(reinterpret_cast<const char*>(&head), sizeof head) + address.worker + keys;
}

bool read_address(const std::string& bytes, LinkAddress* address) {
  LinkAddressHead head;
  if (bytes.size() < sizeof head) return false;
  std::memcpy(&head, bytes.data(), sizeof head);
  uint64_t num_bytes = sizeof head + uint64_t{head.address_bytes};
  for (uint32_t key_bytes : head.key_bytes) num_bytes += key_bytes;
  if (head.magic != LinkAddressHead::kMagic || num_bytes != bytes.size()) return false;
  address->link = head.link;
  address->key = head.key;
  address->way = head.way;
  size_t at = sizeof head;
  const auto take = [&](uint32_t count) {
    at += count;
    return bytes.substr(at - count, count);
  };
  address->worker = take(head.address_bytes);
  for (uint32_t i = 0; i < kNumAreas; ++i) address->objects[i] = {head.objects[i], take(head.key_bytes[i])};
  return true;
}

}  // namespace m2n::ucx
