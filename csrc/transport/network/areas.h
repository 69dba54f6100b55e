// SPDX-License-Identifier: Apache-2.0
// Send areas: what stands here for the memory of peers. They lie in one range, so that an address tells the link.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "transport/network/message.h"
#include "transport/transport.h"

namespace m2n {

class SendAreas {
 public:
  // Where an address lies in the objects of a peer.
  struct Place {
    uint32_t peer_idx, area;
    uint64_t offset;
  };

  // `rows_areas`: where given, rows lie there, a peer's object each.
  void open(const Network::Peers& peers, std::shared_ptr<Window> rows_areas);
  bool has_rows_apart() const { return rows_areas_ != nullptr; }
  bool covers(const void* at) const {
    const auto* byte = static_cast<const unsigned char*>(at);
    const bool is_on_host = byte >= areas_.get() && byte < areas_.get() + peers_.max_peers * area_bytes();
    return is_on_host || is_in_rows_areas(byte);
  }
  Place place_of(const void* at) const;
  // Of one peer; made where rows lie apart.
  Areas add(uint32_t peer_idx) const;
  // The system may have its memory again.
  void remove(uint32_t peer_idx) const;
  // Notes in a header that the next bytes of its message go to `to`: in the last part, where they are its neighbours
  // and it is not before `first_part`, else in one more. Throws Error(kSetup) where there is no room for one.
  void add_part(MessageHead& head, MessagePart (&parts)[kMaxParts], uint32_t first_part, const void* to,
                uint64_t num_bytes) const;

 private:
  // From one peer's send area to the next, on pages of their own.
  uint64_t area_bytes() const { return rows_bytes_on_host() + peers_.meta_bytes + kPageBytes; }
  uint64_t rows_bytes_on_host() const { return rows_areas_ == nullptr ? peers_.rows_bytes : 0; }
  bool is_in_rows_areas(const unsigned char* at) const {
    return rows_areas_ != nullptr && at >= rows_areas_->data() && at < rows_areas_->data() + rows_areas_->bytes();
  }

  Network::Peers peers_{};
  std::shared_ptr<unsigned char> areas_;  // by peer index: rows, then meta
  std::shared_ptr<Window> rows_areas_;    // where given, rows, and none of them above
};

// Where a part of a message goes in the objects of a link.
inline unsigned char* data_of(const Areas& areas, uint32_t area) { return area == 0 ? areas.rows : areas.meta; }

uint64_t bytes_of(const std::vector<Piece>& pieces);

// A number that nobody can guess.
uint64_t random_number();

}  // namespace m2n
