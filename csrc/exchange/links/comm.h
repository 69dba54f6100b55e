// SPDX-License-Identifier: Apache-2.0
// What a comm of either role is to its caller: its shape, what it counts, and what is said of peers that are gone.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/error.h"
#include "exchange/links/membership.h"
#include "exchange/links/stats.h"

namespace m2n {

inline constexpr int64_t kForeverNs = int64_t{1} << 62;

class Comm : public Membership {
 public:
  // A peer that lives and owes an answer for so long is dropped by the verb that waits for it. To be set before any.
  void set_give_up(int64_t give_up_ns) { give_up_ns_ = give_up_ns; }
  // Raises for the first peer that is LOST and was not given up by recover().
  virtual void check();
  virtual Stats stats() const;
  const Shape& shape() const { return shape_; }

 protected:
  Comm(Role role, const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport);

  // And usable.
  void require_microbatch(uint32_t microbatch) const;
  // Drops a peer that is alive but has owed an answer for give_up_ns_.
  void give_up_late(uint32_t peer_idx);
  // A peer that is gone, by its name and why.
  std::string words_for(const PeerInfo& peer) const;
  // `more`: what else is to be said, before the advice.
  [[noreturn]] void raise_lost(uint32_t peer_idx, const std::string& doing, const std::string& more = "",
                               Owed owed = {}) const;
  [[noreturn]] void raise_gone(const PeerInfo& peer, const std::string& doing, const std::string& more = "",
                               Owed owed = {}) const;
  [[noreturn]] void raise_violation(uint32_t peer_idx, const std::string& what);

  // What a message in a send area is, by the word that its signal has there.
  void list_pieces(const Signal* word, Signal value, std::vector<Piece>& pieces) const;

  const Shape shape_;
  CommCounters counters_;
  int64_t give_up_ns_ = kForeverNs;
};

}  // namespace m2n
