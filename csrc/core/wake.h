// SPDX-License-Identifier: Apache-2.0
// Sleeping without a lost wake. A rank owns one wake word; all its peers map it.
//
//   writer: store signal ......... load waiters  -> if any: add event, wake
//   waiter: add to waiters ....... load signal   -> if none: sleep on the event count read in between
//
// The store may be that of a signal, of a peer's state, or of the comm's end: whatever wake_waiters() follows.
// Either the writer sees the waiter or the waiter sees the signal: that holds only when all four operations
// are in one total order, hence seq_cst on each of them (release/acquire loses about one wake in 50,000 on
// x86).
#pragma once

#include "core/atomic.h"
#include "core/platform.h"

namespace m2n {

struct WakeWord {
  alignas(kLineBytes) uint32_t events;
  alignas(kLineBytes) uint32_t waiters;
};
static_assert(sizeof(WakeWord) == 2 * kLineBytes, "the wake word is part of the wire format");

// Call after a store that a waiter may look for. `wake_all(const uint32_t*)` wakes all sleepers of that word.
template <class WakeAll>
M2N_HD void wake_waiters(WakeWord* wake, WakeAll&& wake_all) {
  if (load_seq_cst(&wake->waiters) == 0) return;  // SYNC: wake-register
  add_seq_cst(&wake->events, 1u);                 // SYNC: wake-event
  wake_all(&wake->events);
}

// Counted as a waiter while it lives, also when ready() throws.
struct Registration {
  WakeWord* wake;
  M2N_HD explicit Registration(WakeWord* word) : wake(word) { add_seq_cst(&wake->waiters, 1u); }  // SYNC: wake-register
  M2N_HD ~Registration() { add_seq_cst(&wake->waiters, static_cast<uint32_t>(-1)); }              // SYNC: wake-register
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;
};

// One sleep: returns ready(), looked at after registering. `sleep(const uint32_t*, seen)` returns when the
// word differs from `seen`, at a wake, or after a bounded time.
template <class Ready, class Sleep>
M2N_HD bool sleep_once(WakeWord* wake, Ready&& ready, Sleep&& sleep) {
  const Registration registration(wake);
  const uint32_t seen = load_seq_cst(&wake->events);  // SYNC: wake-event
  if (ready()) return true;                           // it loads signals seq_cst
  sleep(&wake->events, seen);
  return false;
}

}  // namespace m2n
