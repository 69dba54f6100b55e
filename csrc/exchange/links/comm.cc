// SPDX-License-Identifier: Apache-2.0
// What a comm of either role tells, the words for a peer that is gone, and what a message in a send area is.
#include "exchange/links/comm.h"

#include <cstdio>

#include "transport/choice.h"

namespace m2n {
namespace {

// Of one row to an expert rank: ids and weights.
uint64_t ids_bytes(const Shape& shape) { return (sizeof(int32_t) + sizeof(float)) * uint64_t{shape.top_k}; }

}  // namespace

Comm::Comm(Role role, const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport)
    : Membership(role, rank, max_peers, make_transport(transport), shape),
      shape_(shape),
      counters_(peer_rows().row_bytes + (role == Role::kAttention ? ids_bytes(shape) : 0),
                rows().row_bytes + (role == Role::kExpert ? ids_bytes(shape) : 0)) {}

void Comm::check() {
  require_usable();
  for (uint32_t i = 0; i < peers_.size(); ++i) {
    if (is_lost(i)) raise_lost(i, "check()");
  }
}

Stats Comm::stats() const {
  Stats copy = counters_.read();
  copy.wait_ns = waited_ns();
  const HeldSignals held = held_signals();
  copy.signals_held = held.count;
  copy.held_ns = held.total_ns;
  return copy;
}

void Comm::require_microbatch(uint32_t microbatch) const {
  require_usable();
  if (microbatch < shape_.microbatches) return;
  throw Error(Failure::kArgument, "microbatch: expected 0 to " + std::to_string(shape_.microbatches - 1) + ", got " +
                                      std::to_string(microbatch));
}

void Comm::list_pieces(const Signal* word, Signal value, std::vector<Piece>& pieces) const {
  const auto* at = reinterpret_cast<const unsigned char*>(word);
  const auto is_in = [&](uint32_t peer_idx) {
    if (peers_.state(peer_idx) == PeerState::kUnused) return false;  // its view may be written just now
    const unsigned char* meta = peers_.entries[peer_idx].view.meta;
    return at >= meta && at < meta + peer_meta().object_bytes;
  };
  uint32_t peer_idx = 0;
  while (!is_in(peer_idx)) ++peer_idx;
  const PeerView& view = peers_.entries[peer_idx].view;
  const auto slot = static_cast<uint32_t>(static_cast<uint64_t>(at - view.meta) / kLineBytes);
  const auto add = [&](unsigned char* bytes, uint64_t num_bytes) {
    if (num_bytes != 0) pieces.push_back({bytes, bytes, num_bytes});
  };
  const Rows& rows = peer_rows();
  const uint64_t num_rows = signal_rows(value) == kRefusedRows ? 0 : signal_rows(value);
  const uint64_t num_ids = role_ == Role::kAttention ? num_rows * layout_.top_k : 0;
  add(view.meta + peer_meta().header(slot), sizeof(Header));
  add(view.meta + peer_meta().ids(slot), num_ids * sizeof(int32_t));
  add(view.meta + peer_meta().weights(slot), num_ids * sizeof(float));
  add(view.rows + rows.row_in_object(slot, 0) * rows.row_bytes, num_rows * rows.row_bytes);
}

const char* describe(LossCause cause) {
  switch (cause) {
    case LossCause::kNone:
      return "it closed its comm";
    case LossCause::kProcessDied:
      return "its process died";
    case LossCause::kConnectionClosed:
      return "its control connection closed without a goodbye";
    case LossCause::kProtocol:
      return "it broke the protocol";
    case LossCause::kReplaced:
      return "a newer life of the same rank has joined";
    case LossCause::kSilent:
      return "nothing was heard of it for three heartbeats: its process is stopped, or its host or the network is down";
    case LossCause::kDropped:
      return "its link was dropped";
  }
  return "";
}

void Comm::give_up_late(uint32_t peer_idx) {
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%.3g", static_cast<double>(give_up_ns_) / 1e9);
  drop_peer(peer_idx, LossCause::kDropped,
            peer_name(rank_of(peer_idx)) + " was alive but did not answer " + own_name() + " for " + seconds +
                " s (Config.give_up_s)");
}

std::string Comm::words_for(const PeerInfo& peer) const {
  const bool has_left = peer.state == PeerState::kLeft;
  const std::string what = peer.violation.empty() ? (has_left ? " has left: " : " is lost: ") + peer.why
                                                  : " broke the protocol and was dropped: " + peer.violation;
  return peer_name(peer.rank) + what + (peer.is_given_up ? ", and it was given up" : "");
}

void Comm::raise_lost(uint32_t peer_idx, const std::string& doing, const std::string& more, Owed owed) const {
  raise_gone(info_of(peer_idx), doing, more, std::move(owed));
}

void Comm::raise_gone(const PeerInfo& peer, const std::string& doing, const std::string& more, Owed owed) const {
  const bool is_known = peer.is_given_up || peer.is_returned;
  const std::string advice = "; call recover(" + std::to_string(peer.rank) + ") to go on without it";
  Error error(peer.violation.empty() ? Failure::kPeerLost : Failure::kProtocol,
              doing + ": " + words_for(peer) + more + (is_known ? "" : advice), static_cast<int>(peer.rank));
  if (error.kind() == Failure::kPeerLost) error.set_owed(std::move(owed));
  throw error;
}

void Comm::raise_violation(uint32_t peer_idx, const std::string& what) {
  const uint32_t peer_rank = rank_of(peer_idx);
  drop_peer(peer_idx, LossCause::kProtocol, words_for_violator(peer_idx, what));
  throw Error(Failure::kProtocol, peer_name(peer_rank) + " broke the protocol and was dropped: " + what,
              static_cast<int>(peer_rank));
}

}  // namespace m2n
