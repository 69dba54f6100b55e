// SPDX-License-Identifier: Apache-2.0
// Waiting inside a body: every wait ends, at its deadline or at the abort word.
#pragma once

#include <cstdint>

#include "core/peer.h"

namespace m2n {

// How many looks lie between two at what is expensive to read, and between two readings of the clock.
inline constexpr uint32_t kLooksPerLong = 1024;
inline constexpr uint32_t kLooksPerClock = 16;

// Looks at ready(is_long) until it is true, the time is over, or *abort is not 0; the last look comes after that.
// `is_long` is true now and then, and at last: look also at what is expensive to read. `timeout_ns()` is called once,
// and only where the first look fails. One thread waits; others may wait beside it for something else.
template <class Exec, class TimeoutNs, class Ready>
M2N_HD bool wait_for(Exec& exec, const uint32_t* abort, TimeoutNs&& timeout_ns, Ready&& ready) {
  if (ready(false)) return true;
  const int64_t wait_ns = timeout_ns();
  const int64_t began_ns = exec.now_ns();
  for (uint32_t i = 1;; ++i) {
    const bool is_long = i % kLooksPerLong == 0;
    if (ready(is_long)) return true;
    const bool is_over = i % kLooksPerClock == 0 && exec.now_ns() - began_ns >= wait_ns;
    if (is_over || (is_long && load_acquire(abort) != 0)) return ready(true);  // SYNC: verb-abort
    exec.pause();
  }
}

// Waits for the message after `last_seq` behind a signal of ours; kPending: it did not come in time.
template <class Exec>
M2N_HD Look wait(Exec& exec, const Signal* word, uint32_t last_seq, const uint32_t* abort, int64_t timeout_ns) {
  Look look = Look::kPending;
  const auto is_here = [&](bool) {
    look = look_for(word, last_seq, [] { return true; });
    return look != Look::kPending;
  };
  wait_for(exec, abort, [timeout_ns] { return timeout_ns; }, is_here);
  return look;
}

}  // namespace m2n
