// SPDX-License-Identifier: Apache-2.0
// What goes over a control connection after the handshake: heartbeats, and at its end a goodbye, or why the link is
// dropped. The connection may be a stream.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <string>

#include "transport/watcher.h"

namespace m2n {

// The first byte of a message says what it is.
inline constexpr char kGoodbye = 'G';  // and nothing else
inline constexpr char kHeartbeat = 'H';
inline constexpr char kDrop = 'D';  // 16 bits of length, and so many bytes of text: why
inline constexpr size_t kMostReasonBytes = 512;
inline constexpr size_t kDropHeadBytes = 1 + sizeof(uint16_t);

// The clocks of both ends, so that each learns where the other's stands.
struct Heartbeat {
  int64_t sent_ns;  // of the sender, now
  int64_t echo_ns;  // the last sent_ns that the sender got; 0: none yet
  int64_t held_ns;  // for how long it has had that one
};
inline constexpr size_t kHeartbeatBytes = 1 + sizeof(Heartbeat);

inline std::array<char, kHeartbeatBytes> pack(const Heartbeat& heartbeat) {
  std::array<char, kHeartbeatBytes> bytes{kHeartbeat};
  std::memcpy(bytes.data() + 1, &heartbeat, sizeof heartbeat);  // both ends are little-endian, as all we run on
  return bytes;
}

// What may be printed of bytes that somebody else sent: control characters, and what is no UTF-8, become '?'.
std::string printable(const char* bytes, size_t num_bytes);

// The message that a link is dropped; a reason that is too long is cut.
std::string pack_drop(const std::string& reason);

// One end of a conversation: what the other end said, and where its clock stands.
class Control {
 public:
  enum class Said : uint32_t { kNothingMore, kGoodbye, kDropped, kNonsense };

  // Takes bytes as they came, at `now_ns`.
  Said take(const char* bytes, size_t num_bytes, int64_t now_ns) {
    for (size_t i = 0; i < num_bytes; ++i) {
      if (num_held_ == 0 && bytes[i] == kGoodbye) return Said::kGoodbye;
      if (num_held_ == 0 && bytes[i] != kHeartbeat && bytes[i] != kDrop) return Said::kNonsense;
      held_[num_held_++] = bytes[i];
      if (held_[0] == kDrop) {
        const Said said = hear_drop();
        if (said == Said::kNothingMore) continue;
        return said;
      }
      if (num_held_ < kHeartbeatBytes) continue;
      Heartbeat heartbeat;
      std::memcpy(&heartbeat, held_.data() + 1, sizeof heartbeat);
      num_held_ = 0;
      hear(heartbeat, now_ns);
    }
    return Said::kNothingMore;
  }

  Heartbeat next(int64_t now_ns) const {
    return {now_ns, last_sent_ns_, last_sent_ns_ == 0 ? 0 : now_ns - last_heard_ns_};
  }

  // Has something come that an answer at once would help? Until the first one the other end does not know our clock.
  bool wants_answer() const { return wants_answer_; }
  void answered() { wants_answer_ = false; }

  ClockOffset offset() const { return offset_; }
  // Where it said kDropped: why.
  std::string reason() const {
    return is_dropped_ ? printable(held_.data() + kDropHeadBytes, num_held_ - kDropHeadBytes) : "";
  }

 private:
  // A clock drifts by some us a second: what was seen so many heartbeats ago gives way to something slower.
  static constexpr int kFresh = 16;

  // After each byte of it.
  Said hear_drop() {
    if (num_held_ < kDropHeadBytes) return Said::kNothingMore;
    uint16_t length;
    std::memcpy(&length, held_.data() + 1, sizeof length);
    if (length > kMostReasonBytes) return Said::kNonsense;
    if (num_held_ < kDropHeadBytes + length) return Said::kNothingMore;
    is_dropped_ = true;  // its text stays where it is: nothing comes behind it
    return Said::kDropped;
  }

  void hear(const Heartbeat& heartbeat, int64_t now_ns) {
    last_sent_ns_ = heartbeat.sent_ns;
    last_heard_ns_ = now_ns;
    wants_answer_ = heartbeat.echo_ns == 0;
    // In the arithmetic of unsigned numbers: the peer may say anything.
    const auto round_trip_ns =
        static_cast<int64_t>(static_cast<uint64_t>(now_ns) - static_cast<uint64_t>(heartbeat.echo_ns) -
                             static_cast<uint64_t>(heartbeat.held_ns));
    if (heartbeat.echo_ns == 0 || round_trip_ns <= 0) return;
    if (offset_.round_trip_ns != 0 && round_trip_ns > offset_.round_trip_ns && ++age_ < kFresh) return;
    age_ = 0;
    offset_.round_trip_ns = round_trip_ns;
    offset_.ahead_ns = static_cast<int64_t>(static_cast<uint64_t>(heartbeat.sent_ns) +
                                            static_cast<uint64_t>(round_trip_ns / 2) - static_cast<uint64_t>(now_ns));
  }

  std::array<char, kDropHeadBytes + kMostReasonBytes> held_{};  // a message of which not all has come
  size_t num_held_ = 0;
  int64_t last_sent_ns_ = 0, last_heard_ns_ = 0;
  ClockOffset offset_;
  int age_ = 0;
  bool wants_answer_ = false;
  bool is_dropped_ = false;
};

}  // namespace m2n
