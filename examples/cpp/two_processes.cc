// SPDX-License-Identifier: Apache-2.0
// An attention and an expert rank, a process each: they connect, and a few tokens go to their experts and back.
//
// Usage: two_processes [ROUNDS]. Prints what came back, or the error that ended a rank.
#include <m2n/exchange/host/attention.h>
#include <m2n/exchange/host/expert.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

namespace {

using namespace m2n;

constexpr uint32_t kHidden = 8, kNumExperts = 4, kTopK = 2, kNumTokens = 3;
constexpr uint64_t kRowBytes = kHidden * sizeof(float);
constexpr int32_t kIds[kNumTokens][kTopK] = {{0, 1}, {2, 0}, {3, 2}};
constexpr float kWeights[kNumTokens][kTopK] = {{0.75f, 0.25f}, {0.5f, 0.5f}, {0.25f, 0.75f}};
constexpr int kPatienceS = 5;

// Both ranks need the same one.
const Shape kShape = {kHidden, kNumExperts, kTopK, kNumTokens, /*microbatches=*/1, DType::kFloat32, DType::kFloat32};

// Every wait has a deadline, a time of CLOCK_MONOTONIC.
int64_t deadline() { return now_ns() + kPatienceS * 1'000'000'000LL; }

// What expert number `expert` does to a value.
float apply(uint32_t expert, float value) { return static_cast<float>(expert + 1) * value; }

[[noreturn]] void raise_errno(const char* call) { throw std::system_error(errno, std::generic_category(), call); }

// What the ranks tell each other. Beside it go descriptors of the three memory objects that the peer may write.
struct Hello {
  uint64_t process;
  Shape shape;
};

// Sends our offer and receives the peer's.
std::vector<Handle> exchange(int connection, const Comm::Offer& offer, Hello* peer) {
  Hello own{offer.origin.process, kShape};
  int fds[3];
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof fds)] = {};
  iovec data{&own, sizeof own};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof fds);
  for (size_t i = 0; i < 3; ++i) fds[i] = offer.handles.at(i).fd.get();
  std::memcpy(CMSG_DATA(header), fds, sizeof fds);
  if (sendmsg(connection, &message, MSG_NOSIGNAL) < 0) raise_errno("sendmsg");
  data.iov_base = peer;
  const ssize_t num_bytes = recvmsg(connection, &message, MSG_CMSG_CLOEXEC);
  if (num_bytes < 0) raise_errno("recvmsg");
  header = CMSG_FIRSTHDR(&message);
  if (num_bytes != sizeof *peer || header == nullptr || header->cmsg_len != CMSG_LEN(sizeof fds)) {
    throw std::runtime_error("the peer went away before it had connected");
  }
  std::memcpy(fds, CMSG_DATA(header), sizeof fds);
  std::vector<Handle> handles(3);
  for (size_t i = 0; i < 3; ++i) handles[i].fd = Fd(fds[i]);
  return handles;
}

// Joins a comm with rank 0 of the other side, which does the same at the other end of the connection.
void connect_to_rank_0(Comm& comm, int connection, pid_t peer_process) {
  const timeval patience{kPatienceS, 0};
  if (setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) != 0) raise_errno("setsockopt");
  const Comm::Offer offer = comm.offer(/*peer_rank=*/0, /*life=*/1);
  Hello hello{};
  std::vector<Handle> handles = exchange(connection, offer, &hello);
  if (hello.shape != kShape) throw std::runtime_error("the two ranks have different shapes");
  comm.attach(offer.peer_idx, std::move(handles), {hello.process});
  // From here on the peer's end is noticed. The pidfd tells a process that died from one that closed its connection.
  comm.watch(offer.peer_idx, connection, static_cast<int>(syscall(SYS_pidfd_open, peer_process, 0)));
}

