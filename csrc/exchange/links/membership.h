// SPDX-License-Identifier: Apache-2.0
// The links of a rank to its peers: how they are made, how they end, and what goes back for the next ones.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/peer.h"
#include "exchange/links/waiting.h"
#include "exchange/rows/layout.h"
#include "transport/watcher.h"

namespace m2n {

enum class Role { kAttention, kExpert };

// What a peer needs to write here.
struct Offer {
  uint32_t peer_idx;
  Origin origin;
  bool wakes;                   // does it wake a peer that sleeps? A device cannot
  std::vector<Handle> handles;  // rows, meta, wake; over a network nobody can attach to them
  std::string address;          // what stands for them there, else ""
  uint32_t link;                // its number among the links of these two lives, from 1
};

// What only this process needs of a peer, beside its PeerEntry.
struct Link {
  bool is_taken = false;  // else the index is free
  bool is_withdrawn = false;
  uint64_t life = 0;
  uint32_t link = 0;
  LossCause cause = LossCause::kNone;
  std::string why;  // kDropped: in words
  uint64_t ticket = 0;
  std::vector<std::shared_ptr<Mapping>> mappings;
  std::shared_ptr<void> exposed;  // its send area, to the verbs
  bool is_over_network = false;
  std::string violation;                   // of the protocol, as the network saw it
  PeerState end_state = PeerState::kLive;  // what the watcher found, until the network has ended the link
};

struct PeerInfo {
  uint32_t rank;
  uint64_t life;
  PeerState state;
  LossCause cause;
  uint32_t link = 1;    // its number among those of these two lives
  uint32_t joined = 0;  // its number among all that were made here
  // Of one that is gone.
  std::string why;        // in words
  std::string violation;  // of the protocol, as the network saw it
  bool is_given_up = false;
  bool is_returned = false;  // the index serves others by now
};

const char* describe(LossCause cause);

// What links ask of the verbs that use them.
class LinkUser {
 protected:
  ~LinkUser() = default;
  // Do this rank's verbs wake peers that sleep?
  virtual bool wakes_peers() const { return true; }
  // By which verbs send over a network that have no outgoing message.
  virtual const Doorbell* doorbell() const { return nullptr; }
  // A peer has joined, was dropped or given up; one at a time. Not called where the watcher found a loss.
  virtual void peers_changed() {}
  // Calls body() while no verb looks at peers that are gone and not held; or not at all, where now is no time for that.
  // What it locks comes before the lock of membership.
  virtual void keep_verbs_out(const std::function<void()>& body) { body(); }
  // Does a verb still use what belongs to a peer that is gone? `why_held` in words.
  virtual bool is_held(uint32_t peer_idx) = 0;
  virtual std::string why_held() const = 0;
  // The next life at this index begins with fresh numbers.
  virtual void reset_peer(uint32_t peer_idx) = 0;
};

// The seq that counts as the last one when a link is new. Not 0 only in tests, of the wrap at 2^32: both sides of a
// link need the same. Read when a comm is made; Python's lock guards it.
inline uint32_t g_first_seq = 0;

class Membership : public Waiting,
                   public PeerListener,
                   public LinkListener,
                   public LinkUser,
                   public std::enable_shared_from_this<Membership> {
 public:
  using Offer = m2n::Offer;

  ~Membership() override;
  // Handshake, in this order. A peer index serves another link once its own is gone, the caller knows it, and what the
  // peer sent is answered: then its memory goes back too.
  // `is_over_network`: the peer cannot share memory. `link`: its number among the links of these two lives; 0: the
  // next one.
  Offer offer(uint32_t peer_rank, uint64_t life, bool is_over_network = false, uint32_t link = 0);
  // `data`: the connection that carries the rows of this link, where the network takes one.
  void attach(uint32_t peer_idx, std::vector<Handle> handles, const Origin& origin, bool wakes = true,
              const std::string& address = "", Fd data = Fd());
  // The link is LIVE from here on. Takes both descriptors; pidfd -1: the peer is in this process or on no pid
  // of ours. `displaces`: what an older life of the rank is told, which ends with this.
  void watch(uint32_t peer_idx, int connection_fd, int pidfd, const Heartbeats& heartbeats = {},
             const std::string& displaces = "");
  // The handshake of a peer that was offered to has failed: its memory and its index go back.
  void withdraw(uint32_t peer_idx);
  // Gives back what links that are gone still have, where that may be.
  void return_gone();
  // Ends a link from this side: its connection is closed, and the peer learns why.
  void drop_peer(uint32_t peer_idx, LossCause cause, const std::string& reason = "");
  // Gives up a rank whether it is alive or not: where it is, its link is dropped, and it learns the `reason`. Throws
  // for a rank that was never linked.
  void drop(uint32_t peer_rank, const std::string& reason);
  // Goes on without the lives of a rank that are lost or have left. A live one is left alone: a new life may have come
  // meanwhile. Throws for a rank that was never linked.
  virtual void recover(uint32_t peer_rank);

  void peer_gone(uint32_t peer_idx, PeerState state, LossCause cause, const std::string& reason) override;
  void link_broke(uint32_t peer_idx, const std::string& violation) override;
  void link_ended(uint32_t peer_idx) override;

  // Says goodbye to every peer, once what a relay or a network still holds is delivered; waiting calls end with
  // Error(kSetup). Windows live as long as views of them.
  virtual void close();
  // Ends every wait at once, of launched verbs too, and closes.
  virtual void abort() { close(); }

  // Waits until `peer_rank` is there (LIVE); false at the deadline.
  bool wait_peer(uint32_t peer_rank, int64_t deadline_ns);
  std::vector<PeerInfo> peer_infos() const;
  // Of live peers that send heartbeats, and have answered one.
  std::vector<std::pair<uint32_t, ClockOffset>> clock_offsets() const;
  uint32_t rank() const { return rank_; }
  const Layout& layout() const { return layout_; }
  const std::shared_ptr<Window>& rows_window() const { return rows_window_; }
  const std::shared_ptr<Window>& meta_window() const { return meta_window_; }
  uint64_t window_rows() const { return rows().stride_rows * max_peers_; }

 protected:
  Membership(Role role, uint32_t rank, uint32_t max_peers, std::unique_ptr<Transport> transport, const Shape& shape);

  // For verbs, which need not look on their short path: is there something that may be given back?
  bool has_gone() const { return load_relaxed(&num_gone_) != 0; }  // relaxed: return_gone() looks again
  // Changes when a link has been made or an index returned.
  uint32_t epoch() const { return load_acquire(&epoch_); }  // SYNC: link-added

  uint32_t rank_of(uint32_t peer_idx) const { return peers_.rank(peer_idx); }
  PeerInfo info_of(uint32_t peer_idx) const;
  // The last link to a rank that has none any more.
  std::optional<PeerInfo> find_gone(uint32_t peer_rank) const;
  // LOST, not given up, and no newer life of the rank has joined: the caller must know.
  bool is_lost(uint32_t peer_idx) const;
  bool is_gone(uint32_t peer_idx) const { return m2n::is_gone(peers_.state(peer_idx)); }
  // Marks all links with a rank that have ended as known to the caller; their peer indices. Throws where there never
  // was one.
  std::vector<uint32_t> give_up(uint32_t peer_rank);
  bool is_over_network(uint32_t peer_idx) const { return links_[peer_idx].is_over_network; }
  // The peer's name in messages, as in "expert rank 3".
  std::string peer_name(uint32_t peer_rank) const;
  // What a peer is told that broke the protocol.
  std::string words_for_violator(uint32_t peer_idx, const std::string& what) const;
  HeldSignals held_signals() const { return relay_ == nullptr ? HeldSignals{} : relay_->held(); }

  const Rows& rows() const { return role_ == Role::kExpert ? layout_.dispatch_rows : layout_.combine_rows; }
  const Meta& meta() const { return role_ == Role::kExpert ? layout_.dispatch_meta : layout_.combine_meta; }
  const Rows& peer_rows() const { return role_ == Role::kExpert ? layout_.combine_rows : layout_.dispatch_rows; }
  const Meta& peer_meta() const { return role_ == Role::kExpert ? layout_.combine_meta : layout_.dispatch_meta; }
  const Signal* own_signal(uint32_t peer_idx, uint32_t slot) const {
    return reinterpret_cast<const Signal*>(meta_window_->data() + peer_idx * meta().object_bytes + meta().signal(slot));
  }

  const Role role_;
  const uint32_t rank_;
  const std::unique_ptr<Transport> transport_;
  const Layout layout_;
  const uint32_t max_peers_;
  const uint32_t first_seq_ = g_first_seq;
  const std::shared_ptr<void> words_;
  const PeerTable peers_;  // in words_; fixed size, so that waiters may read while a peer joins

 private:
  void make_network();
  uint32_t last_link_of(uint64_t life) const;
  bool is_full() const;
  uint32_t take_index(uint32_t peer_rank);
  std::string why_not_returned();
  void let_go_of_peers();
  void withdraw_locked(uint32_t peer_idx);
  bool give_back(uint32_t peer_idx);
  PeerInfo info_locked(uint32_t peer_idx) const;
  const PeerInfo* find_remembered(uint32_t peer_rank) const;
  void set_state(uint32_t peer_idx, PeerState state);
  void set_gone(uint32_t peer_idx, PeerState state, LossCause cause);
  // Has its rank an older link here, which somebody still holds? It would be the newest again, and its end a loss.
  bool has_older(uint32_t peer_idx) const;
  void drop_locked(uint32_t peer_idx, LossCause cause, const std::string& reason);
  std::vector<Handle> make_objects(uint32_t peer_idx);
  std::string make_address(uint32_t peer_idx);

  const std::shared_ptr<Window> rows_window_, meta_window_;
  std::vector<Link> links_;   // by peer index
  mutable std::mutex mutex_;  // joining, returning, dropping and closing; never taken by the watcher's call
  uint32_t num_joined_ = 0;   // links that were ever begun
  uint32_t num_gone_ = 0;     // indices whose link has ended and that were not returned
  uint32_t epoch_ = 0;
  std::deque<PeerInfo> history_;              // of links whose index was returned, the last kMostRemembered
  const std::unique_ptr<SignalRelay> relay_;  // ends before links_, into whose mappings it writes
  std::unique_ptr<Network> network_owner_;    // of network_
};

}  // namespace m2n
