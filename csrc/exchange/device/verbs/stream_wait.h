// SPDX-License-Identifier: Apache-2.0
// What a stream that waits for signals by itself, the verb behind it, and the host tell each other.
#pragma once

#include <cstdint>

#include "core/arrive.h"
#include "core/atomic.h"
#include "core/platform.h"

namespace m2n {

// Of one slot, in memory of the host. Tickets count waits of the stream, rounds the exchanges of the slot.
struct alignas(kLineBytes) WaitWords {
  uint32_t begun;   // the ticket that the stream has come to, by the stream
  uint32_t passed;  // and the last one that is behind it, likewise
  uint32_t ended;   // the last ticket whose time was over, by the host
  uint32_t rounds;  // by the verbs: how many of the slot's they have been through
};

// What the verb behind a stream's wait carries. Without words: nothing waits before it.
struct StreamWait {
  WaitWords* words = nullptr;
  uint32_t* seqs = nullptr;  // [peer], host memory: of the slot's last message from or to it, as the verbs know it
  uint32_t ticket = 0;
  uint32_t round = 0;
};

// Has the stream waited as long as the verb may?
M2N_HD inline bool is_over(const StreamWait& wait) {
  return wait.words != nullptr && load_acquire(&wait.words->ended) == wait.ticket;  // SYNC: wait-ended
}

// By all threads of a block, at the end of a round and where there are words: the count first, then seqs by tell_seq().
// Who reads a new seq so finds the new count too, and takes none for one that is still to come.
template <class Exec>
M2N_HD void tell_round(Exec& exec, const StreamWait& wait) {
  if (is_leader(exec)) store_relaxed(&wait.words->rounds, wait.round);  // SYNC: wait-round
  exec.sync();
}
M2N_HD inline void tell_seq(const StreamWait& wait, uint32_t peer_idx, uint32_t seq) {
  store_release(&wait.seqs[peer_idx], seq);  // SYNC: wait-round
}

}  // namespace m2n
