// SPDX-License-Identifier: Apache-2.0
// The watcher's loop: control connections and pidfds in one epoll set, heartbeats in between.
#include "transport/watcher.h"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>

#include "core/error.h"
#include "transport/control.h"
#include "transport/host_exec.h"
#include "transport/own_thread.h"
#include "transport/process.h"

namespace m2n {
namespace {

struct Watched {
  std::shared_ptr<PeerListener> listener;
  uint32_t peer_idx;
  int connection_fd;
  int pidfd;
  Heartbeats heartbeats;
  Control control{};
  int64_t heard_ns = 0;    // when something came last, not counting time in which this thread did not run
  int64_t send_at_ns = 0;  // the next heartbeat
  bool is_over = false;    // its connection is closed; the listener could not be told yet
  PeerState end_state = PeerState::kLive;
  LossCause cause = LossCause::kNone;
};

// What a look at a connection found.
enum class Heard : uint32_t { kOpen, kGoodbye, kDropped, kNonsense, kClosed };

// epoll carries the ticket and, in the lowest bit, which of the two descriptors became ready.
constexpr uint64_t kPidfdBit = 1;
constexpr int64_t kNsPerMs = 1'000'000;
constexpr int64_t kTellAgainNs = 10 * kNsPerMs;

// Reads what there is.
Heard listen_to(Watched& watched) {
  char bytes[1024];  // more than any message: the rest of a packet would be lost
  while (true) {
    const ssize_t num_read = recv(watched.connection_fd, bytes, sizeof bytes, MSG_DONTWAIT);
    if (num_read < 0 && errno == EINTR) continue;
    if (num_read < 0) return errno == EAGAIN ? Heard::kOpen : Heard::kClosed;
    if (num_read == 0) return Heard::kClosed;
    watched.heard_ns = now_ns();
    const Control::Said said = watched.control.take(bytes, static_cast<size_t>(num_read), watched.heard_ns);
    if (said == Control::Said::kNothingMore) continue;
    return said == Control::Said::kGoodbye   ? Heard::kGoodbye
           : said == Control::Said::kDropped ? Heard::kDropped
                                             : Heard::kNonsense;
  }
}

// False where there is no room: the peer has not read what came before, and the connection is of no use any more once a
// heartbeat went out in part.
bool send_heartbeat(Watched& watched) {
  const auto bytes = pack(watched.control.next(now_ns()));
  const ssize_t num_sent = send(watched.connection_fd, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  return num_sent <= 0 || static_cast<size_t>(num_sent) == bytes.size();
}

// A dying process closes its connection a moment before its pidfd tells; the moment buys the right cause.
bool has_died(int pidfd) {
  constexpr int kMomentMs = 20;
  pollfd poll_fd{pidfd, POLLIN, 0};
  return pidfd >= 0 && poll(&poll_fd, 1, kMomentMs) == 1;
}

class Watcher {
 public:
  Watcher() : epoll_fd_(epoll_create1(EPOLL_CLOEXEC)), wake_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (epoll_fd_.get() < 0 || wake_fd_.get() < 0 || !listen(wake_fd_.get(), EPOLLIN, kWakeKey)) {
      throw Error(Failure::kSetup, std::string("watcher: epoll_create1: ") + std::strerror(errno));
    }
    start_own_thread("m2n-watcher", [this] { run(); }).detach();
  }

  uint64_t add(Watched watched) {
    std::lock_guard lock(mutex_);
    const uint64_t ticket = next_ticket_ += 2;
    const bool is_added = listen(watched.connection_fd, EPOLLIN | EPOLLRDHUP, ticket) &&
                          (watched.pidfd < 0 || listen(watched.pidfd, EPOLLIN, ticket | kPidfdBit));
    if (!is_added) {
      const int error_number = errno;
      close_both(watched);
      throw Error(Failure::kSetup, std::string("watcher: epoll_ctl: ") + std::strerror(error_number));
    }
    watched.heard_ns = watched.send_at_ns = now_ns();
    const bool has_heartbeats = watched.heartbeats.send_every_ns != 0;
    watched_.emplace(ticket, std::move(watched));
    if (has_heartbeats) eventfd_write(wake_fd_.get(), 1);  // the thread may be sleeping for longer
    return ticket;
  }

  bool remove(uint64_t ticket, bool say_goodbye, const std::string& reason) {
    const std::string last_words = say_goodbye ? std::string(1, kGoodbye) : pack_drop(reason);
    std::lock_guard lock(mutex_);
    const auto found = watched_.find(ticket);
    if (found == watched_.end()) return false;  // the peer went first
    bool has_left = found->second.end_state == PeerState::kLeft;
    if (!found->second.is_over) {
      has_left = listen_to(found->second) == Heard::kGoodbye;
      (void)!send(found->second.connection_fd, last_words.data(), last_words.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      close_both(found->second);
    }
    watched_.erase(found);
    return has_left;
  }

  ClockOffset offset(uint64_t ticket) {
    std::lock_guard lock(mutex_);
    const auto found = watched_.find(ticket);
    return found == watched_.end() ? ClockOffset{} : found->second.control.offset();
  }

 private:
  static constexpr uint64_t kWakeKey = ~uint64_t{0};

  bool listen(int fd, uint32_t events, uint64_t key) {
    epoll_event event{};
    event.events = events;
    event.data.u64 = key;
    return epoll_ctl(epoll_fd_.get(), EPOLL_CTL_ADD, fd, &event) == 0;
  }

  // Removed by hand: a duplicate held by a forked child would keep a closed descriptor in the set.
  void close_both(const Watched& watched) {
    epoll_ctl(epoll_fd_.get(), EPOLL_CTL_DEL, watched.connection_fd, nullptr);
    shutdown(watched.connection_fd, SHUT_RDWR);
    close(watched.connection_fd);
    if (watched.pidfd >= 0) {
      epoll_ctl(epoll_fd_.get(), EPOLL_CTL_DEL, watched.pidfd, nullptr);
      close(watched.pidfd);
    }
  }

  void run() {
    int64_t sleep_ns = 0;
    while (true) {
      const int64_t wake_at_ns = now_ns() + sleep_ns;
      const auto sleep_ms = static_cast<int>(std::min<int64_t>((sleep_ns + kNsPerMs - 1) / kNsPerMs, 1 << 30));
      // All that has come is read before anybody is called silent.
      for (int timeout_ms = sleep_ns == kForever ? -1 : sleep_ms; look(timeout_ms); timeout_ms = 0) {
      }
      // This thread may have been stopped with its process: what it could not hear is no silence.
      sleep_ns = beat(std::max<int64_t>(now_ns() - wake_at_ns - kNsPerMs, 0));
    }
  }

  // True when there may be more.
  bool look(int timeout_ms) {
    epoll_event events[16];
    const int num_events = epoll_wait(epoll_fd_.get(), events, 16, timeout_ms);
    for (int i = 0; i < num_events; ++i) {
      eventfd_t count;
      if (events[i].data.u64 == kWakeKey) {
        eventfd_read(wake_fd_.get(), &count);
      } else {
        handle(events[i].data.u64);
      }
    }
    return num_events > 0;
  }

  void handle(uint64_t key) {
    // Held during the listener's call, so that remove() returns only when no call is under way.
    std::lock_guard lock(mutex_);
    const auto found = watched_.find(key & ~kPidfdBit);
    if (found == watched_.end() || found->second.is_over) return;
    // A goodbye may still lie in the connection of a process that has ended: read first, whatever woke us.
    switch (listen_to(found->second)) {
      case Heard::kOpen:
        if ((key & kPidfdBit) != 0) gone(found, PeerState::kLost, LossCause::kProcessDied);
        break;
      case Heard::kGoodbye:
        gone(found, PeerState::kLeft, LossCause::kNone);
        break;
      case Heard::kDropped:
        gone(found, PeerState::kLost, LossCause::kDropped);
        break;
      case Heard::kNonsense:
        gone(found, PeerState::kLost, LossCause::kProtocol);
        break;
      case Heard::kClosed:
        const bool is_dead = has_died(found->second.pidfd);
        gone(found, PeerState::kLost, is_dead ? LossCause::kProcessDied : LossCause::kConnectionClosed);
    }
  }

  // Heartbeats that are due, and those that have not come; until when to sleep.
  int64_t beat(int64_t missed_ns) {
    std::lock_guard lock(mutex_);
    int64_t sleep_ns = kForever;
    const int64_t now = now_ns();
    for (auto next = watched_.begin(); next != watched_.end();) {
      const auto at = next++;
      Watched& watched = at->second;
      if (watched.is_over) {
        if (!tell(at)) sleep_ns = std::min(sleep_ns, kTellAgainNs);
        continue;
      }
      if (watched.heartbeats.send_every_ns == 0) continue;
      watched.heard_ns = std::min(watched.heard_ns + missed_ns, now);
      bool is_lost = now - watched.heard_ns >= watched.heartbeats.lost_after_ns;
      if (!is_lost && (now >= watched.send_at_ns || watched.control.wants_answer())) {
        watched.control.answered();
        watched.send_at_ns = now + watched.heartbeats.send_every_ns;
        is_lost = !send_heartbeat(watched);
      }
      if (is_lost) {
        if (!gone(at, PeerState::kLost, LossCause::kSilent)) sleep_ns = std::min(sleep_ns, kTellAgainNs);
        continue;
      }
      const int64_t lost_at_ns = watched.heard_ns + watched.heartbeats.lost_after_ns;
      sleep_ns = std::min(sleep_ns, std::max<int64_t>(std::min(watched.send_at_ns, lost_at_ns) - now, 0));
    }
    return sleep_ns;
  }

  // False: the listener could not be told; beat() tries again.
  bool gone(std::unordered_map<uint64_t, Watched>::iterator at, PeerState state, LossCause cause) {
    Watched& watched = at->second;
    close_both(watched);
    watched.is_over = true;
    watched.end_state = state;
    watched.cause = cause;
    return tell(at);
  }

  bool tell(std::unordered_map<uint64_t, Watched>::iterator at) {
    const Watched& watched = at->second;
    try {
      watched.listener->peer_gone(watched.peer_idx, watched.end_state, watched.cause, watched.control.reason());
    } catch (...) {  // no memory at this moment, which must not end the process
      return false;
    }
    watched_.erase(at);
    return true;
  }

  static constexpr int64_t kForever = int64_t{1} << 62;

  Fd epoll_fd_, wake_fd_;  // closed where the rest of a watcher cannot be had
  std::mutex mutex_;
  std::unordered_map<uint64_t, Watched> watched_;
  uint64_t next_ticket_ = 0;
};

// Made at first use and never destroyed; a forked child, which has no such thread, makes its own.
Watcher& watcher() {
  static std::mutex mutex;
  static Watcher* instance = nullptr;
  static uint32_t made_at = 0;
  std::lock_guard lock(mutex);
  if (instance == nullptr || made_at != fork_count()) {
    instance = new Watcher;
    made_at = fork_count();
  }
  return *instance;
}

}  // namespace

void start_watcher() { watcher(); }

uint64_t watch_peer(std::shared_ptr<PeerListener> listener, uint32_t peer_idx, int connection_fd, int pidfd,
                    const Heartbeats& heartbeats) {
  Fd connection(connection_fd), process(pidfd);  // closed where there is no watcher
  Watcher& there = watcher();
  return there.add({std::move(listener), peer_idx, connection.release(), process.release(), heartbeats});
}

bool unwatch_peer(uint64_t ticket, bool say_goodbye, const std::string& reason) {
  return watcher().remove(ticket, say_goodbye, reason);
}

ClockOffset clock_offset(uint64_t ticket) { return watcher().offset(ticket); }

}  // namespace m2n
