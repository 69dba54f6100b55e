// SPDX-License-Identifier: Apache-2.0
// How verbs on a device tell a thread of their own process that a message lies in a send area: a ring of entries in
// memory that both reach. Any number of threads ring; one takes, in the order of the tickets.
//
// An entry is there when it carries the lap of its ticket. Nobody waits for room: a slot of a peer has one message on
// its way, and what frees it, the peer's reply, comes after the entry was taken. So `num_rings` is at least the
// number of slots of all peers.
#pragma once

#include "core/atomic.h"
#include "core/platform.h"
#include "core/slot.h"

namespace m2n {

struct alignas(32) Ring {
  uint64_t lap;   // of the ticket, from 1; written last
  uint64_t word;  // the address of the signal in the send area: which message
  Signal value;
};

struct Doorbell {
  Ring* rings;            // zeroed; of a GPU's process: pinned
  uint64_t* next_ticket;  // in the verbs' own memory
  uint64_t num_rings;
};

// What was written before is seen by whoever takes it.
M2N_HD inline void ring_doorbell(const Doorbell& bell, const Signal* word, Signal value) {
  // SYNC: doorbell-ticket, among its own draws: of the tickets since that of an entry's last lap one was drawn after a
  // reply to a message that was taken no earlier. So this lap's stores come after that one's.
  const uint64_t ticket = add_acq_rel(bell.next_ticket, uint64_t{1});  // SYNC: doorbell-ticket
  Ring& ring = bell.rings[ticket % bell.num_rings];
  store_relaxed(&ring.word, static_cast<uint64_t>(reinterpret_cast<uintptr_t>(word)));
  store_relaxed(&ring.value, value);
  store_release(&ring.lap, ticket / bell.num_rings + 1);  // SYNC: doorbell
}

// The reader: one thread.
class DoorbellReader {
 public:
  explicit DoorbellReader(const Doorbell& bell) : rings_(bell.rings), num_rings_(bell.num_rings) {}

  M2N_HD bool is_rung() const { return load_acquire(&ring().lap) == next_ / num_rings_ + 1; }  // SYNC: doorbell
  // After is_rung().
  M2N_HD Signal take(const Signal** word) {
    *word = reinterpret_cast<const Signal*>(static_cast<uintptr_t>(load_relaxed(&ring().word)));
    const Signal value = load_relaxed(&ring().value);
    ++next_;
    return value;
  }

 private:
  M2N_HD Ring& ring() const { return rings_[next_ % num_rings_]; }

  Ring* rings_;
  uint64_t num_rings_;
  uint64_t next_ = 0;
};

}  // namespace m2n
