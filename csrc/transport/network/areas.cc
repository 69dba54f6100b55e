// SPDX-License-Identifier: Apache-2.0
// The range of all send areas, reserved at once: a page costs memory when it is first written.
#include "transport/network/areas.h"

#include <sys/mman.h>
#include <sys/random.h>

#include "core/error.h"
#include "transport/memory_limit.h"

namespace m2n {
namespace {

// From the beginning of a page to that of the send areas. The kernel copies what is sent to where its own pages begin,
// behind a short head; from the same place of another page that takes twice as long or longer, since the processor
// takes each load for one of the bytes just stored, whose addresses end alike.
constexpr uint64_t kAreasAt = 256;

std::shared_ptr<unsigned char> reserve(uint64_t num_bytes) {
  num_bytes += kAreasAt;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* data = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (data == MAP_FAILED) {
    throw Error(Failure::kSetup,
                "network: cannot reserve " + std::to_string(num_bytes) + " bytes of addresses for send areas");
  }
  madvise(data, num_bytes, MADV_DONTFORK);
  return {static_cast<unsigned char*>(data) + kAreasAt,
          [num_bytes](unsigned char* areas) { munmap(areas - kAreasAt, num_bytes); }};
}

// But for the first and the last page of an area.
void give_back(unsigned char* area, uint64_t num_bytes) {
  const uint64_t behind = reinterpret_cast<uintptr_t>(area) % kPageBytes;
  if (num_bytes <= kPageBytes) return;
  madvise(area + kPageBytes - behind, (num_bytes - (kPageBytes - behind)) / kPageBytes * kPageBytes, MADV_DONTNEED);
}

}  // namespace

void SendAreas::open(const Network::Peers& peers, std::shared_ptr<Window> rows_areas) {
  peers_ = peers;
  rows_areas_ = std::move(rows_areas);
  areas_ = reserve(peers.max_peers * area_bytes());
}

SendAreas::Place SendAreas::place_of(const void* at) const {
  const auto* byte = static_cast<const unsigned char*>(at);
  if (is_in_rows_areas(byte)) {
    const auto offset = static_cast<uint64_t>(byte - rows_areas_->data());
    return {static_cast<uint32_t>(offset / peers_.rows_bytes), 0, offset % peers_.rows_bytes};
  }
  const auto offset = static_cast<uint64_t>(byte - areas_.get());
  const uint64_t in_link = offset % area_bytes(), rows_bytes = rows_bytes_on_host();
  const bool is_meta = in_link >= rows_bytes;
  return {static_cast<uint32_t>(offset / area_bytes()), is_meta, in_link - (is_meta ? rows_bytes : 0)};
}

Areas SendAreas::add(uint32_t peer_idx) const {
  require_memory("the send area for one peer", area_bytes());
  unsigned char* area = areas_.get() + peer_idx * area_bytes();
  unsigned char* rows = area;
  if (rows_areas_ != nullptr) {
    (void)rows_areas_->add_object(peer_idx);
    rows = rows_areas_->data() + peer_idx * peers_.rows_bytes;
  }
  return {rows, peers_.rows_bytes, area + rows_bytes_on_host(), peers_.meta_bytes};
}

void SendAreas::remove(uint32_t peer_idx) const {
  if (rows_areas_ != nullptr) (void)rows_areas_->remove_object(peer_idx);
  give_back(areas_.get() + peer_idx * area_bytes(), rows_bytes_on_host() + peers_.meta_bytes);
}

void SendAreas::add_part(MessageHead& head, MessagePart (&parts)[kMaxParts], uint32_t first_part, const void* to,
                         uint64_t num_bytes) const {
  const Place place = place_of(to);
  MessagePart* last = head.num_parts == first_part ? nullptr : &parts[head.num_parts - 1];
  if (last != nullptr && last->area == place.area && last->offset + last->num_bytes == place.offset) {
    last->num_bytes += num_bytes;
  } else if (head.num_parts == kMaxParts) {
    throw Error(Failure::kSetup, "network: a message of too many parts");
  } else {
    parts[head.num_parts++] = {place.area, 0, place.offset, num_bytes};
  }
}

uint64_t bytes_of(const std::vector<Piece>& pieces) {
  uint64_t num_bytes = 0;
  for (const Piece& piece : pieces) num_bytes += piece.num_bytes;
  return num_bytes;
}

uint64_t random_number() {
  uint64_t number = 0;
  while (getrandom(&number, sizeof number, 0) != sizeof number) {
  }
  return number;
}

}  // namespace m2n
