// SPDX-License-Identifier: Apache-2.0
// What fuzz_attention keeps of an attention rank: links, and dispatches in flight.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "exchange/host/attention.h"
#include "harness.h"

namespace fuzz {

using namespace m2n;

inline constexpr uint32_t kExperts = 6, kTopK = 3, kMaxTokens = 4, kMicrobatches = 2, kHidden = 20;
inline constexpr uint32_t kRanks = 2;     // expert e lives on rank e % 2
inline constexpr uint32_t kMaxLives = 4;  // at a time
inline constexpr uint32_t kMostLinks = 8;
inline constexpr uint32_t kNobody = 0xFFFFFFFFu, kMissing = kMostLinks;

inline constexpr uint32_t kLayer = 1;  // of every dispatch

// What is known of one (peer, slot).
struct Lane {
  uint32_t sent = 0;        // seq of the last message
  bool is_answered = true;  // a reply with that seq was rung at some time
  uint32_t reply_rows = 0;  // that the reply must announce
  bool was_gone = false;    // a verb may have found that it will never come: a late one need not count
};

struct Peer {
  std::unique_ptr<FakePeer> fake;
  bool is_live = true;
  bool has_left = false;  // with a goodbye
  bool is_given_up = false;
  Lane lanes[kMicrobatches];
};

// One dispatch in flight.
struct Flight {
  bool is_busy = false;
  uint32_t num_tokens = 0;
  int32_t ids[kMaxTokens][kTopK];
  float weights[kMaxTokens][kTopK];
  uint32_t peer_of_rank[kRanks];  // who owes a reply with rows: which of all links, kNobody or kMissing
};

// Writes a reply, or what is none.
inline void write_reply(Bytes& bytes, const Layout& layout, Peer& peer) {
  const uint32_t slot = bytes.below(kMicrobatches);
  Lane& lane = peer.lanes[slot];
  const uint8_t raw = bytes.below(4) != 0 ? uint8_t{0} : bytes.take<uint8_t>();  // what the fuzzer likes
  uint32_t seq = lane.sent;
  if (raw & 1) seq += static_cast<uint32_t>(bytes.take<int8_t>());
  uint32_t num_rows = raw & 2 ? bytes.take<uint32_t>() : lane.reply_rows;
  if (raw & 4) num_rows = kRefusedRows;
  Header header{};
  header.num_rows = raw & 8 ? bytes.take<uint32_t>() : num_rows;
  header.detail = raw & 16 ? bytes.take<uint32_t>() : 1;
  header.layer = kLayer;
  header.microbatch = slot;
  if (raw & 128) (bytes.below(2) == 0 ? header.layer : header.microbatch) += 1;
  const auto fill = static_cast<float>(bytes.take<int8_t>());
  const float odd = raw & 32 ? bytes.take<float>() : 0.5f;
  for (uint32_t i = 0; i < layout.combine_rows.max_rows * kHidden; ++i) {
    const float value = i % 7 == 0 ? odd : fill + static_cast<float>(i % 16);
    const uint64_t at = layout.combine_rows.row_in_object(slot, 0) * layout.combine_rows.row_bytes;
    std::memcpy(peer.fake->rows() + at + i * sizeof value, &value, sizeof value);
  }
  std::memcpy(peer.fake->meta() + layout.combine_meta.header(slot), &header, sizeof header);
  if (raw & 64) return;
  peer.fake->ring(layout.combine_meta.signal(slot), make_signal(num_rows, seq));
  lane.is_answered |= signal_seq(peer.fake->signal_at(layout.combine_meta.signal(slot))) == lane.sent;
}

enum class Reply { kPending, kGone, kGood, kRefused, kBroken };

inline Reply reply_of(const Layout& layout, const Peer& peer, uint32_t slot) {
  const Lane& lane = peer.lanes[slot];
  const Signal signal = peer.fake->signal_at(layout.combine_meta.signal(slot));
  if (signal_seq(signal) == lane.sent - 1) return peer.is_live ? Reply::kPending : Reply::kGone;
  if (signal_seq(signal) != lane.sent) return Reply::kBroken;
  Header header;
  std::memcpy(&header, peer.fake->meta() + layout.combine_meta.header(slot), sizeof header);
  if (header.layer != kLayer || header.microbatch != slot) return Reply::kBroken;
  if (signal_rows(signal) == kRefusedRows) return Reply::kRefused;
  const bool is_right = signal_rows(signal) == lane.reply_rows && header.num_rows == signal_rows(signal);
  return is_right ? Reply::kGood : Reply::kBroken;
}

inline float reply_value(const Layout& layout, const Peer& peer, uint32_t slot, uint32_t row, uint32_t h) {
  const uint64_t at = layout.combine_rows.row_in_object(slot, row) * layout.combine_rows.row_bytes;
  float value;
  std::memcpy(&value, peer.fake->rows() + at + h * sizeof value, sizeof value);
  return value;
}

inline Flight make_flight(Bytes& bytes) {
  Flight flight{};
  flight.num_tokens = bytes.below(kMaxTokens + 1);
  for (auto& row : flight.ids) {
    const uint32_t first = bytes.below(kExperts);
    for (uint32_t k = 0; k < kTopK; ++k) {
      row[k] = bytes.below(4) == 0 ? -1 : static_cast<int32_t>((first + k) % kExperts);
    }
  }
  for (auto& row : flight.weights) {
    for (float& weight : row) weight = 0.25f * static_cast<float>(bytes.below(16));
  }
  return flight;
}

}  // namespace fuzz
