// SPDX-License-Identifier: Apache-2.0
// Who uses the entry of a peer, and who gives it back, so that another peer may have it: never both.
//
//   user:     store hold ......... load state   -> if live: use what the entry has; drop the hold
//   returner: store "not live" ... load hold    -> if not held: replace what the entry has
//
// Either the user sees that the peer is gone or the returner sees the hold: that holds only when all four operations
// are in one total order, hence seq_cst on each of them, as in wake.h. For threads of the host: a load of the state on
// a device is less.
#pragma once

#include "core/atomic.h"
#include "core/peer.h"

namespace m2n {

// One word for each pair of a peer and a slot, written by its users and by nobody else, so not reset when the entry is
// given back. This form is for one user, who has the slot. False: do not use the entry, and drop the hold. An entry
// that was found earlier may belong to another peer by now: what tells whose it is, is read after this.
inline bool take_hold(uint32_t* hold, const uint32_t* state) {
  store_seq_cst(hold, 1u);                                                 // SYNC: peer-hold
  return static_cast<PeerState>(load_seq_cst(state)) == PeerState::kLive;  // SYNC: peer-state
}

// After the last use.
inline void drop_hold(uint32_t* hold) { store_release(hold, 0u); }  // SYNC: peer-hold

// A hold that several users may have at a time, each of whom looks and takes it under a lock that the returner takes
// too: the next message of a slot may be taken while who answered the last one has not let go yet.
inline void add_hold(uint32_t* hold) { add_seq_cst(hold, 1u); }                         // SYNC: peer-hold
inline void end_hold(uint32_t* hold) { add_seq_cst(hold, static_cast<uint32_t>(-1)); }  // SYNC: peer-hold

// By who gives the entry back, after it has stored or seen a state that is not live: looks at each of its holds. Later
// users see that state, or the one of the entry's next peer and all that was written before it.
inline bool is_held(const uint32_t* hold) { return load_seq_cst(hold) != 0; }  // SYNC: peer-hold

}  // namespace m2n
