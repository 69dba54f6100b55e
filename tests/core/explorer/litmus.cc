// SPDX-License-Identifier: Apache-2.0
// The wake path on real threads: writer() and waiter() of core/wake.h, round after round, on two cores. A round is lost
// when the writer saw no waiter and the waiter saw no signal: it would sleep. Usage: litmus <rounds> <seconds>; prints
// what it counted and stops at the first lost round.
#include <pthread.h>
#include <sched.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "core/slot.h"
#include "core/wake.h"

namespace {

// One round's words, far from all others. Fresh in each round: nothing has to be reset between two threads.
struct Round {
  alignas(m2n::kLineBytes) m2n::Signal signal;
  m2n::WakeWord wake;
  alignas(m2n::kLineBytes) uint32_t is_wake_sent;
  alignas(m2n::kLineBytes) uint32_t is_signal_seen;
};
constexpr uint64_t kBatch = 512;
Round rounds[kBatch];

// Both threads begin and end a round together: each says where it is, and waits for the other.
struct alignas(m2n::kLineBytes) Place {
  uint64_t meeting;
};
Place places[2];
cpu_set_t cores;

void meet(int self, uint64_t meeting) {
  m2n::store_release(&places[self].meeting, meeting);
  for (uint64_t looks = 0; m2n::load_acquire(&places[1 - self].meeting) < meeting; ++looks) {
    if (looks > 10'000) sched_yield();  // the other has lost its core for a while
  }
}

void write_once(Round& round) {
  m2n::store_signal(&round.signal, m2n::make_signal(1, 1));
  m2n::wake_waiters(&round.wake, [&](const uint32_t*) { round.is_wake_sent = 1; });
}

// A sleeper stays registered until the writer is through.
void wait_once(Round& round, uint64_t end) {
  const auto ready = [&] { return m2n::classify(m2n::load_signal(&round.signal), 0) == m2n::Arrival::kNext; };
  const auto sleep = [end](const uint32_t*, uint32_t) { meet(1, end); };
  round.is_signal_seen = m2n::sleep_once(&round.wake, ready, sleep) ? 1 : 0;
  if (round.is_signal_seen != 0) meet(1, end);
}

void pin(int which) {
  cpu_set_t one;
  CPU_ZERO(&one);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &cores) && which-- == 0) CPU_SET(cpu, &one);
  }
  if (pthread_setaffinity_np(pthread_self(), sizeof one, &one) != 0) {
    std::puts("cannot pin a thread to a core");
    std::exit(2);
  }
}

// The meetings of round i are 2i + 1 and 2i + 2.
void run_batch(uint64_t first) {
  std::thread waiter([first] {
    pin(1);
    for (uint64_t i = 0; i < kBatch; ++i) {
      meet(1, 2 * (first + i) + 1);
      wait_once(rounds[i], 2 * (first + i) + 2);
    }
  });
  for (uint64_t i = 0; i < kBatch; ++i) {
    meet(0, 2 * (first + i) + 1);
    write_once(rounds[i]);
    meet(0, 2 * (first + i) + 2);
  }
  waiter.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const uint64_t max_rounds = std::strtoull(argv[1], nullptr, 10);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(argv[2]));
  if (sched_getaffinity(0, sizeof cores, &cores) != 0 || CPU_COUNT(&cores) < 2) {
    std::puts("NEEDS TWO CORES");
    return 0;
  }
  pin(0);
  uint64_t done = 0, lost = 0;
  while (done < max_rounds && lost == 0 && std::chrono::steady_clock::now() < end) {
    for (Round& round : rounds) round = Round{};
    run_batch(done);
    done += kBatch;
    for (const Round& round : rounds) lost += round.is_wake_sent == 0 && round.is_signal_seen == 0 ? 1 : 0;
  }
  std::printf("lost %llu of %llu rounds\n", static_cast<unsigned long long>(lost),
              static_cast<unsigned long long>(done));
  return 0;
}
