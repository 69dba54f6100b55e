// SPDX-License-Identifier: Apache-2.0
// The contract of a relay: signals that are stored later than they are sent, as a slow network would.
#pragma once

#include <cstdint>

#include "core/slot.h"
#include "core/wake.h"

namespace m2n {

struct HeldSignals {
  uint64_t count = 0;
  uint64_t total_ns = 0;  // from send() to the store
};

// Stores signals in the place of their sender, later and from another thread. What is still held when it ends is
// dropped.
class SignalRelay {
 public:
  virtual ~SignalRelay() = default;
  // Who sees the signal sees also what the caller wrote before.
  virtual void send(Signal* word, Signal value, WakeWord* wake) = 0;
  // Returns when everything that was sent is stored.
  virtual void drain() = 0;
  // Drops what is still held for words in this memory; none of them is stored any more when it returns.
  virtual void forget(const unsigned char* memory, uint64_t num_bytes) = 0;
  virtual HeldSignals held() const = 0;  // what was stored so far
};

}  // namespace m2n
