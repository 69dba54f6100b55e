// SPDX-License-Identifier: Apache-2.0
// Who may use a peer's entry, and when its index may serve another link. One word for each (peer, slot): a hold.
//
//   a verb:       store the hold ... load the state  -> not LIVE: it drops the hold, and leaves the entry alone
//   the returner: store the state .. load the holds  -> held: the index stays as it is, and is tried again later
//
// Either the verb sees that the peer is gone, or the returner sees the hold: that needs all four in one total order,
// hence seq_cst on each.
#pragma once

#include "core/atomic.h"
#include "core/peer.h"

namespace m2n {

// False: the peer is not live. The caller then drops the hold.
M2N_HD inline bool take_hold(uint32_t* hold, const uint32_t* state) {
  store_seq_cst(hold, 1u);                                               // SYNC: peer-hold
  return static_cast<PeerState>(load_state(state)) == PeerState::kLive;  // SYNC: peer-state
}
// What was done under the hold is over for whoever sees it dropped.
M2N_HD inline void drop_hold(uint32_t* hold) { store_release(hold, 0u); }             // SYNC: peer-hold
M2N_HD inline bool is_held(const uint32_t* hold) { return load_seq_cst(hold) != 0; }  // SYNC: peer-hold

}  // namespace m2n
