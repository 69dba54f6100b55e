// SPDX-License-Identifier: Apache-2.0
// The identity of this process.
#include "transport/process.h"

#include <pthread.h>
#include <sys/random.h>

#include <atomic>

namespace m2n {
namespace {

std::atomic<uint32_t> g_fork_count{0};
std::atomic<uint64_t> g_process_nonce{0};

}  // namespace

uint32_t fork_count() {
  [[maybe_unused]] static const int registered = pthread_atfork(nullptr, nullptr, [] {
    g_fork_count.fetch_add(1, std::memory_order_relaxed);
    g_process_nonce.store(0, std::memory_order_relaxed);
  });
  return g_fork_count.load(std::memory_order_relaxed);
}

uint64_t process_nonce() {
  (void)fork_count();  // from now on a fork makes it anew
  uint64_t nonce = g_process_nonce.load(std::memory_order_relaxed);
  while (nonce == 0) {
    uint64_t fresh = 0;
    if (getrandom(&fresh, sizeof fresh, 0) != sizeof fresh) continue;
    // Relaxed: the number itself is all that is shared. A race between two first callers has one winner.
    if (g_process_nonce.compare_exchange_strong(nonce, fresh, std::memory_order_relaxed)) nonce = fresh;
  }
  return nonce;
}

}  // namespace m2n
