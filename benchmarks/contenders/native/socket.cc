// SPDX-License-Identifier: Apache-2.0
// "socket": a bare TCP connection by loopback for each pair of ranks, and the rows alone through it, from where they
// lie in x and into a landing place of their own. Both sides know how many bytes come, and never sleep.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <climits>
#include <cstring>

#include "job.h"

namespace m2n::bench {
namespace {

[[noreturn]] void raise_socket(const char* call) {
  throw std::runtime_error(std::string("socket: ") + call + ": " + std::strerror(errno));
}

Fd make_socket() {
  Fd fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (fd.get() < 0) raise_socket("socket");
  const int yes = 1;
  setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  return fd;
}

sockaddr_in loopback(uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

class Socket final : public Contender {
 public:
  Socket(const Job& job, Board& board)
      : traffic_(job.traffic), board_(board), connections_(traffic_.num_peers()), landings_(traffic_.num_peers()) {
    const Services services = make_services(job.options, board);
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) landings_[peer].resize(bytes_from(peer));
    traffic_.is_attention() ? connect_all(services) : accept_all(services);
  }

  void dispatch_send(const unsigned char* x) override {
    uint32_t first_row = 0;
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      runs_.clear();
      gather_rows(traffic_, x, first_row, traffic_.rows[peer], nullptr,
                  [this](unsigned char*, const unsigned char* from, uint64_t num_bytes) {
                    runs_.push_back({const_cast<unsigned char*>(from), num_bytes});
                  });
      first_row += traffic_.rows[peer];
      send_runs(peer);
    }
  }
  void combine_recv(unsigned char*) override { receive_all(); }
  const unsigned char* replies_from(uint32_t peer) override { return landings_[peer].data(); }
  void dispatch_recv() override { receive_all(); }
  const unsigned char* rows_from(uint32_t peer) override { return landings_[peer].data(); }
  void combine_send(const unsigned char* y) override {
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      const uint64_t num_bytes = traffic_.reply_rows[peer] * traffic_.reply_row_bytes;
      runs_.assign(1, {const_cast<unsigned char*>(y), num_bytes});
      y += num_bytes;
      send_runs(peer);
    }
  }

 private:
  uint64_t bytes_from(uint32_t peer) const {
    return traffic_.is_attention() ? traffic_.reply_rows[peer] * traffic_.reply_row_bytes
                                   : traffic_.rows[peer] * traffic_.row_bytes;
  }

  void connect_all(const Services& services) {
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      const auto port = static_cast<uint16_t>(std::stoul(services.look_up("socket-" + std::to_string(peer))));
      connections_[peer] = make_socket();
      const sockaddr_in address = loopback(port);
      if (connect(connections_[peer].get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
        raise_socket("connect");
      }
      const uint32_t rank = traffic_.rank();
      if (::send(connections_[peer].get(), &rank, sizeof rank, 0) != sizeof rank) raise_socket("send");
    }
  }

  void accept_all(const Services& services) {
    const Fd listening = make_socket();
    sockaddr_in address = loopback(0);
    socklen_t num_bytes = sizeof address;
    auto* any = reinterpret_cast<sockaddr*>(&address);
    if (bind(listening.get(), any, num_bytes) != 0 || listen(listening.get(), SOMAXCONN) != 0) raise_socket("listen");
    if (getsockname(listening.get(), any, &num_bytes) != 0) raise_socket("getsockname");
    services.publish("socket-" + std::to_string(traffic_.rank()), std::to_string(ntohs(address.sin_port)));
    for (uint32_t i = 0; i < traffic_.num_peers(); ++i) {
      Fd connection(accept4(listening.get(), nullptr, nullptr, SOCK_CLOEXEC));
      uint32_t rank = 0;
      if (recv(connection.get(), &rank, sizeof rank, MSG_WAITALL) != sizeof rank) raise_socket("recv");
      const int yes = 1;
      setsockopt(connection.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
      connections_.at(rank) = std::move(connection);
    }
  }

  void send_runs(uint32_t peer) {
    for (size_t first = 0; first < runs_.size();) {
      msghdr message{};
      message.msg_iov = runs_.data() + first;
      message.msg_iovlen = std::min<size_t>(runs_.size() - first, IOV_MAX);
      ssize_t taken = -1;
      board_.wait([&] {
        taken = sendmsg(connections_[peer].get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        return taken >= 0 || errno != EAGAIN;
      });
      if (taken < 0) raise_socket("sendmsg");
      auto left = static_cast<size_t>(taken);
      while (first < runs_.size() && left >= runs_[first].iov_len) left -= runs_[first++].iov_len;
      if (first == runs_.size()) return;
      runs_[first].iov_base = static_cast<unsigned char*>(runs_[first].iov_base) + left;
      runs_[first].iov_len -= left;
    }
  }

  void receive_all() {
    std::vector<size_t> have(traffic_.num_peers(), 0);
    board_.wait([&] {
      bool is_all = true;
      for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
        std::vector<unsigned char>& landing = landings_[peer];
        if (have[peer] == landing.size()) continue;
        const ssize_t num_bytes =
            recv(connections_[peer].get(), landing.data() + have[peer], landing.size() - have[peer], MSG_DONTWAIT);
        if (num_bytes == 0 || (num_bytes < 0 && errno != EAGAIN)) raise_socket("recv");
        have[peer] += num_bytes > 0 ? static_cast<size_t>(num_bytes) : 0;
        is_all &= have[peer] == landing.size();
      }
      return is_all;
    });
  }

  const Traffic& traffic_;
  Board& board_;
  std::vector<Fd> connections_;
  std::vector<std::vector<unsigned char>> landings_;
  std::vector<iovec> runs_;
};

}  // namespace

std::unique_ptr<Contender> make_socket(const Job& job, Board& board) { return std::make_unique<Socket>(job, board); }

}  // namespace m2n::bench
