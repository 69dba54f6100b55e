// SPDX-License-Identifier: Apache-2.0
// How links come and go: handshakes, their ends, and what is given back for the next one.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>

#include "exchange/links/membership.h"

namespace m2n {
namespace {

constexpr size_t kMostRemembered = 4096;  // links that are gone, for peers()
constexpr int64_t kReturnNs = 200'000'000;

}  // namespace

uint32_t Membership::last_link_of(uint64_t life) const {
  uint32_t last = 0;
  for (const PeerInfo& peer : history_) {
    if (peer.life == life) last = std::max(last, peer.link);
  }
  for (const Link& link : links_) {
    if (link.is_taken && link.life == life) last = std::max(last, link.link);
  }
  return last;
}

bool Membership::is_full() const {
  std::lock_guard lock(mutex_);
  return std::all_of(links_.begin(), links_.end(), [](const Link& link) { return link.is_taken; });
}

uint32_t Membership::take_index(uint32_t peer_rank) {
  const auto free = std::find_if(links_.begin(), links_.end(), [](const Link& link) { return !link.is_taken; });
  const auto peer_idx = static_cast<uint32_t>(free - links_.begin());
  if (peer_idx == max_peers_) {
    throw Error(Failure::kSetup,
                own_name() + " has all of its max_peers=" + std::to_string(max_peers_) + " peer indices in use" +
                    why_not_returned() + "; make it with a larger max_peers",
                static_cast<int>(peer_rank));
  }
  free->is_taken = true;
  PeerEntry& entry = peers_.entries[peer_idx];
  store_relaxed(&entry.rank, peer_rank);  // relaxed, both: its state makes them known
  store_relaxed(&entry.joined, ++num_joined_);
  // Readable from here on, but not LIVE before watch().
  if (peer_idx == peers_.size()) store_release(peers_.count, peer_idx + 1);  // SYNC: link-added
  return peer_idx;
}

std::string Membership::why_not_returned() {
  uint32_t num_lost = 0, num_held = 0, num_mapped = 0;
  for (uint32_t i = 0; i < peers_.size(); ++i) {
    if (!is_gone(i)) continue;
    (is_lost(i) ? num_lost : is_held(i) ? num_held : num_mapped) += 1;
  }
  const auto part = [](uint32_t count, const std::string& text) {
    return count == 0 ? "" : ", " + std::to_string(count) + " by peers that " + text;
  };
  return part(num_lost, "are lost: call recover() for each") + part(num_held, "are gone but " + why_held()) +
         part(num_mapped, "are gone, but whose comms in this process still have their memory: close and drop them");
}

Offer Membership::offer(uint32_t peer_rank, uint64_t life, bool is_over_network, uint32_t link_number) {
  require_usable();
  return_gone();
  // What is gone may be held for a moment.
  for (const int64_t until_ns = now_ns() + kReturnNs; has_gone() && is_full() && now_ns() < until_ns;) {
    usleep(1000);
    return_gone();
  }
  std::lock_guard lock(mutex_);
  const uint32_t last_number = last_link_of(life);
  if (link_number == 0) link_number = last_number + 1;
  if (link_number <= last_number) {
    throw Error(Failure::kSetup,
                "handshake: " + peer_name(peer_rank) + " wants to make its link " + std::to_string(link_number) +
                    " with " + own_name() + ", which has had " + std::to_string(last_number) + "; connect anew",
                static_cast<int>(peer_rank));
  }
  is_over_network |= !transport_->shares_memory();
  if (is_over_network) make_network();
  const uint32_t peer_idx = take_index(peer_rank);
  Link& link = links_[peer_idx];
  link.life = life;
  link.link = link_number;
  link.is_over_network = is_over_network;
  try {
    return {peer_idx, transport_->origin(), wakes_peers(), make_objects(peer_idx), make_address(peer_idx), link_number};
  } catch (...) {
    withdraw_locked(peer_idx);
    throw;
  }
}

std::vector<Handle> Membership::make_objects(uint32_t peer_idx) {
  std::vector<Handle> handles;
  handles.push_back(rows_window_->add_object(peer_idx));
  handles.push_back(meta_window_->add_object(peer_idx));
  for (uint32_t slot = 0; slot < layout_.num_slots; ++slot) {
    meta_window_->set_word(peer_idx * this->meta().object_bytes + this->meta().signal(slot),
                           make_signal(0, first_seq_));
  }
  if (links_[peer_idx].is_over_network) return std::vector<Handle>(3);  // which nobody could use there
  Fd wake_fd(fcntl(wake_handle_.fd.get(), F_DUPFD_CLOEXEC, 0));
  if (wake_fd.get() < 0) throw Error(Failure::kSetup, own_name() + ": no file descriptor left for a joining peer");
  handles.push_back({std::move(wake_fd), wake_handle_.bytes, wake_handle_.id});
  return handles;
}

std::string Membership::make_address(uint32_t peer_idx) {
  if (!links_[peer_idx].is_over_network) return "";
  return network_owner_->make_address(peer_idx,
                                      {rows_window_->data() + peer_idx * rows().stride_bytes, rows().object_bytes,
                                       meta_window_->data() + peer_idx * meta().object_bytes, meta().object_bytes});
}

void Membership::withdraw(uint32_t peer_idx) {
  std::lock_guard lock(mutex_);
  if (peer_idx < peers_.size() && links_[peer_idx].is_taken && !is_closed()) withdraw_locked(peer_idx);
}

void Membership::withdraw_locked(uint32_t peer_idx) {
  if (peers_.state(peer_idx) != PeerState::kUnused || give_back(peer_idx)) return;
  links_[peer_idx].is_withdrawn = true;
  add_relaxed(&num_gone_, 1u);
}

bool Membership::has_older(uint32_t peer_idx) const {
  for (uint32_t i = 0; i < peers_.size(); ++i) {
    const bool is_older = rank_of(i) == rank_of(peer_idx) && peers_.joined(i) < peers_.joined(peer_idx);
    if (is_older && peers_.state(i) != PeerState::kUnused) return true;
  }
  return false;
}

void Membership::return_gone() {
  if (!has_gone() || !is_own_process()) return;
  keep_verbs_out([this] {
    std::lock_guard lock(mutex_);
    if (is_closed()) return;
    for (uint32_t i = 0; i < peers_.size(); ++i) {
      const bool is_withdrawn = links_[i].is_withdrawn;
      if (!is_withdrawn && (!is_gone(i) || is_lost(i) || is_held(i) || has_older(i))) continue;
      PeerInfo info = info_locked(i);
      info.is_returned = true;
      if (!give_back(i)) continue;
      add_relaxed(&num_gone_, static_cast<uint32_t>(-1));
      if (is_withdrawn) continue;
      history_.push_back(std::move(info));
      if (history_.size() > kMostRemembered) history_.pop_front();
    }
  });
}

PeerInfo Membership::info_locked(uint32_t peer_idx) const {
  const Link& link = links_[peer_idx];
  const PeerState state = peers_.state(peer_idx);
  // The cause is written before the state that needs one, and may be under way as long as the peer is LIVE.
  const LossCause cause = state == PeerState::kLive ? LossCause::kNone : link.cause;
  PeerInfo info{rank_of(peer_idx), link.life, state, cause, link.link, peers_.joined(peer_idx), "", ""};
  if (state == PeerState::kLive) return info;
  info.why = cause == LossCause::kDropped && !link.why.empty() ? link.why : describe(cause);
  info.violation = link.violation;
  info.is_given_up = peers_.is_given_up(peer_idx);
  return info;
}

// False: something of the link is still in use.
bool Membership::give_back(uint32_t peer_idx) {
  Link& link = links_[peer_idx];
  link.exposed.reset();  // before the network's memory
  if (link.is_over_network && !network_owner_->release(peer_idx)) return false;
  if (relay_ != nullptr && link.mappings.size() > 1) {
    relay_->forget(link.mappings[1]->data(), peer_meta().object_bytes);
  }
  link.mappings.clear();
  peers_.entries[peer_idx].view = {};  // it pointed there
  if (!rows_window_->remove_object(peer_idx) || !meta_window_->remove_object(peer_idx)) return false;
  if (peers_.state(peer_idx) != PeerState::kUnused) reset_peer(peer_idx);  // else no verb has seen it
  store_relaxed(&peers_.entries[peer_idx].is_given_up, 0u);  // relaxed: nobody asks for it before the state says so
  set_state(peer_idx, PeerState::kUnused);
  link = {};
  add_seq_cst(&epoch_, 1u);  // SYNC: link-added
  peers_changed();
  return true;
}

void Membership::attach(uint32_t peer_idx, std::vector<Handle> handles, const Origin& origin, bool wakes,
                        const std::string& address, Fd data) {
  require_usable();
  if (handles.size() != 3) throw Error(Failure::kSetup, "handshake: expected 3 memory objects");
  const uint64_t expected[] = {peer_rows().object_bytes, peer_meta().object_bytes, kPageBytes};
  Link& link = links_.at(peer_idx);
  if (link.is_over_network) {
    const Areas send = network_owner_->connect(peer_idx, address, std::move(data), &wakes);
    if (!wakes) exec_.look_often();
    link.exposed = transport_->expose(send);
    peers_.entries[peer_idx].view = {send.rows, send.meta, nullptr, doorbell()};
    return;
  }
  for (size_t i = 0; i < handles.size(); ++i) {
    handles[i].bytes = expected[i];                                 // never what the peer says
    const auto& transport = i == 2 ? host_transport_ : transport_;  // the wake word is the host's
    link.mappings.push_back(transport->attach(std::move(handles[i]), origin));
  }
  if (!wakes) exec_.look_often();
  peers_.entries[peer_idx].view = {link.mappings[0]->data(), link.mappings[1]->data(),
                                   reinterpret_cast<WakeWord*>(link.mappings[2]->data()), nullptr};
}

void Membership::watch(uint32_t peer_idx, int connection_fd, int pidfd, const Heartbeats& heartbeats,
                       const std::string& displaces) {
  Fd connection(connection_fd), process(pidfd);
  {
    std::lock_guard lock(mutex_);
    Link& link = links_.at(peer_idx);
    const uint32_t peer_rank = rank_of(peer_idx), joined = peers_.joined(peer_idx);
    const PeerInfo* remembered = find_remembered(peer_rank);
    bool is_old = remembered != nullptr && remembered->joined > joined;
    for (uint32_t i = 0; i < peers_.size(); ++i) {
      is_old |= rank_of(i) == peer_rank && peers_.state(i) != PeerState::kUnused && peers_.joined(i) > joined;
    }
    if (is_old) {
      throw Error(Failure::kSetup, "handshake: a newer link of " + peer_name(peer_rank) + " was made meanwhile",
                  static_cast<int>(peer_rank));
    }
    set_state(peer_idx, PeerState::kLive);
    add_seq_cst(&epoch_, 1u);  // SYNC: link-added
    // After LIVE: the watcher may report the end of the link at once.
    try {
      link.ticket = watch_peer(shared_from_this(), peer_idx, connection.release(), process.release(), heartbeats);
    } catch (...) {
      drop_locked(peer_idx, LossCause::kConnectionClosed, "");  // live and not watched, its end would never be seen
      throw;
    }
    if (is_closed()) unwatch_peer(link.ticket, /*say_goodbye=*/true);  // it joined while close() said its goodbyes
    const std::string who = "another process has joined as " + peer_name(peer_rank);
    for (uint32_t i = 0; i < peers_.size(); ++i) {
      if (i == peer_idx || rank_of(i) != peer_rank) continue;
      drop_locked(i, LossCause::kReplaced, displaces.empty() ? who : displaces);
    }
    peers_changed();
  }
  return_gone();
  exec_.wake_own();
}

void Membership::drop_peer(uint32_t peer_idx, LossCause cause, const std::string& reason) {
  require_usable();
  std::lock_guard lock(mutex_);
  drop_locked(peer_idx, cause, reason);
  peers_changed();
}

void Membership::drop(uint32_t peer_rank, const std::string& reason) {
  require_usable();
  {
    std::lock_guard lock(mutex_);
    const int32_t peer_idx = peers_.find(peer_rank);
    if (peer_idx >= 0 && peers_.is_live(static_cast<uint32_t>(peer_idx))) {
      const auto live = static_cast<uint32_t>(peer_idx);
      store_relaxed(&peers_.entries[live].is_given_up, 1u);  // relaxed: known before the state that others act by
      drop_locked(live, LossCause::kDropped, reason);
    }
  }
  recover(peer_rank);
}

void Membership::set_state(uint32_t peer_idx, PeerState state) {
  store_seq_cst(&peers_.entries[peer_idx].state, static_cast<uint32_t>(state));  // SYNC: peer-state
}

void Membership::drop_locked(uint32_t peer_idx, LossCause cause, const std::string& reason) {
  Link& link = links_.at(peer_idx);
  // A goodbye that nobody has read yet still counts: it left before it was dropped.
  const bool has_left = link.ticket != 0 && unwatch_peer(link.ticket, /*say_goodbye=*/false, reason);
  if (!peers_.is_live(peer_idx)) return;
  if (link.is_over_network) network_owner_->end_now(peer_idx);
  if (link.end_state != PeerState::kLive) return set_gone(peer_idx, link.end_state, link.cause);
  if (cause == LossCause::kDropped) link.why = "this rank dropped it" + (reason.empty() ? "" : ": " + reason);
  set_gone(peer_idx, has_left ? PeerState::kLeft : PeerState::kLost, has_left ? LossCause::kNone : cause);
}

void Membership::set_gone(uint32_t peer_idx, PeerState state, LossCause cause) {
  links_.at(peer_idx).cause = cause;
  add_relaxed(&num_gone_, 1u);
  set_state(peer_idx, state);
  exec_.wake_own();
}

void Membership::peer_gone(uint32_t peer_idx, PeerState state, LossCause cause, const std::string& reason) {
  Link& link = links_.at(peer_idx);
  if (cause == LossCause::kDropped) link.why = "it dropped this link" + (reason.empty() ? "" : ": " + reason);
  if (!link.is_over_network) return set_gone(peer_idx, state, cause);
  // What it sent before its end may still be under way: the goodbye took another one.
  link.cause = cause;
  link.end_state = state;
  network_owner_->end(peer_idx);
}

void Membership::link_ended(uint32_t peer_idx) {
  std::lock_guard lock(mutex_);
  const Link& link = links_.at(peer_idx);
  if (peers_.is_live(peer_idx)) set_gone(peer_idx, link.end_state, link.cause);
}

void Membership::link_broke(uint32_t peer_idx, const std::string& violation) {
  std::lock_guard lock(mutex_);
  if (is_closed()) return;
  if (peers_.is_live(peer_idx)) links_[peer_idx].violation = violation;
  const bool is_broken = violation.empty();
  drop_locked(peer_idx, is_broken ? LossCause::kConnectionClosed : LossCause::kProtocol,
              is_broken ? "the connection that carries rows has ended" : words_for_violator(peer_idx, violation));
  peers_changed();
}

// A peer of this process can have its index back only when nobody here has its memory any more.
void Membership::let_go_of_peers() {
  keep_verbs_out([this] {
    std::lock_guard lock(mutex_);
    for (uint32_t i = 0; i < peers_.size(); ++i) {
      if (peers_.is_live(i)) set_gone(i, PeerState::kLeft, LossCause::kNone);  // before the look at the holds
      if (!is_held(i)) links_[i].mappings.clear();
    }
  });
}

std::vector<uint32_t> Membership::give_up(uint32_t peer_rank) {
  require_usable();
  std::lock_guard lock(mutex_);
  bool is_known = find_remembered(peer_rank) != nullptr;
  std::vector<uint32_t> given_up;
  for (uint32_t i = 0; i < peers_.size(); ++i) {
    if (rank_of(i) != peer_rank || peers_.state(i) == PeerState::kUnused) continue;
    is_known = true;
    if (!is_gone(i)) continue;
    store_relaxed(&peers_.entries[i].is_given_up, 1u);  // relaxed: the state is what others act by
    given_up.push_back(i);
  }
  if (!is_known) {
    throw Error(Failure::kArgument, "peer: " + peer_name(peer_rank) + " was never linked with " + own_name());
  }
  peers_changed();
  return given_up;
}

const PeerInfo* Membership::find_remembered(uint32_t peer_rank) const {
  const PeerInfo* newest = nullptr;
  for (const PeerInfo& peer : history_) {
    if (peer.rank == peer_rank && (newest == nullptr || peer.joined > newest->joined)) newest = &peer;
  }
  return newest;
}

std::optional<PeerInfo> Membership::find_gone(uint32_t peer_rank) const {
  std::lock_guard lock(mutex_);
  const PeerInfo* peer = find_remembered(peer_rank);
  return peer == nullptr ? std::nullopt : std::optional(*peer);
}

}  // namespace m2n
