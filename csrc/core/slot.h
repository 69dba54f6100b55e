// SPDX-License-Identifier: Apache-2.0
// The slot protocol: two signals that chase each other. One side sends a message into a slot, the other
// answers it; the reply is the credit for the next message. Nothing here knows what the rows mean.
#pragma once

#include <cstring>

#include "core/atomic.h"
#include "core/platform.h"

namespace m2n {

// One signal: `num_rows << 32 | seq`, alone on its line, written by the peer only and never reset.
using Signal = uint64_t;

// In a reply's num_rows: "I could not serve this message"; the header says why.
inline constexpr uint32_t kRefusedRows = 0xFFFFFFFFu;

M2N_HD constexpr Signal make_signal(uint32_t num_rows, uint32_t seq) {
  return (static_cast<Signal>(num_rows) << 32) | seq;
}
M2N_HD constexpr uint32_t signal_seq(Signal signal) { return static_cast<uint32_t>(signal); }
M2N_HD constexpr uint32_t signal_rows(Signal signal) { return static_cast<uint32_t>(signal >> 32); }

// The owner of a word may put a seq into it that its peer has not sent yet, for a stream that waits for nothing else:
// the upper 8 bits, which no number of rows reaches, then say how far that seq is ahead of the peer's.
inline constexpr uint32_t kMostAhead = 0xFE;
inline constexpr uint32_t kAheadShift = 24;  // in the rows
inline constexpr uint32_t kPlainRows = (1u << kAheadShift) - 1;

M2N_HD constexpr Signal with_ahead(Signal signal, uint32_t seq) {
  const uint32_t num_ahead = seq - signal_seq(signal);  // 1 to kMostAhead
  return make_signal(num_ahead << kAheadShift | (signal_rows(signal) & kPlainRows), seq);
}
// As the peer has written it.
M2N_HD constexpr Signal without_ahead(Signal signal) {
  const uint32_t num_ahead = signal_rows(signal) >> kAheadShift;
  if (num_ahead == 0 || num_ahead > kMostAhead) return signal;
  const uint32_t rows = signal_rows(signal) & kPlainRows;
  return make_signal(rows == kPlainRows ? kRefusedRows : rows, signal_seq(signal) - num_ahead);
}
static_assert(without_ahead(with_ahead(make_signal(kRefusedRows, 0xFFFFFFFFu), 1)) ==
              make_signal(kRefusedRows, 0xFFFFFFFFu));

enum class Arrival : uint32_t {
  kNone,       // nothing new
  kNext,       // the message with seq last + 1 is complete
  kViolation,  // a seq that the protocol does not allow
};

// A receiver accepts exactly last + 1 (mod 2^32): anything else but last is a violation.
M2N_HD constexpr Arrival classify(Signal signal, uint32_t last_seq) {
  const uint32_t seq = signal_seq(signal);
  if (seq == last_seq) return Arrival::kNone;
  return seq == last_seq + 1u ? Arrival::kNext : Arrival::kViolation;
}

// The sending side of one (link, slot): free again when the reply to its last message was consumed.
struct SendSeq {
  uint32_t sent = 0;
  uint32_t consumed = 0;
  uint32_t reply_rows = 0;  // rows that the reply to `sent` must announce

  M2N_HD bool awaits_reply() const { return sent != consumed; }
  // The reply was read, or will not come.
  M2N_HD void consume() { consumed = sent; }
};

// The answering side of one (link, slot).
struct RecvSeq {
  uint32_t accepted = 0;
  uint32_t replied = 0;
};

// Precedes the rows of a message, in the meta object beside the signal.
struct alignas(16) Header {
  uint32_t layer;
  uint32_t microbatch;
  uint32_t placement_version;  // only reported by who reads it
  uint32_t flags;
  uint32_t num_rows;  // what the signal says again: they must agree
  uint32_t detail;    // a refusal names its cause here
  uint32_t reserved[10];
};
static_assert(sizeof(Header) == 64, "the header is part of the wire format");

// In a window. On a device by pieces of 16 bytes, which memcpy cannot know to be allowed.
M2N_HD inline Header read_header(const unsigned char* at) {
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const Header*>(at);
#else
  Header header;
  std::memcpy(&header, at, sizeof header);
  return header;
#endif
}
M2N_HD inline void write_header(unsigned char* at, const Header& header) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<Header*>(at) = header;
#else
  std::memcpy(at, &header, sizeof header);
#endif
}

inline constexpr uint32_t kFlagIdleNext = 1u << 0;  // do not wait for my next message on this microbatch
inline constexpr uint32_t kFlagRetry = 1u << 1;     // this message repeats rows that a lost peer held
inline constexpr uint32_t kKnownFlags = kFlagIdleNext | kFlagRetry;

}  // namespace m2n
