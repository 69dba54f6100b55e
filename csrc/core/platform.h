// SPDX-License-Identifier: Apache-2.0
// Compiler switches and fixed limits shared by host and device code.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define M2N_HD __host__ __device__
#else
#define M2N_HD
#endif

namespace m2n {

// Two lines of 64 bytes: adjacent-line prefetchers fetch pairs, so one word per pair avoids false sharing.
inline constexpr uint64_t kLineBytes = 128;
inline constexpr uint64_t kPageBytes = 4096;
inline constexpr uint32_t kMaxPeers = 1024;
inline constexpr uint32_t kMaxSlots = 64;
// That the threads of a block share: some words for each peer that there can be, and a few more; and what a block that
// works alone counts in.
M2N_HD constexpr uint32_t shared_words(uint32_t max_peers) { return 12 * max_peers + 16; }
inline constexpr uint32_t kCountWords = 6144;

// Fetches a line that is about to be read, so that several on their way from another core overlap.
M2N_HD inline void prefetch(const void* bytes) {
#if !defined(__CUDA_ARCH__)
  __builtin_prefetch(bytes);
#endif
}

M2N_HD constexpr uint64_t round_up(uint64_t value, uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace m2n