void run_attention(int connection, pid_t expert_process, uint32_t num_rounds) {
  const auto comm = std::make_shared<AttentionComm>(kShape, /*rank=*/0, /*max_peers=*/1, "shm");
  connect_to_rank_0(*comm, connection, expert_process);
  // Where each (token, k) goes. Expert e lives on the expert ranks ranks[offsets[e] .. offsets[e + 1]): all on rank 0.
  const std::vector<int32_t> offsets = {0, 1, 2, 3, 4}, ranks = {0, 0, 0, 0};
  const auto route = std::make_shared<Route>(kShape);
  route->prepare(kNumTokens, /*num_ranks=*/1);
  route->build_from_topk(kIds[0], kWeights[0], offsets, ranks, /*own_rank=*/0);
  std::vector<float> x(kNumTokens * kHidden), y(x.size());
  for (uint32_t round = 0; round < num_rounds; ++round) {
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(round % 1000 + i);
    const auto* x_bytes = reinterpret_cast<const unsigned char*>(x.data());
    comm->dispatch_send(x_bytes, kRowBytes, DType::kFloat32, route, /*microbatch=*/0, /*layer=*/round, deadline());
    comm->combine_recv(reinterpret_cast<unsigned char*>(y.data()), kRowBytes, /*microbatch=*/0, deadline());
    for (size_t i = 0; i < y.size(); ++i) {
      const size_t token = i / kHidden;
      float expected = 0;
      for (uint32_t k = 0; k < kTopK; ++k) expected += kWeights[token][k] * apply(kIds[token][k], x[i]);
      if (y[i] != expected) throw std::runtime_error("token " + std::to_string(token) + ": not the expected sum");
    }
  }
  comm->close();
  for (uint32_t token = 0; token < kNumTokens; ++token) {
    std::printf("token %u: experts %d and %d made %g of %g\n", token, kIds[token][0], kIds[token][1],
                y[token * kHidden + 1], x[token * kHidden + 1]);
  }
}

void run_expert(int connection, pid_t attention_process, uint32_t num_rounds) {
  const std::vector<uint32_t> experts = {0, 1, 2, 3};
  const auto comm = std::make_shared<ExpertComm>(kShape, /*rank=*/0, /*max_peers=*/1, "shm", experts);
  connect_to_rank_0(*comm, connection, attention_process);
  std::vector<float> y;
  for (uint32_t round = 0; round < num_rounds; ++round) {
    const std::shared_ptr<Batch> batch = comm->dispatch_recv(Wanted{}, deadline());
    if (batch == nullptr) throw std::runtime_error("no token has come in time");
    // The rows are read where the peer wrote them. A list names those of each expert, one expert after another, and
    // results go in the same order.
    const auto* rows = reinterpret_cast<const float*>(comm->rows_window()->data());
    y.resize(size_t{batch->num_pairs()} * kHidden);
    for (uint32_t expert = 0; expert < kNumExperts; ++expert) {
      for (int32_t pair = batch->expert_offsets[expert]; pair < batch->expert_offsets[expert + 1]; ++pair) {
        const float* row = rows + size_t{kHidden} * batch->row_index_by_expert[pair];
        for (uint32_t h = 0; h < kHidden; ++h) y[size_t{kHidden} * pair + h] = apply(expert, row[h]);
      }
    }
    // Weighs and sums while it writes into the attention rank's memory.
    const auto* y_bytes = reinterpret_cast<const unsigned char*>(y.data());
    comm->combine_send(*batch, y_bytes, kRowBytes, DType::kFloat32, /*is_reduced=*/false);
  }
  comm->close();
}

// A rank that fails does not close its comm: its peer then learns that it died, not that it has left.
int run(void (*rank)(int, pid_t, uint32_t), const char* name, int connection, pid_t peer_process, uint32_t num_rounds) {
  try {
    rank(connection, peer_process, num_rounds);
    return 0;
  } catch (const std::exception& error) {  // one of m2n::Error says in kind() what it is
    std::fprintf(stderr, "%s: %s\n", name, error.what());
    return 1;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint32_t num_rounds = argc > 1 ? static_cast<uint32_t>(std::strtoul(argv[1], nullptr, 10)) : 1;
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) return std::perror("socketpair"), 1;
  const pid_t attention_process = getpid();
  const pid_t expert_process = fork();  // before any comm is made: a comm has a thread, and is its process's own
  if (expert_process < 0) return std::perror("fork"), 1;
  if (expert_process == 0) {
    close(ends[0]);
    _exit(run(run_expert, "expert rank 0", ends[1], attention_process, num_rounds));
  }
  close(ends[1]);
  std::printf("attention rank 0 is process %d, expert rank 0 is process %d\n", attention_process, expert_process);
  std::fflush(stdout);
  int status = run(run_attention, "attention rank 0", ends[0], expert_process, num_rounds);
  if (status != 0) kill(expert_process, SIGKILL);
  int expert_status = 0;
  waitpid(expert_process, &expert_status, 0);  // it has only to close its comm
  return status != 0 || expert_status != 0 ? 1 : 0;
}
