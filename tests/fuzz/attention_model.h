// SPDX-License-Identifier: Apache-2.0
// What fuzz_attention keeps of an attention rank: links, and dispatches in flight.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "harness.h"

namespace fuzz {

inline constexpr uint32_t kExperts = 6, kTopK = 3, kMaxTokens = 4, kMicrobatches = 2, kHidden = 20;
inline constexpr uint32_t kRanks = 2;     // expert e lives on rank e % 2
inline constexpr uint32_t kMaxLives = 4;  // at a time
inline constexpr uint32_t kMostLinks = 8;
inline constexpr uint32_t kNobody = 0xFFFFFFFFu, kMissing = kMostLinks;

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
