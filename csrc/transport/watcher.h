// SPDX-License-Identifier: Apache-2.0
// One thread per process that notices when a peer leaves or dies. It never holds Python's lock.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/peer.h"

namespace m2n {

// Told once, from the watcher's thread. A call that throws (memory) is made again a little later.
class PeerListener {
 public:
  virtual ~PeerListener() = default;
  // `reason`: kDropped: what the peer said; printable, it may be empty.
  virtual void peer_gone(uint32_t peer_idx, PeerState state, LossCause cause, const std::string& reason) = 0;
};

// How a process that cannot be watched by the system says that it is alive. 0: it need not.
struct Heartbeats {
  int64_t send_every_ns = 0;
  int64_t lost_after_ns = 0;  // of silence
};

// Where a peer's clock (CLOCK_MONOTONIC) stands, by the heartbeat that was fastest lately.
struct ClockOffset {
  int64_t ahead_ns = 0;       // of ours
  int64_t round_trip_ns = 0;  // it is known to half of this; 0: not at all
};

// Makes the thread, unless this process has it. Throws Error(kSetup).
void start_watcher();

// Watches a control connection and, where the peer is another process of this host, its pidfd (-1: none).
// Takes both descriptors. Returns a ticket for the calls below.
uint64_t watch_peer(std::shared_ptr<PeerListener> listener, uint32_t peer_idx, int connection_fd, int pidfd,
                    const Heartbeats& heartbeats);

// Stops watching, says goodbye, or that the link is dropped and why, and closes the connection. No call to the listener
// comes after it returns.
// True when the peer's own goodbye was waiting to be read.
bool unwatch_peer(uint64_t ticket, bool say_goodbye, const std::string& reason = "");

// Of a peer that is no longer watched: not known.
ClockOffset clock_offset(uint64_t ticket);

}  // namespace m2n
