// SPDX-License-Identifier: Apache-2.0
// What a comm counts.
#pragma once

#include <cstdint>

#include "core/atomic.h"
#include "core/slot.h"

namespace m2n {

// Counters of one comm since it was made; only ever added to.
struct Stats {
  uint64_t messages_sent = 0;
  uint64_t messages_received = 0;
  uint64_t rows_sent = 0;
  uint64_t rows_received = 0;
  uint64_t bytes_sent = 0;          // rows, ids, weights and headers written into peers' windows
  uint64_t bytes_received = 0;      // likewise, that peers wrote here
  uint64_t bytes_packed = 0;        // rows copied side by side before they were sent, where the route asked for it
  uint64_t stream_waits = 0;        // by streams themselves, ahead of a verb
  uint64_t stream_waits_ended = 0;  // words of those that this host ended: a peer was late, gone or in trouble
  uint64_t wait_ns = 0;             // spent inside waits of the verbs, after some microseconds of spinning
  uint64_t signals_held = 0;        // that a relay has delivered
  uint64_t held_ns = 0;             // from when they were sent until then
};

// What those are made of, added to by several threads. Relaxed, all of it: nothing is decided by them.
class CommCounters {
 public:
  // Bytes of a row, with what goes beside it.
  CommCounters(uint64_t sent_row_bytes, uint64_t received_row_bytes)
      : sent_row_bytes_(sent_row_bytes), received_row_bytes_(received_row_bytes) {}

  uint64_t bytes_sent(uint64_t num_messages, uint64_t num_rows) const {
    return num_messages * sizeof(Header) + num_rows * sent_row_bytes_;
  }
  uint64_t bytes_received(uint64_t num_messages, uint64_t num_rows) const {
    return num_messages * sizeof(Header) + num_rows * received_row_bytes_;
  }
  void sent(uint64_t num_messages, uint64_t num_rows) {
    answered(num_messages);
    add_relaxed(&stats_.rows_sent, num_rows);
    add_relaxed(&stats_.bytes_sent, bytes_sent(num_messages, num_rows));
  }
  void received(uint64_t num_messages, uint64_t num_rows) {
    arrived(num_messages);
    taken(num_messages, num_rows);
  }
  // Messages that have come, and what was taken of them later.
  void arrived(uint64_t num_messages) { add_relaxed(&stats_.messages_received, num_messages); }
  void taken(uint64_t num_messages, uint64_t num_rows) {
    add_relaxed(&stats_.rows_received, num_rows);
    add_relaxed(&stats_.bytes_received, bytes_received(num_messages, num_rows));
  }
  // Without rows, where nobody else sees it.
  void answered(uint64_t num_messages) { add_relaxed(&stats_.messages_sent, num_messages); }
  void packed(uint64_t num_bytes) { add_relaxed(&stats_.bytes_packed, num_bytes); }

  Stats read() const {
    Stats copy;
    copy.messages_sent = load_relaxed(&stats_.messages_sent);
    copy.messages_received = load_relaxed(&stats_.messages_received);
    copy.rows_sent = load_relaxed(&stats_.rows_sent);
    copy.rows_received = load_relaxed(&stats_.rows_received);
    copy.bytes_sent = load_relaxed(&stats_.bytes_sent);
    copy.bytes_received = load_relaxed(&stats_.bytes_received);
    copy.bytes_packed = load_relaxed(&stats_.bytes_packed);
    return copy;
  }

 private:
  const uint64_t sent_row_bytes_, received_row_bytes_;
  Stats stats_;
};

}  // namespace m2n
