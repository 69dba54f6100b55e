// SPDX-License-Identifier: Apache-2.0
// What running verbs and the host tell each other: a kernel cannot raise, and its deadline may be another one at each
// replay of a graph.
#pragma once

#include <cstdint>

#include "core/peer.h"
#include "core/wait.h"

namespace m2n {

// Host memory that running verbs read.
struct Control {
  uint32_t abort;      // not 0: the comm is being closed, every wait ends
  int64_t timeout_ns;  // of verbs that were launched without one
};

// As a verb's timeout_ns: the comm's, as it is when the verb runs.
inline constexpr int64_t kTimeoutOfComm = -1;

M2N_HD inline int64_t read_timeout(const Control* control, int64_t timeout_ns) {
  return timeout_ns == kTimeoutOfComm ? load_relaxed(&control->timeout_ns) : timeout_ns;  // relaxed: a plain number
}

enum class Trouble : uint32_t { kNone, kTimeout, kGone, kRefused, kViolation, kWrongBatch };
enum class Verb : uint32_t { kDispatchSend, kCombineRecv };

// What went wrong with a peer, in one word of host memory per peer. The first trouble stays until the host takes it.
struct Status {
  Trouble trouble;
  Verb verb;
  uint32_t slot;
  uint32_t detail;  // kRefused: the expert that it does not host; kViolation, kWrongBatch: the value that is wrong
};

M2N_HD constexpr uint64_t pack(const Status& status) {
  return static_cast<uint64_t>(status.detail) << 32 | uint64_t{status.slot} << 16 |
         static_cast<uint64_t>(status.verb) << 8 | static_cast<uint64_t>(status.trouble);
}
M2N_HD constexpr Status unpack(uint64_t word) {
  return {static_cast<Trouble>(word & 0xFF), static_cast<Verb>(word >> 8 & 0xFF),
          static_cast<uint32_t>(word >> 16 & 0xFFFF), static_cast<uint32_t>(word >> 32)};
}

M2N_HD inline void report(uint64_t* status_word, uint64_t packed) {
  if (load_acquire(status_word) != 0) return;  // SYNC: verb-status
  store_release(status_word, packed);          // SYNC: verb-status
}
M2N_HD inline void report(uint64_t* status_word, const Status& status) { report(status_word, pack(status)); }

// What verbs have moved, in their own memory.
struct Counters {
  uint64_t messages_sent, messages_received, rows_sent, rows_received;
};

// The table of peers, in the memory of the verbs and, as the watcher writes it, in that of the host. Verbs look at
// their own, and now and then bring a state over.
struct Peers {
  PeerTable table;
  PeerTable on_host;
  int32_t* newest;  // [max_peers]: of a rank, the peer of its newest life, or -1

  // Only an end is brought over, and that is final for the link: who has read LIVE and was overtaken, by the host or
  // another verb that has seen the end, stores nothing. LIVE comes from the host alone (DeviceMemory::update_mirror),
  // before any verb knows of the peer, and the host looks again behind it.
  M2N_HD void refresh(uint32_t peer_idx) const {
    const PeerState state = on_host.state(peer_idx);
    if (!is_gone(state)) return;
    // Relaxed: whoever acts on a loss looks for the message once more.
    store_relaxed(&table.entries[peer_idx].state, static_cast<uint32_t>(state));  // SYNC: peer-mirror
  }
};

}  // namespace m2n
