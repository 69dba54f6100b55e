// SPDX-License-Identifier: Apache-2.0
// Waiting inside a running verb, and what it reports: a kernel cannot raise.
#pragma once

#include <cstdint>

#include "core/peer.h"

namespace m2n {

// Host memory that running verbs read.
struct Control {
  uint32_t abort;  // not 0: the comm is being closed, every wait ends
};

enum class Trouble : uint32_t { kNone, kTimeout, kGone, kRefused, kViolation };
enum class Verb : uint32_t { kDispatchSend, kCombineRecv };

// What went wrong with a peer, in one word of host memory per peer. The first trouble stays until the host takes it.
struct Status {
  Trouble trouble;
  Verb verb;
  uint32_t slot;
  uint32_t detail;  // kRefused: the expert that it does not host; kViolation: the value that is wrong
};

M2N_HD constexpr uint64_t pack(const Status& status) {
  return static_cast<uint64_t>(status.detail) << 32 | uint64_t{status.slot} << 16 |
         static_cast<uint64_t>(status.verb) << 8 | static_cast<uint64_t>(status.trouble);
}
M2N_HD constexpr Status unpack(uint64_t word) {
  return {static_cast<Trouble>(word & 0xFF), static_cast<Verb>(word >> 8 & 0xFF),
          static_cast<uint32_t>(word >> 16 & 0xFFFF), static_cast<uint32_t>(word >> 32)};
}

M2N_HD inline void report(uint64_t* status_word, const Status& status) {
  if (load_acquire(status_word) != 0) return;  // SYNC: verb-status
  store_release(status_word, pack(status));    // SYNC: verb-status
}

// Looks at ready(is_long) until it is true, the time is over, or the comm is being closed; the last look comes after
// that. `is_long` is true now and then: look also at what is expensive to read.
template <class Exec, class Ready>
M2N_HD bool wait_for(Exec& exec, const Control* control, int64_t timeout_ns, Ready&& ready) {
  constexpr uint32_t kLong = 1024;
  if (ready(true)) return true;
  const int64_t began_ns = exec.now_ns();
  for (uint32_t i = 1;; ++i) {
    const bool is_long = i % kLong == 0;
    if (ready(is_long)) return true;
    const bool is_over = exec.now_ns() - began_ns >= timeout_ns;
    if (is_over || (is_long && load_acquire(&control->abort) != 0)) return ready(true);  // SYNC: verb-abort
    exec.pause();
  }
}

}  // namespace m2n
