// SPDX-License-Identifier: Apache-2.0
// The proxy's loop, and how waiting threads sleep on the network's events.
#include "transport/network/proxy.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/atomic.h"
#include "core/error.h"
#include "transport/host_exec.h"

namespace m2n {
namespace {

constexpr int64_t kRestNs = 1'000'000;  // after a wait has ended, the next may begin soon

Fd make_event() {
  Fd fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (fd.get() < 0) throw Error(Failure::kSetup, std::string("network: eventfd: ") + std::strerror(errno));
  return fd;
}
void ring(const Fd& event) {
  const uint64_t one = 1;
  (void)!write(event.get(), &one, sizeof one);
}
// Until one of both is readable, a signal's handler has run, or the time is over; below 0: it never is. True: readable.
bool wait_for(int first_fd, int second_fd, int64_t most_ns) {
  pollfd fds[] = {{first_fd, POLLIN, 0}, {second_fd, POLLIN, 0}};
  const timespec most{most_ns / 1'000'000'000, most_ns % 1'000'000'000};
  return ppoll(fds, 2, most_ns < 0 ? nullptr : &most, nullptr) > 0;
}
void reset(const Fd& event) {
  uint64_t count;
  (void)!read(event.get(), &count, sizeof count);
}

}  // namespace

NetworkProxy::NetworkProxy(NetworkLinks& links)
    : links_(links), kick_fd_(make_event()), interrupt_fd_(make_event()), ended_fd_(make_event()) {}

void NetworkProxy::run(LinkListener& listener) {
  uint32_t seen_entries = 0;
  while (load_seq_cst(&is_stopped_) == 0) {  // SYNC: network-stopped
    const int64_t report_ns = links_.report(listener);
    const bool is_urgent = load_seq_cst(&is_urgent_) != 0;    // SYNC: network-urgent
    const uint32_t entries = load_seq_cst(&num_entries_);     // SYNC: network-drivers
    const bool is_driven = load_seq_cst(&num_drivers_) != 0;  // SYNC: network-drivers
    if (is_driven || (entries != seen_entries && !is_urgent)) {
      // Somebody makes progress, or has a moment ago. Where one wait goes on and on, nothing but its end matters.
      rest(is_driven && entries == seen_entries, report_ns);
      seen_entries = entries;
      continue;
    }
    store_seq_cst(&is_urgent_, 0u);  // SYNC: network-urgent
    if (links_.settle_and_arm()) wait_for(links_.event_fd(), kick_fd_.get(), report_ns);
    reset(kick_fd_);
  }
  ring(ended_fd_);
}

void NetworkProxy::rest(bool is_idle, int64_t most_ns) {
  if (!is_idle) {
    most_ns = kRestNs;
  } else {
    store_seq_cst(&rests_long_, 1u);  // SYNC: network-rest
  }
  // Where the last wait has just ended, a long rest would have no end.
  if (!is_idle || load_seq_cst(&num_drivers_) != 0) wait_for(kick_fd_.get(), -1, most_ns);  // SYNC: network-drivers
  reset(kick_fd_);
  store_seq_cst(&rests_long_, 0u);  // SYNC: network-rest
}

void NetworkProxy::stop() {
  store_seq_cst(&is_stopped_, 1u);  // SYNC: network-stopped
  kick(false);
  while (!wait_for(ended_fd_.get(), -1, -1)) {
  }
}

void NetworkProxy::kick(bool urgent) {
  if (urgent) store_seq_cst(&is_urgent_, 1u);  // SYNC: network-urgent
  ring(kick_fd_);
}

void NetworkProxy::sent() {
  if (links_.num_sending() != 0 && load_seq_cst(&num_drivers_) == 0) kick(true);  // SYNC: network-drivers
}

void NetworkProxy::enter() {
  add_seq_cst(&num_drivers_, 1u);  // SYNC: network-drivers
  add_seq_cst(&num_entries_, 1u);  // SYNC: network-drivers
}

void NetworkProxy::leave(WakeWord* own_wake, Network* network) {
  if (add_seq_cst(&num_drivers_, static_cast<uint32_t>(-1)) != 1) {  // SYNC: network-drivers
    wake_sleepers(own_wake, network);  // one of those who wait may have to sleep here in this thread's place
  } else if (links_.num_sending() != 0) {
    kick(true);
  } else if (load_seq_cst(&rests_long_) != 0) {  // SYNC: network-rest
    kick(false);
  }
}

bool NetworkProxy::sleep(const uint32_t* events, uint32_t seen, int64_t most_ns) {
  if (!replace_seq_cst(&is_sleeper_, 0u, 1u)) return false;  // SYNC: network-sleeper
  // A wake before this thread could be interrupted has changed the word: wake_sleepers().
  if (load_seq_cst(events) == seen && links_.settle_and_arm()) {  // SYNC: wake-event
    wait_for(links_.event_fd(), interrupt_fd_.get(), most_ns);
  }
  reset(interrupt_fd_);
  store_seq_cst(&is_sleeper_, 0u);  // SYNC: network-sleeper
  return true;
}

void NetworkProxy::interrupt() {
  if (load_seq_cst(&is_sleeper_) != 0) ring(interrupt_fd_);  // SYNC: network-sleeper
}

}  // namespace m2n
