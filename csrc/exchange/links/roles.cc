// SPDX-License-Identifier: Apache-2.0
// The words for what a caller or a peer did wrong.
#include "exchange/links/roles.h"

namespace m2n {
namespace {

constexpr const char* kNeedsRank =
    ", and the route needs it: bring its next life, or a placement without it, by set_placement";

}  // namespace

void AttentionRole::require_x_dtype(DType x_dtype) const {
  // Rows become float8 only on their way.
  const bool is_float8 = shape_.dispatch_dtype == DType::kFloat8E4M3;
  if (is_float8 ? x_dtype != DType::kFloat8E4M3 : x_dtype == shape_.dispatch_dtype) return;
  throw Error(Failure::kArgument, "x: its dtype is not the Shape's dispatch_dtype");
}

uint32_t AttentionRole::require_live(uint32_t expert_rank) const {
  const int32_t peer_idx = peers_.find(expert_rank);
  if (peer_idx < 0) {
    if (const auto peer = find_gone(expert_rank)) raise_gone(*peer, "dispatch_send", kNeedsRank);
    throw Error(Failure::kPeerLost,
                "dispatch_send: the route needs expert rank " + std::to_string(expert_rank) +
                    ", which this rank never connected to; check the placement",
                static_cast<int>(expert_rank));
  }
  if (!peers_.is_live(static_cast<uint32_t>(peer_idx))) {
    raise_lost(static_cast<uint32_t>(peer_idx), "dispatch_send", kNeedsRank);
  }
  return static_cast<uint32_t>(peer_idx);
}

void AttentionRole::raise_nothing_sent(uint32_t microbatch) const {
  throw Error(Failure::kArgument,
              "microbatch " + std::to_string(microbatch) + ": nothing was dispatched, so there is nothing to combine");
}

void AttentionRole::raise_slot_busy(uint32_t microbatch, uint32_t layer) const {
  throw Error(Failure::kSlotBusy, "dispatch_send: microbatch " + std::to_string(microbatch) +
                                      " is in flight since layer " + std::to_string(layer) +
                                      "; call combine_recv(microbatch=" + std::to_string(microbatch) + ") first");
}

void AttentionRole::raise_refused(uint32_t expert_rank, uint32_t expert, uint32_t layer, uint32_t microbatch) const {
  throw Error(Failure::kProtocol,
              "expert rank " + std::to_string(expert_rank) + " does not host expert " + std::to_string(expert) +
                  " and refused layer " + std::to_string(layer) + " of microbatch " + std::to_string(microbatch) +
                  "; give both sides the same placement",
              static_cast<int>(expert_rank));
}

ExpertRole::ExpertRole(const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport,
                       const std::vector<uint32_t>& local_experts)
    : Comm(Role::kExpert, shape, rank, max_peers, transport) {
  host(local_experts);
}

void ExpertRole::host(const std::vector<uint32_t>& local_experts) {
  num_local_experts_ = static_cast<uint32_t>(local_experts.size());
  expert_idx_.assign(shape_.num_experts, kNone);
  for (uint32_t i = 0; i < num_local_experts_; ++i) expert_idx_.at(local_experts[i]) = static_cast<int32_t>(i);
}

void ExpertRole::raise_if_lost(const char* doing) const {
  for (uint32_t peer_idx = 0; peer_idx < peers_.size(); ++peer_idx) {
    if (is_lost(peer_idx)) raise_lost(peer_idx, doing);
  }
}

void ExpertRole::raise_if_lost(const Wanted& wanted, int32_t missing_rank) const {
  raise_if_lost();
  for (uint32_t i = 0; i < wanted.num_attention_ranks; ++i) {
    const uint32_t rank = wanted.attention_ranks[i];
    const int32_t peer_idx = peers_.find(rank);
    if (peer_idx == kNone) {
      if (const auto peer = find_gone(rank)) raise_listed(*peer);
    } else if (static_cast<int32_t>(rank) == missing_rank && !peers_.is_live(static_cast<uint32_t>(peer_idx))) {
      raise_listed(info_of(static_cast<uint32_t>(peer_idx)));
    }
  }
}

void ExpertRole::raise_listed(const PeerInfo& peer) const {
  throw Error(
      Failure::kPeerLost,
      "dispatch_recv: " + words_for(peer) + "; take it off attention_ranks, or wait for its next life (wait_peer)",
      static_cast<int>(peer.rank));
}

void ExpertRole::raise_timeout(int32_t missing_rank) const {
  if (missing_rank < 0) {
    throw Error(Failure::kTimeout, "dispatch_recv: the listed attention ranks are at different layers or microbatches");
  }
  throw Error(
      Failure::kTimeout,
      "dispatch_recv: attention rank " + std::to_string(missing_rank) +
          (peers_.find(static_cast<uint32_t>(missing_rank)) < 0 ? " has not connected" : " has not dispatched") +
          " in time, others have; with attention_ranks= every listed rank must send, if only zero rows",
      missing_rank);
}

void ExpertRole::raise_behind(uint32_t peer_idx, uint32_t version, uint32_t shown) const {
  throw Error(Failure::kTimeout,
              "wait_placement(" + std::to_string(version) + "): " + peer_name(rank_of(peer_idx)) +
                  " has shown placement version " + std::to_string(shown) +
                  " so far; it shows a newer one once it has called set_placement, everything that it sent before is "
                  "combined, and it dispatches again or calls idle()",
              static_cast<int>(rank_of(peer_idx)));
}

void ExpertRole::require_answerable(const void* owner, bool is_answered, DType y_dtype) const {
  require_usable();
  if (owner != this) throw Error(Failure::kArgument, "batch: it was received by another comm");
  if (is_answered) throw Error(Failure::kArgument, "batch: combine_send was already called for it");
  if (y_dtype == DType::kFloat8E4M3) throw Error(Failure::kArgument, "y: only rows to experts may be float8");
}

}  // namespace m2n
