// SPDX-License-Identifier: Apache-2.0
// What a network consists of: the links to its peers, over one kind of connection. Network and its proxy are the same
// for all kinds, and so is how links begin and end.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/atomic.h"
#include "transport/choice.h"
#include "transport/network/areas.h"

namespace m2n {

inline constexpr int64_t kFinishNs = 1'000'000'000;  // of finish(): then the link is broken
// After a goodbye or a death: how long the rest of what was sent may take where the connection does not end.
inline constexpr int64_t kEndingNs = 100'000'000;

// What a link is, whatever carries it.
struct NetworkLink {
  virtual ~NetworkLink() = default;
  uint32_t peer_idx = 0;
  uint64_t key = 0, peer_key = 0;  // with which messages begin: from the peer, and to it
  Areas own;
  // Its end.
  bool is_broken = false, is_told = false, is_ended = false;
  int64_t tell_ns = 0;     // when to tell that it broke
  int64_t ending_ns = -1;  // since when it ends
  std::string violation;
};

// Calls that are not explained here are those of Network and Wire. Any thread may call.
class NetworkLinks {
 public:
  // `kind`: what its errors begin with.
  explicit NetworkLinks(std::string kind) : kind_(std::move(kind)) {}
  virtual ~NetworkLinks() = default;

  // `rows_areas`: send areas for rows, a peer's object each, where they do not lie in memory of the host.
  // The calls are made where a signal was stored, and where somebody must come and report(); with a lock held.
  void open(const Network::Peers& peers, std::shared_ptr<Window> rows_areas, std::function<void()> on_signal,
            std::function<void()> on_report);
  std::string make_address(uint32_t peer_idx, const Areas& own);
  virtual Areas connect(uint32_t peer_idx, const std::string& address, Fd data, bool* wakes) = 0;
  void end(uint32_t peer_idx);
  void end_now(uint32_t peer_idx);
  bool release(uint32_t peer_idx);
  virtual void drain();
  virtual void close() = 0;

  bool covers(const void* at) const { return areas_.covers(at); }
  virtual void send(const std::vector<Piece>& pieces, const Signal* word, Signal value, bool is_free_after) = 0;
  virtual void finish(const Signal* word) = 0;
  // Messages that are still under way from here, and read what they were put from.
  uint32_t num_sending() const { return load_acquire(&num_sending_); }  // SYNC: network-sending

  // Makes the progress of a moment, unless another thread is at it.
  virtual void look() = 0;
  // Makes all the progress there is. True: from now on event_fd() tells when there is more.
  virtual bool settle_and_arm() = 0;
  virtual int event_fd() const = 0;
  // Tells of links that have broken or ended; in how many ns to come again, -1: when told to.
  int64_t report(LinkListener& listener);

 protected:
  // What a kind adds, with the lock held: a link, its address, its end, and whether nothing of an ended one is in use.
  virtual std::unique_ptr<NetworkLink> make_link() = 0;
  virtual std::string write_door_of(NetworkLink& link) = 0;
  virtual void end_link(NetworkLink& link) = 0;
  virtual bool let_go(NetworkLink& link) = 0;

  [[noreturn]] void fail(const std::string& text) const;
  void require_open() const;
  void mark_broken(NetworkLink& link, const std::string& violation);
  NetworkLink* find(uint32_t peer_idx) const { return peer_idx < links_.size() ? links_[peer_idx].get() : nullptr; }

  const std::string kind_;
  bool tells_of_ends_ = true;  // the connections of this kind do, and let go of what they still send
  std::mutex mutex_;           // of all below
  bool is_closed_ = false;
  SendAreas areas_;
  std::vector<std::unique_ptr<NetworkLink>> links_;  // by peer index
  uint32_t num_sending_ = 0;
  std::function<void()> on_signal_, on_report_;

 private:
  bool is_reporting_ = false;  // the listener is being told of links by their indices
};

// A transport over such links, with windows in this host's memory, which a GPU may use too. `make_links`: called when a
// comm needs them.
std::unique_ptr<Transport> make_network_transport(const Choice& choice,
                                                  std::function<std::unique_ptr<NetworkLinks>()> make_links);

}  // namespace m2n
