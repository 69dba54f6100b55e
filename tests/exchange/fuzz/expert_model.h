// SPDX-License-Identifier: Apache-2.0
// What fuzz_expert expects of an expert rank, computed again in the simplest way.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "exchange/host/expert.h"
#include "harness.h"

namespace fuzz {

using namespace m2n;

inline constexpr uint32_t kExperts = 6, kTopK = 3, kMaxTokens = 4, kMicrobatches = 2, kSlots = kMicrobatches + 1;
inline constexpr uint32_t kMaxLives = 4;  // at a time
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
  bool is_doubtful = false;  // or perhaps it is not: one of several that break the protocol was thrown away
  Header header{};           // as it was when the message was accepted
};

struct Peer {
  std::unique_ptr<FakePeer> fake;
  bool is_live = true;
  bool has_left = false;  // with a goodbye
  bool is_given_up = false;
  bool is_closed = false;  // gone, and looked at for the last time
  Box boxes[kSlots];
};

// The comm's look at a slot. False: its message breaks the protocol.
inline bool look_at(const Layout& layout, Peer& peer, uint32_t slot) {
  Box& box = peer.boxes[slot];
  const Signal signal = peer.fake->signal_at(layout.dispatch_meta.signal(slot));
  if (signal_seq(signal) == box.accepted) return true;
  if (signal_seq(signal) != box.accepted + 1 || box.accepted != box.replied) return false;
  Header header;
  std::memcpy(&header, peer.fake->meta() + layout.dispatch_meta.header(slot), sizeof header);
  if (signal_rows(signal) > kMaxTokens || header.num_rows != signal_rows(signal)) return false;
  if (slot != layout.retry_slot() && header.microbatch != slot) return false;
  if (header.flags > 3) return false;
  box.accepted = signal_seq(signal);
  box.header = header;
  box.is_pending = header.num_rows != 0 || (header.flags & kFlagIdleNext) == 0;
  if (!box.is_pending) box.replied = box.accepted;
  return true;
}

// All links that there have been, in order, and which of them count.
class Peers : public std::vector<Peer> {
 public:
  Peer* newest(uint32_t rank) {
    Peer* found = nullptr;
    for (Peer& peer : *this) {
      if (peer.fake->rank() == rank) found = &peer;
    }
    return found;
  }
  // Who has an index, or had it last.
  Peer* at_index(uint32_t peer_idx) {
    Peer* found = nullptr;
    for (Peer& peer : *this) {
      if (peer.fake->idx() == peer_idx) found = &peer;
    }
    return found;
  }
  // What came whole before its sender's end counts until that is given up or has a newer life.
  bool is_served(const Peer& peer) { return peer.is_live || (!peer.is_given_up && newest(peer.fake->rank()) == &peer); }
  // The comm's next look, in the model. Returns the peer that is found to have broken the protocol.
  Peer* scan(const Layout& layout) {
    for (uint32_t i = 0; i < kMaxLives; ++i) {
      Peer* peer = at_index(i);
      if (peer == nullptr || peer->is_closed) continue;
      for (uint32_t slot = 0; slot < kSlots; ++slot) {
        if (!look_at(layout, *peer, slot) && peer->is_live) return peer;
      }
      peer->is_closed = !peer->is_live;
    }
    return nullptr;
  }

  // Before an index is given back: what a peer that is gone broke is nobody's any more.
  void close_gone(const Layout& layout) {
    for (Peer& peer : *this) {
      for (uint32_t slot = 0; slot < kSlots && !peer.is_live && !peer.is_closed; ++slot) look_at(layout, peer, slot);
      peer.is_closed = !peer.is_live;
    }
  }
  // The caller must say that it knows.
  bool is_lost(const Peer& peer) { return !peer.is_live && !peer.has_left && is_served(peer); }
};

enum class Verdict { kFine, kBroken, kNotHosted };

inline const int32_t* ids_of(const Layout& layout, const Peer& peer, uint32_t slot) {
  return reinterpret_cast<const int32_t*>(std::as_const(*peer.fake).meta() + layout.dispatch_meta.ids(slot));
}
inline const float* weights_of(const Layout& layout, const Peer& peer, uint32_t slot) {
  return reinterpret_cast<const float*>(std::as_const(*peer.fake).meta() + layout.dispatch_meta.weights(slot));
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

// Writes a message, or what is none.
inline void write_message(Bytes& bytes, const Layout& layout, const Peer& peer) {
  const uint32_t slot = bytes.below(16) == 0 ? layout.retry_slot() : bytes.below(kMicrobatches);
  // Which fields are what the fuzzer likes: none, any, or one alone, behind which no other check hides.
  const uint32_t how = bytes.below(8);
  const uint32_t raw = how == 0 ? bytes.take<uint8_t>() : how == 1 ? 1u << bytes.below(8) : 0u;
  const auto pick = [&](uint32_t bit, uint32_t good) { return raw >> bit & 1 ? bytes.take<uint32_t>() : good; };
  uint32_t seq = peer.boxes[slot].accepted + 1;
  if (raw & 1) seq += static_cast<uint32_t>(bytes.take<int8_t>());
  const uint32_t num_rows = pick(1, bytes.below(kMaxTokens + 1));
  Header header{};
  header.layer = bytes.below(2);
  header.num_rows = pick(2, num_rows);
  header.microbatch = pick(3, slot);
  header.flags = pick(4, bytes.below(4));
  int32_t ids[kMaxTokens][kTopK];
  float weights[kMaxTokens][kTopK];
  for (auto& row : ids) {
    for (uint32_t k = 0; k < kTopK; ++k) {
      row[k] = static_cast<int32_t>(pick(5, k == 0 ? kLocal[bytes.below(4)] : bytes.below(kExperts + 1) - 1));
    }
  }
  for (auto& row : weights) {
    for (float& weight : row) weight = bits_to_float(pick(6, 0x3F000000u));
  }
  unsigned char* meta = peer.fake->meta();
  std::memcpy(meta + layout.dispatch_meta.header(slot), &header, sizeof header);
  std::memcpy(meta + layout.dispatch_meta.ids(slot), ids, sizeof ids);
  std::memcpy(meta + layout.dispatch_meta.weights(slot), weights, sizeof weights);
  if ((raw & 0x80) == 0) peer.fake->ring(layout.dispatch_meta.signal(slot), make_signal(num_rows, seq));
}

inline Wanted make_wanted(Bytes& bytes) {
  static constexpr uint32_t kRanks[] = {0, 1, 2};
  const uint32_t how = bytes.below(32);
  Wanted wanted;
  wanted.is_any_layer = (how & 1) == 0;
  wanted.layer = how >> 4;
  wanted.is_any_microbatch = (how & 2) == 0;
  wanted.microbatch = how >> 3 & 1;
  if ((how & 12) == 12) {
    wanted.attention_ranks = kRanks;
    wanted.num_attention_ranks = 1 + how % 2;
  }
  return wanted;
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
