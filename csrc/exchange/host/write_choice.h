// SPDX-License-Identifier: Apache-2.0
// Regular or streamed stores for the rows of a message, by what each of them took lately on this link.
//
// A regular store must first take the line from whoever has it. That is quick while the line lies in a cache that both
// cores share, and slow while the receiver still holds what it read last time, or when the hypervisor has moved the two
// cores apart: 6 or 29 us for 256 KB, and 74 us where they share nothing. Streamed stores take 9 us always, but their
// receiver reads from memory. Nothing but the time tells which it is, so a few messages in a thousand are timed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "core/copy.h"
#include "transport/host_exec.h"

namespace m2n {

// M2N_STORES=regular: no streamed ones, for tools that count copies and do not see them.
inline const bool kMayStream = [] {
  const char* stores = std::getenv("M2N_STORES");
  return kHasStreams && (stores == nullptr || std::string_view(stores) != "regular");
}();

class WriteChoice {
 public:
  // put(is_streamed) sends a message with so many bytes of rows.
  template <class Put>
  void send(uint64_t num_bytes, Put&& put) {
    if (!kMayStream || num_bytes < kLeastBytes) return put(false);
    if (num_bytes >= kStreamedBytes) return put(true);
    const uint32_t turn = num_sent_++ % kTurns;
    if (turn < kWarmUp || turn >= kWarmUp + kTimed) return put(saved_ * static_cast<double>(num_bytes) > kReadNs);
    const bool is_streamed = turn % 2 == 1;
    const int64_t began_ns = now_ns();
    put(is_streamed);
    note(is_streamed, static_cast<double>(now_ns() - began_ns) / static_cast<double>(num_bytes), turn - kWarmUp);
  }

 private:
  static constexpr uint64_t kLeastBytes = 1 << 10;
  // Larger ones would leave the caches before they are read: `m2n-bench sweep` shows where the two cross.
  static constexpr uint64_t kStreamedBytes = 2 << 20;
  static constexpr uint32_t kTurns = 1024;
  static constexpr uint32_t kWarmUp = 16;  // pages are touched for the first time
  static constexpr uint32_t kTimed = 4;    // two of each, in turn: less than half a percent of all
  // What streaming costs the receiver, who reads from memory: by byte, in parts of what it takes the sender, and once.
  static constexpr double kReadShare = 0.6;
  static constexpr double kReadNs = 300;

  void note(bool is_streamed, double ns_per_byte, uint32_t turn) {
    double& least = is_streamed ? streamed_ : regular_;
    least = turn < 2 ? ns_per_byte : std::min(least, ns_per_byte);  // of two: somebody may have had the core in one
    if (turn + 1 == kTimed) saved_ = regular_ - (1 + kReadShare) * streamed_;
  }

  uint32_t num_sent_ = 0;
  double regular_ = 0, streamed_ = 0;  // ns per byte
  double saved_ = 0;                   // by streaming, likewise
};

}  // namespace m2n
