// SPDX-License-Identifier: Apache-2.0
// m2n itself, by the calls that its Python verbs make; "m2n-pack" with routes that pack, "m2n-tcp" and "m2n-ucx" over a
// transport of their own.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>

#include "exchange/host/expert.h"
#include "job.h"

namespace m2n::bench {
namespace {

[[noreturn]] void raise_socket(const char* call) {
  throw std::runtime_error(std::string(call) + ": " + std::strerror(errno));
}

// What an attention rank says first.
struct Hello {
  uint64_t process_nonce;
  uint32_t rank;
};

// The way to a rank over a network follows it, with one descriptor or none, of the connection that carries rows; else
// those of its memory go along.
constexpr size_t kMaxAddressBytes = 32 * 1024;

void send_offer(int connection, uint32_t rank, Comm::Offer offer, Fd data_end = Fd()) {
  alignas(cmsghdr) char control[CMSG_SPACE(3 * sizeof(int))] = {};
  Hello hello{offer.origin.process, rank};
  const bool is_over_network = !offer.address.empty();
  std::vector<int> fds;
  if (data_end.get() >= 0) fds.push_back(data_end.get());
  for (size_t i = 0; i < 3 && !is_over_network; ++i) fds.push_back(offer.handles[i].fd.get());
  iovec data[] = {{&hello, sizeof hello}, {offer.address.data(), offer.address.size()}};
  msghdr message{};
  message.msg_iov = data;
  message.msg_iovlen = 2;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
  }
  if (sendmsg(connection, &message, 0) < 0) raise_socket("sendmsg");
}

struct Received {
  std::vector<Handle> handles = std::vector<Handle>(3);
  std::string address;
  Fd data;
};

Received receive_offer(int connection, Hello* hello) {
  alignas(cmsghdr) char control[CMSG_SPACE(3 * sizeof(int))] = {};
  Received received;
  received.address.resize(kMaxAddressBytes);
  iovec data[] = {{hello, sizeof *hello}, {received.address.data(), received.address.size()}};
  msghdr message{};
  message.msg_iov = data;
  message.msg_iovlen = 2;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t num_bytes = recvmsg(connection, &message, 0);
  if (num_bytes < static_cast<ssize_t>(sizeof *hello)) raise_socket("recvmsg");
  received.address.resize(static_cast<size_t>(num_bytes) - sizeof *hello);
  const cmsghdr* header = CMSG_FIRSTHDR(&message);
  const size_t num_fds = header == nullptr ? 0 : (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
  for (size_t i = 0; i < num_fds; ++i) {
    int fd = -1;
    std::memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof fd);
    (received.address.empty() ? received.handles.at(i).fd : received.data) = Fd(fd);
  }
  return received;
}

int make_socket() {
  const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (fd < 0) raise_socket("socket");
  return fd;
}

sockaddr_un address_of(const Case& job, const std::string& contender, uint32_t expert_rank) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  // The folder's name is random: nobody else has this one.
  const std::string name = job.folder + "/" + contender + "-" + std::to_string(expert_rank);
  if (name.size() >= sizeof address.sun_path) throw std::runtime_error("too long a path: " + name);
  std::memcpy(address.sun_path, name.data(), name.size());
  return address;
}

