// SPDX-License-Identifier: Apache-2.0
// The words for a peer that is gone, and the giving up of one that does not answer.
#include "exchange/links/membership.h"

#include <cstdio>

namespace m2n {

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

void Comm::recover(uint32_t peer_rank) {
  give_up(peer_rank);
  return_gone();
}

std::string Comm::words_for_violator(uint32_t peer_idx, const std::string& what) const {
  return peer_name(rank_of(peer_idx)) + " broke the protocol, as " + own_name() + " saw it: " + what;
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
  std::unique_lock lock(membership_mutex_);
  const PeerInfo info = info_of(peer_idx);
  lock.unlock();
  raise_gone(info, doing, more, std::move(owed));
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
