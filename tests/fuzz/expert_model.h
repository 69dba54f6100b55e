// SPDX-License-Identifier: Apache-2.0
// What fuzz_expert expects of an expert rank, computed again in the simplest way.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "exchange/expert.h"
#include "harness.h"

namespace fuzz {

using namespace m2n;

inline constexpr uint32_t kExperts = 6, kTopK = 3, kMaxTokens = 4, kMicrobatches = 2, kSlots = kMicrobatches + 1;
inline const std::vector<uint32_t> kLocal{0, 2, 3, 5};

inline Shape make_shape(ReduceAt reduce_at) {
  return {20, kExperts, kTopK, kMaxTokens, kMicrobatches, DType::kFloat32, DType::kFloat32, reduce_at};
}

inline int32_t local_idx(int32_t id) {
  const auto found = std::find(kLocal.begin(), kLocal.end(), static_cast<uint32_t>(id));
  return found == kLocal.end() ? kNone : static_cast<int32_t>(found - kLocal.begin());
}

// What the comm must know of one (peer, slot).
struct Box {
  uint32_t accepted = 0;
  uint32_t replied = 0;
  bool is_pending = false;
  Header header{};  // as it was when the message was accepted
};

struct Peer {
  std::unique_ptr<FakePeer> fake;
  bool is_live = true;
  bool is_given_up = false;
  Box boxes[kSlots];
};

enum class Verdict { kFine, kBroken, kNotHosted };

inline const int32_t* ids_of(const Layout& layout, const Peer& peer, uint32_t slot) {
  return reinterpret_cast<const int32_t*>(peer.fake->small() + layout.dispatch_small.ids(slot));
}
inline const float* weights_of(const Layout& layout, const Peer& peer, uint32_t slot) {
  return reinterpret_cast<const float*>(peer.fake->small() + layout.dispatch_small.weights(slot));
}

// What must come of a message whose header is in order.
inline Verdict judge(const Layout& layout, const Peer& peer, uint32_t slot) {
  for (uint32_t row = 0; row < peer.boxes[slot].header.num_rows; ++row) {
    for (uint32_t k = 0; k < kTopK; ++k) {
      const int32_t id = ids_of(layout, peer, slot)[row * kTopK + k];
      if (k > 0 && id == -1) break;
      if (id < 0 || id >= static_cast<int32_t>(kExperts)) return Verdict::kBroken;
      if (!std::isfinite(weights_of(layout, peer, slot)[row * kTopK + k])) return Verdict::kBroken;
      if (local_idx(id) == kNone) return Verdict::kNotHosted;
    }
  }
  return Verdict::kFine;
}

inline void check_lists(const Batch& batch, const std::vector<std::pair<int32_t, float>>* by_expert,
                        const std::vector<std::pair<int32_t, uint32_t>>& wire) {
  size_t position = 0;
  for (uint32_t expert = 0; expert < kLocal.size(); ++expert) {
    require(batch.expert_offsets.at(expert) == static_cast<int32_t>(position), "expert_offsets");
    for (const auto& [row, weight] : by_expert[expert]) {
      require(batch.row_index_by_expert.at(position) == row, "row_index_by_expert");
      require(std::memcmp(&batch.weights.at(position), &weight, sizeof weight) == 0, "weights");
      ++position;
    }
  }
  require(batch.expert_offsets.at(kLocal.size()) == static_cast<int32_t>(position), "the last of expert_offsets");
  std::vector<bool> is_used(wire.size());
  for (size_t pair = 0; pair < wire.size(); ++pair) {
    const auto at = static_cast<size_t>(batch.pair_position.at(pair));
    require(at < wire.size() && !is_used[at], "pair_position is a permutation");
    is_used[at] = true;
    require(batch.row_index_by_expert[at] == wire[pair].first, "pair_position leads to the pair's row");
  }
}

}  // namespace fuzz
