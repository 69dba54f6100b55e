// SPDX-License-Identifier: Apache-2.0
// The watcher's loop: control connections and pidfds in one epoll set.
#include "transport/watcher.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>

#include "core/error.h"
#include "transport/transport.h"

namespace m2n {
namespace {

struct Watched {
  std::shared_ptr<PeerListener> listener;
  uint32_t peer_idx;
  int connection_fd;
  int pidfd;
};

// epoll carries the ticket and, in the lowest bit, which of the two descriptors became ready.
constexpr uint64_t kPidfdBit = 1;

class Watcher {
 public:
  Watcher() : epoll_fd_(epoll_create1(EPOLL_CLOEXEC)) {
    if (epoll_fd_ < 0) throw Error(Failure::kSetup, std::string("watcher: epoll_create1: ") + std::strerror(errno));
    // Signals belong to the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    std::thread([this] { run(); }).detach();
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
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
    watched_.emplace(ticket, std::move(watched));
    return ticket;
  }

  bool remove(uint64_t ticket, bool say_goodbye) {
    std::lock_guard lock(mutex_);
    const auto found = watched_.find(ticket);
    if (found == watched_.end()) return false;  // the peer went first
    char byte = 0;
    const bool has_left = recv(found->second.connection_fd, &byte, 1, MSG_DONTWAIT) == 1 && byte == kGoodbye;
    if (say_goodbye) {
      (void)!send(found->second.connection_fd, &kGoodbye, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    close_both(found->second);
    watched_.erase(found);
    return has_left;
  }

 private:
  bool listen(int fd, uint32_t events, uint64_t key) {
    epoll_event event{};
    event.events = events;
    event.data.u64 = key;
    return epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event) == 0;
  }

  // Removed by hand: a duplicate held by a forked child would keep a closed descriptor in the set.
  void close_both(const Watched& watched) {
    epoll_ctl(epoll_fd_, EPOLL_CTL_DEL, watched.connection_fd, nullptr);
    shutdown(watched.connection_fd, SHUT_RDWR);
    close(watched.connection_fd);
    if (watched.pidfd >= 0) {
      epoll_ctl(epoll_fd_, EPOLL_CTL_DEL, watched.pidfd, nullptr);
      close(watched.pidfd);
    }
  }

  void run() {
    pthread_setname_np(pthread_self(), "m2n-watcher");
    epoll_event events[16];
    while (true) {
      const int num_events = epoll_wait(epoll_fd_, events, 16, -1);
      for (int i = 0; i < num_events; ++i) handle(events[i].data.u64);
    }
  }

  void handle(uint64_t key) {
    // Held during the listener's call, so that remove() returns only when no call is under way.
    std::lock_guard lock(mutex_);
    const auto found = watched_.find(key & ~kPidfdBit);
    if (found == watched_.end()) return;
    const Watched watched = found->second;
    // A goodbye may still lie in the connection of a process that has ended: read first, whatever woke us.
    char byte = 0;
    const ssize_t num_read = recv(watched.connection_fd, &byte, 1, MSG_DONTWAIT);
    const bool is_open = num_read < 0 && (errno == EAGAIN || errno == EINTR);
    if (is_open && (key & kPidfdBit) == 0) return;
    PeerState state = PeerState::kLost;
    LossCause cause = LossCause::kProtocol;
    if (num_read == 1) {
      state = byte == kGoodbye ? PeerState::kLeft : PeerState::kLost;
      if (byte == kGoodbye) cause = LossCause::kNone;
    } else {
      cause = has_died(watched.pidfd) ? LossCause::kProcessDied : LossCause::kConnectionClosed;
    }
    close_both(watched);
    watched_.erase(found);
    watched.listener->peer_gone(watched.peer_idx, state, cause);
  }

  // A dying process closes its connection a moment before its pidfd tells; the moment buys the right cause.
  static bool has_died(int pidfd) {
    constexpr int kMomentMs = 20;
    pollfd poll_fd{pidfd, POLLIN, 0};
    return pidfd >= 0 && poll(&poll_fd, 1, kMomentMs) == 1;
  }

  int epoll_fd_;
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

uint64_t watch_peer(std::shared_ptr<PeerListener> listener, uint32_t peer_idx, int connection_fd, int pidfd) {
  return watcher().add({std::move(listener), peer_idx, connection_fd, pidfd});
}

bool unwatch_peer(uint64_t ticket, bool say_goodbye) { return watcher().remove(ticket, say_goodbye); }

}  // namespace m2n
