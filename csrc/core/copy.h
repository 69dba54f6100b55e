// SPDX-License-Identifier: Apache-2.0
// Large copies into a peer's memory: stores that pass the caches by, where the machine has them.
#pragma once

#include <cstdint>
#include <cstring>

namespace m2n {

// ThreadSanitizer does not see such stores, and nvcc does not know them.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) && !defined(__CUDACC__)
inline constexpr bool kHasStreams = true;

using Vector = long long __attribute__((vector_size(16)));

inline void store_streamed(unsigned char* to, const unsigned char* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
#if defined(__clang__)
  __builtin_nontemporal_store(value, reinterpret_cast<Vector*>(to));
#else
  __builtin_ia32_movntdq(reinterpret_cast<Vector*>(to), value);
#endif
}

// Ends with a drain_streams() of the caller, before it signals.
inline void copy_streamed(unsigned char* to, const unsigned char* from, uint64_t num_bytes) {
  constexpr uint64_t kLine = 64;
  const uint64_t head = (kLine - reinterpret_cast<uint64_t>(to) % kLine) % kLine;
  if (num_bytes < head + kLine) {
    std::memcpy(to, from, num_bytes);
    return;
  }
  std::memcpy(to, from, head);
  uint64_t i = head;
  for (; i + kLine <= num_bytes; i += kLine) {  // whole lines, one after another, are combined
    for (uint64_t j = i; j < i + kLine; j += sizeof(Vector)) store_streamed(to + j, from + j);
  }
  std::memcpy(to + i, from + i, num_bytes - i);
}

// Streamed stores are not ordered by a later store; this orders them.
inline void drain_streams() { __builtin_ia32_sfence(); }
#else
inline constexpr bool kHasStreams = false;
inline void copy_streamed(unsigned char* to, const unsigned char* from, uint64_t num_bytes) {
  std::memcpy(to, from, num_bytes);
}
inline void drain_streams() {}
#endif

}  // namespace m2n