// Both ends of a TCP connection by loopback.
std::pair<Fd, Fd> make_data_pair() {
  const Fd listening(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  Fd ours(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t num_bytes = sizeof address;
  auto* any = reinterpret_cast<sockaddr*>(&address);
  if (bind(listening.get(), any, num_bytes) != 0 || listen(listening.get(), 1) != 0) raise_socket("listen");
  if (getsockname(listening.get(), any, &num_bytes) != 0) raise_socket("getsockname");
  if (connect(ours.get(), any, num_bytes) != 0) raise_socket("connect");
  Fd theirs(accept4(listening.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (theirs.get() < 0) raise_socket("accept");
  return {std::move(ours), std::move(theirs)};
}

struct Arrived {
  int connection;
  Hello hello;
  Received offer;
};

class M2n final : public Contender {
 public:
  M2n(const Job& job, const std::string& name)
      : job_(job), traffic_(job.traffic), name_(name), peer_idx_of_rank_(traffic_.num_peers()) {
    const Case& options = job.options;
    const std::string& transport = name == "m2n-tcp"   ? kTcp
                                   : name == "m2n-ucx" ? options.ucx_transport
                                                       : options.transport;
    is_tcp_ = transport == kTcp;
    if (traffic_.is_attention()) {
      attention_ = std::make_shared<AttentionComm>(options.shape, traffic_.rank(), options.num_expert, transport);
      for (uint32_t rank = 0; rank < options.num_expert; ++rank) connect_to(rank);
      return;
    }
    const std::vector<uint32_t> experts = experts_of(options, traffic_.rank());
    expert_ = std::make_shared<ExpertComm>(options.shape, traffic_.rank(), options.num_attention, transport, experts);
    for (uint32_t rank = 0; rank < options.num_attention; ++rank) ranks_.push_back(rank);
    wanted_.attention_ranks = ranks_.data();
    wanted_.num_attention_ranks = options.num_attention;
    const Fd listener(make_socket());
    const sockaddr_un address = address_of(options, name_, traffic_.rank());
    if (bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) raise_socket("bind");
    if (listen(listener.get(), static_cast<int>(options.num_attention)) != 0) raise_socket("listen");
    std::vector<Arrived> arrived(options.num_attention);
    for (uint32_t i = 0; i < options.num_attention; ++i) {
      const int connection = accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC);
      if (connection < 0) raise_socket("accept");
      Hello hello{};
      Received offer = receive_offer(connection, &hello);
      arrived.at(hello.rank) = {connection, hello, std::move(offer)};
    }
    // In the order of their ranks, in which a batch has them then.
    for (Arrived& peer : arrived) {
      Comm::Offer offer = expert_->offer(peer.hello.rank, 1);
      const uint32_t peer_idx = offer.peer_idx;
      std::pair<Fd, Fd> data;
      if (is_tcp_) data = make_data_pair();
      peer.offer.data = std::move(data.first);
      send_offer(peer.connection, traffic_.rank(), std::move(offer), std::move(data.second));
      link(*expert_, peer_idx, peer.hello, std::move(peer.offer), peer.connection);
    }
  }

  void dispatch_send(const unsigned char* x) override {
    const DType dtype = job_.options.shape.dispatch_dtype;
    const std::shared_ptr<Route>& route = job_.routes[traffic_.rank()];
    route->set_packs(name_ == "m2n-pack");
    attention_->dispatch_send(x, traffic_.x_stride_bytes, dtype, route, 0, 0, deadline_ns_);
  }
  void combine_recv(unsigned char* y) override {
    attention_->combine_recv(y, traffic_.reply_row_bytes, 0, deadline_ns_);
  }
  const unsigned char* replies_from(uint32_t) override { return nullptr; }
  void dispatch_recv() override {
    batch_ = expert_->dispatch_recv(wanted_, deadline_ns_);
    if (batch_ == nullptr) throw std::runtime_error("m2n: nothing has arrived for too long");
  }
  const unsigned char* rows_from(uint32_t peer) override {
    const Rows& rows = expert_->layout().dispatch_rows;
    return expert_->rows_window()->data() + rows.row_in_window(peer_idx_of_rank_[peer], 0, 0) * rows.row_bytes;
  }
  void combine_send(const unsigned char* y) override {
    const Shape& shape = job_.options.shape;
    expert_->combine_send(*batch_, y, traffic_.reply_row_bytes, shape.combine_dtype,
                          /*is_reduced=*/shape.reduce_at == ReduceAt::kExpert);
    batch_.reset();
  }
  // One deadline for an exchange, as an engine has it for a step: reading the clock takes as long as a hop.
  void settle() override { deadline_ns_ = deadline(); }

 private:
  int64_t deadline() const { return now_ns() + job_.options.deadline_ns; }

  void connect_to(uint32_t expert_rank) {
    const int connection = make_socket();
    const sockaddr_un address = address_of(job_.options, name_, expert_rank);
    const int64_t until_ns = deadline();
    while (connect(connection, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
      if (now_ns() > until_ns) raise_socket("connect");
      usleep(200);  // it does not listen yet
    }
    Comm::Offer offer = attention_->offer(expert_rank, 1);
    const uint32_t peer_idx = offer.peer_idx;
    send_offer(connection, traffic_.rank(), std::move(offer));
    Hello hello{};
    Received received = receive_offer(connection, &hello);
    link(*attention_, peer_idx, hello, std::move(received), connection);
  }

  void link(Comm& comm, uint32_t peer_idx, const Hello& hello, Received offer, int connection) {
    comm.attach(peer_idx, std::move(offer.handles), {hello.process_nonce}, true, offer.address, std::move(offer.data));
    comm.watch(peer_idx, connection, -1);
    peer_idx_of_rank_.at(hello.rank) = peer_idx;
  }

  inline static const std::string kTcp = "tcp";
  const Job& job_;
  const Traffic& traffic_;
  const std::string name_;
  bool is_tcp_ = false;
  std::shared_ptr<AttentionComm> attention_;
  std::shared_ptr<ExpertComm> expert_;
  std::vector<uint32_t> peer_idx_of_rank_, ranks_;
  Wanted wanted_{};
  std::shared_ptr<Batch> batch_;
  int64_t deadline_ns_ = deadline();
};

}  // namespace

std::unique_ptr<Contender> make_m2n(const Job& job, const std::string& name) {
  return std::make_unique<M2n>(job, name);
}

}  // namespace m2n::bench
