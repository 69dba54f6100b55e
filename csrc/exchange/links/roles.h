// SPDX-License-Identifier: Apache-2.0
// What the host and the device form of each role share: their checks, and the words of their errors.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "exchange/bodies/inbox.h"
#include "exchange/links/comm.h"

namespace m2n {

class AttentionRole : public Comm {
 protected:
  AttentionRole(const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport)
      : Comm(Role::kAttention, shape, rank, max_peers, transport) {}

  void require_x_dtype(DType x_dtype) const;
  // Throws for a rank that cannot be sent to: it is gone, or was never there. Else its peer index.
  uint32_t require_live(uint32_t expert_rank) const;
  [[noreturn]] void raise_nothing_sent(uint32_t microbatch) const;
  [[noreturn]] void raise_slot_busy(uint32_t microbatch, uint32_t layer) const;
  // An expert rank does not host an expert that it was asked for.
  [[noreturn]] void raise_refused(uint32_t expert_rank, uint32_t expert, uint32_t layer, uint32_t microbatch) const;
};

class ExpertRole : public Comm {
 public:
  // (live attention rank, the newest placement version that it has shown; 0 before its first message).
  using PlacementVersions = std::vector<std::pair<uint32_t, uint32_t>>;

 protected:
  // `local_experts`: the global ids hosted here, ascending.
  ExpertRole(const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport,
             const std::vector<uint32_t>& local_experts);

  // A lost peer ends a wait that would otherwise go on: once no batch is ready, the caller must know.
  void raise_if_lost(const char* doing = "dispatch_recv") const;
  // Strict: so does a listed rank that has not sent and is gone in any way: `missing_rank`, if an index is left of it.
  void raise_if_lost(const Wanted& wanted, int32_t missing_rank) const;
  [[noreturn]] void raise_listed(const PeerInfo& peer) const;
  // Strict: `missing_rank` has not sent, or (-1) all have, but of different batches.
  [[noreturn]] void raise_timeout(int32_t missing_rank) const;
  // wait_placement() is over, and this peer had shown an older version.
  [[noreturn]] void raise_behind(uint32_t peer_idx, uint32_t version, uint32_t shown) const;
  // The first live peer with shown(peer_idx) < version, or -1.
  template <class Shown>
  int32_t find_behind(uint32_t version, Shown&& shown) const {
    for (uint32_t peer_idx = 0; peer_idx < peers_.size(); ++peer_idx) {
      if (peers_.is_live(peer_idx) && shown(peer_idx) < version) return static_cast<int32_t>(peer_idx);
    }
    return kNone;
  }
  template <class Shown>
  PlacementVersions list_versions(Shown&& shown) const {
    PlacementVersions versions;
    for (uint32_t peer_idx = 0; peer_idx < peers_.size(); ++peer_idx) {
      if (peers_.is_live(peer_idx)) versions.emplace_back(rank_of(peer_idx), shown(peer_idx));
    }
    return versions;
  }
  // The global ids hosted here from now on, ascending.
  void host(const std::vector<uint32_t>& local_experts);
  void require_answerable(const void* owner, bool is_answered, DType y_dtype) const;

  uint32_t num_local_experts_ = 0;
  std::vector<int32_t> expert_idx_;  // global id -> local index, -1: not hosted
};

}  // namespace m2n
