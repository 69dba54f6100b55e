// SPDX-License-Identifier: Apache-2.0
// Making and ending links.
#include "transport/tcp/links.h"

#include <fcntl.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/error.h"
#include "transport/host_exec.h"

namespace m2n::tcp {
namespace {

// For the peer's host to say that it has what it was sent: a socket that closes before its owner has read everything
// takes back what is still under way.
constexpr int64_t kAcknowledgedNs = 1'000'000'000;

struct LinkAddress {
  static constexpr uint64_t kMagic = 0x3170637432326D32;  // of this version and byte order
  uint64_t magic = kMagic;
  uint64_t key = 0;
};

// Does the other host have all that the socket was given?
bool is_acknowledged(int socket) {
  int num_bytes = 0;
  return ioctl(socket, SIOCOUTQ, &num_bytes) != 0 || num_bytes == 0;
}

}  // namespace

Links::Links() : NetworkLinks("tcp"), epoll_(epoll_create1(EPOLL_CLOEXEC)) {
  if (epoll_.get() < 0) fail(std::string("epoll_create1: ") + std::strerror(errno));
}

std::string Links::write_door_of(NetworkLink& link) {
  const LinkAddress address{LinkAddress::kMagic, link.key};
  return {reinterpret_cast<const char*>(&address), sizeof address};
}

Areas Links::connect(uint32_t peer_idx, const std::string& bytes, Fd data, bool* wakes) {
  LinkAddress address;
  if (bytes.size() != sizeof address) fail("the peer's address is none of this version");
  std::memcpy(&address, bytes.data(), sizeof address);
  if (address.magic != LinkAddress::kMagic)
    fail("the peer's address is none of this version, on a machine of this byte order");
  int type = 0;
  socklen_t type_bytes = sizeof type;
  if (getsockopt(data.get(), SOL_SOCKET, SO_TYPE, &type, &type_bytes) != 0 || type != SOCK_STREAM) {
    fail("this link has no connection for its rows");
  }
  const int yes = 1;
  (void)setsockopt(data.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);  // of a Unix socket there is no such thing
  (void)fcntl(data.get(), F_SETFD, FD_CLOEXEC);
  std::lock_guard lock(mutex_);
  require_open();
  Link& link = static_cast<Link&>(*links_.at(peer_idx));
  const Areas send = areas_.add(peer_idx);  // first: it may fail
  link.peer_key = address.key;
  link.socket = std::move(data);
  link.staged = std::make_unique<unsigned char[]>(kStagedBytes);
  watch_socket(link, EPOLL_CTL_ADD);
  link.is_open = true;
  open_links_.push_back(&link);
  *wakes = true;
  return send;
}

void Links::watch_socket(const Link& link, int operation) {
  epoll_event event{};
  event.events = EPOLLIN | (link.sending.empty() ? 0u : static_cast<uint32_t>(EPOLLOUT));
  event.data.u32 = link.peer_idx;
  if (epoll_ctl(epoll_.get(), operation, link.socket.get(), &event) != 0 && operation == EPOLL_CTL_ADD) {
    fail(std::string("epoll_ctl: ") + std::strerror(errno));
  }
}

void Links::stop(Link& link) {
  forget_sending(link);
  if (!std::exchange(link.is_open, false)) return;
  open_links_.erase(std::find(open_links_.begin(), open_links_.end(), &link));
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, link.socket.get(), nullptr);
  shutdown(link.socket.get(), SHUT_RDWR);  // a forked child may have a copy of the descriptor, which changes nothing
  link.socket = Fd();
  link.staged.reset();
}

void Links::lose(Link& link, const std::string& violation) {
  stop(link);
  mark_broken(link, violation);
}

void Links::end_link(NetworkLink& ending) {
  auto& link = static_cast<Link&>(ending);
  const int64_t until_ns = now_ns() + kEndingNs;  // what has arrived still counts, but a peer may send and send
  while (receive(link) && now_ns() < until_ns) {
  }
  link.is_ended = true;
  stop(link);
}

bool Links::let_go(NetworkLink& link) {
  stop(static_cast<Link&>(link));
  return true;
}

void Links::drain() {
  NetworkLinks::drain();
  const auto is_all_acknowledged = [this] {
    std::lock_guard lock(mutex_);
    return std::all_of(open_links_.begin(), open_links_.end(),
                       [](const Link* link) { return is_acknowledged(link->socket.get()); });
  };
  const int64_t until_ns = now_ns() + kAcknowledgedNs;
  while (!is_all_acknowledged() && now_ns() < until_ns) usleep(50);
}

void Links::close() {
  std::lock_guard lock(mutex_);
  if (is_closed_) return;
  is_closed_ = true;
  while (!open_links_.empty()) {
    open_links_.back()->is_ended = true;
    stop(*open_links_.back());
  }
}

}  // namespace m2n::tcp
