// SPDX-License-Identifier: Apache-2.0
// What a network consists of: the links to its peers, over one kind of connection. Network and its proxy are the same
// for all kinds.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "transport/transport.h"

namespace m2n {

// Calls that are not explained here are those of Network and Wire. Any thread may call.
class NetworkLinks {
 public:
  virtual ~NetworkLinks() = default;
  // `rows_areas`: send areas for rows, a peer's object each, where they do not lie in memory of the host.
  // The calls are made where a signal was stored, and where somebody must come and report(); with a lock held.
  virtual void open(const Network::Peers& peers, std::shared_ptr<Window> rows_areas, std::function<void()> on_signal,
                    std::function<void()> on_report) = 0;
  virtual std::string make_door(uint32_t peer_idx, const Areas& own) = 0;
  virtual Areas connect(uint32_t peer_idx, const std::string& door, Fd data, bool* wakes) = 0;
  virtual void end(uint32_t peer_idx) = 0;
  virtual void end_now(uint32_t peer_idx) = 0;
  virtual bool release(uint32_t peer_idx) = 0;
  virtual void drain() = 0;
  virtual void close() = 0;

  virtual bool covers(const void* at) const = 0;
  virtual void send(const std::vector<Piece>& pieces, const Signal* word, Signal value, bool is_free_after) = 0;
  virtual void finish(const Signal* word) = 0;
  // Messages that are still under way from here, and read what they were put from.
  virtual uint32_t num_sending() const = 0;

  // Makes the progress of a moment, unless another thread is at it.
  virtual void look() = 0;
  // Makes all the progress there is. True: from now on event_fd() tells when there is more.
  virtual bool settle_and_arm() = 0;
  virtual int event_fd() const = 0;
  // Tells of links that have broken or ended; in how many ns to come again, -1: when told to.
  virtual int64_t report(LinkListener& listener) = 0;
};

}  // namespace m2n
