// SPDX-License-Identifier: Apache-2.0
// How a CPU thread runs a body: one block of one thread that waits by some pauses, then by yields, then by a futex.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

#include "core/wake.h"
#include "transport/network.h"
#include "transport/relay.h"

namespace m2n {

enum class WaitResult { kReady, kTimeout };

inline int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

inline void futex_wake_all(const uint32_t* word) {
  syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

// The network of a comm, which may be made when the first peer needs one.
struct NetworkSlot {
  Network* made = nullptr;
  Network* get() const { return load_acquire(&made); }           // SYNC: network-made
  void set(Network* network) { store_release(&made, network); }  // SYNC: network-made
};

// Of one's own word: one of its sleepers may sleep in the network (nullptr: there is none).
void wake_sleepers(WakeWord* own_wake, Network* network);

// A deadline: look once and do not wait.
inline constexpr int64_t kNoWait = 0;

// Called between two sleeps of a wait, without any lock held; may throw to end the wait (an interrupt, say).
inline void (*on_sleep)() = nullptr;

class HostExec {
 public:
  explicit HostExec(WakeWord* own_wake, SignalRelay* relay = nullptr, const NetworkSlot* network = nullptr)
      : own_wake_(own_wake), relay_(relay), network_(network) {}
  // The same, for sending one message over a network.
  HostExec(const HostExec& exec, OutgoingMessage* outgoing)
      : own_wake_(exec.own_wake_),
        relay_(exec.relay_),
        network_(exec.network_),
        outgoing_(outgoing),
        is_interruptible_(exec.is_interruptible_),
        is_woken_by_all_(load_relaxed(&exec.is_woken_by_all_)),  // relaxed, both: other threads wait meanwhile
        is_shared_(load_relaxed(&exec.is_shared_)) {}

  uint32_t thread() const { return 0; }
  uint32_t num_threads() const { return 1; }
  uint32_t block() const { return 0; }
  uint32_t num_blocks() const { return 1; }
  uint32_t max_of_lanes(uint32_t value, uint32_t) const { return value; }
  void sync() {}
  int64_t now_ns() const { return m2n::now_ns(); }
  SignalRelay* relay() const { return relay_; }            // nullptr: signals are stored here and now
  OutgoingMessage* outgoing() const { return outgoing_; }  // nullptr: bytes are written into the peer's memory
  void wake(WakeWord* wake) { wake_waiters(wake, futex_wake_all); }
  void wake_own() { wake_sleepers(own_wake_, network()); }

  // Some peer wakes nobody: from now on a sleep is short.
  void look_often() { store_relaxed(&is_woken_by_all_, 0u); }

  // For a thread of the library's own, which must wait for nothing that the program's hold.
  void ignore_interrupts() { is_interruptible_ = false; }

  // Looks at ready() for a few microseconds.
  template <class Ready>
  bool spin(Ready&& ready) {
    const int num_pauses = load_relaxed(&is_shared_) != 0 ? kFewPauses : kPauses;
    for (int i = 0; i < num_pauses; ++i) {
      if (ready()) return true;
      relax();
    }
    return false;
  }

  // Looks at ready() until it is true or the deadline (CLOCK_MONOTONIC) has passed; the last look comes after
  // it. It gives the core away; spin() comes first.
  template <class Ready>
  WaitResult wait(Ready&& ready, int64_t deadline_ns) {
    const int64_t began_ns = now_ns();
    int num_given = 0;
    for (int64_t last_ns = began_ns; num_given < kGiven && last_ns - began_ns < kYieldNs;) {
      if (ready()) return WaitResult::kReady;
      if (last_ns >= deadline_ns) return WaitResult::kTimeout;
      const int64_t giving_ns = now_ns();  // a look may have taken as long as somebody else's turn
      sched_yield();
      last_ns = now_ns();
      num_given += last_ns - giving_ns > kOthersNs;
      store_relaxed(&is_shared_, uint32_t{num_given != 0});
    }
    const bool is_woken = load_relaxed(&is_woken_by_all_) != 0;
    int64_t most_ns = is_woken ? kSleepNs : kFirstSliceNs;
    while (now_ns() < deadline_ns) {
      const auto sleep = [this, deadline_ns, most_ns](const uint32_t* word, uint32_t seen) {
        const int64_t left_ns = std::clamp<int64_t>(deadline_ns - m2n::now_ns(), 0, most_ns);
        if (network() != nullptr && network()->sleep(word, seen, left_ns)) return;
        const timespec slice{left_ns / 1'000'000'000LL, left_ns % 1'000'000'000LL};
        syscall(SYS_futex, word, FUTEX_WAIT, seen, &slice, nullptr, 0);
      };
      if (sleep_once(own_wake_, ready, sleep)) return WaitResult::kReady;
      if (!is_woken) most_ns = std::min(2 * most_ns, kLongestSliceNs);
      if (is_interruptible_ && on_sleep != nullptr) on_sleep();
    }
    return ready() ? WaitResult::kReady : WaitResult::kTimeout;
  }

 private:
  // 100 pauses are about 2 us: longer than a hop between running cores, shorter than a wasted scheduler
  // slice.
  static constexpr int kPauses = 100;
  static constexpr int kFewPauses = 4;  // where the core was wanted by others lately: they may be who we wait for
  // Yields cost nobody anything while no other thread wants this core, and a sleeper takes 20 to 130 us to wake: so
  // they go on for a while. Those after which somebody else has run tell how busy the core is: after some it is better
  // to sleep.
  static constexpr int64_t kYieldNs = 4'000'000;
  static constexpr int64_t kOthersNs = 1'500;
  static constexpr int kGiven = 64;
  // Every sleep looks again after this long: a wake that was lost all the same costs time, not a hang.
  static constexpr int64_t kSleepNs = 100'000'000;
  // With a peer that wakes nobody: the first sleep of a wait, doubled from one to the next.
  static constexpr int64_t kFirstSliceNs = 50'000;
  static constexpr int64_t kLongestSliceNs = 10'000'000;

  Network* network() const { return network_ == nullptr ? nullptr : network_->get(); }

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  WakeWord* own_wake_;
  SignalRelay* relay_;
  const NetworkSlot* network_;
  OutgoingMessage* outgoing_ = nullptr;
  bool is_interruptible_ = true;
  uint32_t is_woken_by_all_ = 1;
  uint32_t is_shared_ = 0;  // did somebody else run on this core during the last wait? Any thread writes it
};

}  // namespace m2n
