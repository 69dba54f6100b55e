// SPDX-License-Identifier: Apache-2.0
// One thread per process that notices when a peer leaves or dies. It never holds Python's lock.
#pragma once

#include <cstdint>
#include <memory>

#include "core/peer.h"

namespace m2n {

// After the handshake a control connection carries single bytes. Only one is known so far.
inline constexpr char kGoodbye = 'G';

// Told once, from the watcher's thread.
class PeerListener {
 public:
  virtual ~PeerListener() = default;
  virtual void peer_gone(uint32_t peer_idx, PeerState state, LossCause cause) = 0;
};

// Watches a control connection and, where the peer is another process of this host, its pidfd (-1: none).
// Takes both descriptors. Returns a ticket for unwatch().
uint64_t watch_peer(std::shared_ptr<PeerListener> listener, uint32_t peer_idx, int connection_fd, int pidfd);

// Stops watching, says goodbye if asked to, and closes the connection. No call to the listener comes after it
// returns.
// True when the peer's own goodbye was waiting to be read.
bool unwatch_peer(uint64_t ticket, bool say_goodbye);

}  // namespace m2n
