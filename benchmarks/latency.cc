// SPDX-License-Identifier: Apache-2.0
// One-way latency of a dispatch between two processes at the C++ boundary, interleaved with its limit: a plain
// memcpy of the same rows and one signal, into the same kind of memory.
//
// Prints one line of JSON. One-way: from before the send to the moment at which the other process has the rows
// (both read one CLOCK_MONOTONIC). With `reads` the receiver has also read every cache line of them.
#include <sched.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "exchange/attention.h"
#include "exchange/expert.h"

namespace {

using namespace m2n;

struct Options {
  uint32_t rows = 128;
  uint32_t row_bytes = 2048;
  uint32_t rounds = 2000;
  bool reads = false;
};

// A page that both processes map: start times, turns, and what the receiver measured.
struct Board {
  alignas(kLineBytes) int64_t sent_ns;
  alignas(kLineBytes) uint64_t turn;    // the receiver has done this many rounds
  alignas(kLineBytes) uint64_t signal;  // of the plain copy
  alignas(kLineBytes) uint64_t sum;     // keeps the reads alive
  double one_way_us[2][1 << 16];        // [0: plain copy, 1: m2n][round]
};

void pin(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core % sysconf(_SC_NPROCESSORS_ONLN), &set);
  sched_setaffinity(0, sizeof set, &set);
}

void send_handles(int connection, const Comm::Offer& offer) {
  char control[CMSG_SPACE(3 * sizeof(int))] = {};
  iovec data{const_cast<uint64_t*>(&offer.process), sizeof offer.process};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(3 * sizeof(int));
  for (size_t i = 0; i < 3; ++i) {
    const int fd = offer.handles[i].fd.get();
    std::memcpy(CMSG_DATA(header) + i * sizeof(int), &fd, sizeof fd);
  }
  if (sendmsg(connection, &message, 0) < 0) std::perror("sendmsg"), std::exit(1);
}

std::vector<Handle> receive_handles(int connection, uint64_t* process) {
  char control[CMSG_SPACE(3 * sizeof(int))] = {};
  iovec data{process, sizeof *process};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  if (recvmsg(connection, &message, 0) <= 0) std::perror("recvmsg"), std::exit(1);
  std::vector<Handle> handles(3);
  for (size_t i = 0; i < 3; ++i) {
    int fd = -1;
    std::memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)) + i * sizeof(int), sizeof fd);
    handles[i].fd = Fd(fd);
  }
  return handles;
}

void join(Comm& comm, int connection) {
  const Comm::Offer offer = comm.offer(0, 1);
  send_handles(connection, offer);
  uint64_t process = 0;
  comm.attach(offer.peer_idx, receive_handles(connection, &process), process);
  comm.watch(offer.peer_idx, connection, -1);
}

Shape make_shape(const Options& options) {
  Shape shape;
  shape.hidden = options.row_bytes / 2;
  shape.num_experts = 8;
  shape.top_k = 2;
  shape.max_tokens = options.rows;
  return shape;
}

uint64_t read_lines(const unsigned char* bytes, uint64_t num_bytes) {
  uint64_t sum = 0;
  for (uint64_t i = 0; i < num_bytes; i += 64) {
    sum += load_relaxed(reinterpret_cast<const uint64_t*>(bytes + i));  // relaxed: only to touch the line
  }
  return sum;
}

constexpr int64_t kDeadlineNs = 10'000'000'000;

void run_receiver(const Options& options, int connection, Board* board, const unsigned char* landing) {
  pin(1);
  std::vector<uint32_t> experts(8);
  std::iota(experts.begin(), experts.end(), 0);
  auto comm = std::make_shared<ExpertComm>(make_shape(options), 0, 1, "shm", experts);
  join(*comm, connection);
  const uint64_t num_bytes = uint64_t{options.rows} * options.row_bytes;
  std::vector<unsigned char> y(num_bytes);
  for (uint64_t round = 0; round < options.rounds; ++round) {
    while (load_acquire(&board->signal) != round + 1) {  // the plain copy: the limit of a wait is a spin
    }
    if (options.reads) board->sum += read_lines(landing, num_bytes);
    board->one_way_us[0][round] = static_cast<double>(now_ns() - board->sent_ns) / 1e3;
    store_release(&board->turn, 2 * round + 1);

    const auto batch = comm->dispatch_recv({}, now_ns() + kDeadlineNs);
    if (options.reads) board->sum += read_lines(comm->rows_window()->data(), num_bytes);
    board->one_way_us[1][round] = static_cast<double>(now_ns() - board->sent_ns) / 1e3;
    comm->combine_send(*batch, y.data(), options.row_bytes, DType::kBFloat16, /*is_reduced=*/true);
  }
}

void run_sender(const Options& options, int connection, Board* board, unsigned char* landing) {
  pin(0);
  const Shape shape = make_shape(options);
  auto comm = std::make_shared<AttentionComm>(shape, 0, 1, "shm");
  join(*comm, connection);
  const uint64_t num_bytes = uint64_t{options.rows} * options.row_bytes;
  std::vector<unsigned char> x(num_bytes), y(num_bytes);
  std::vector<int32_t> ids(options.rows * 2);
  for (uint32_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>((i * 3) % 8);
  const std::vector<float> weights(ids.size(), 0.5f);
  std::vector<int32_t> offsets(9), ranks(8, 0);
  std::iota(offsets.begin(), offsets.end(), 0);
  auto route = std::make_shared<Route>(shape);
  route->prepare(options.rows, 1);
  route->build_from_topk(ids.data(), weights.data(), offsets, ranks, 0);
  for (uint64_t round = 0; round < options.rounds; ++round) {
    std::memset(x.data(), static_cast<int>(round), num_bytes);  // fresh rows, as from a layer
    board->sent_ns = now_ns();
    std::memcpy(landing, x.data(), num_bytes);
    store_release(&board->signal, round + 1);
    while (load_acquire(&board->turn) != 2 * round + 1) {
    }
    std::memset(x.data(), static_cast<int>(round + 1), num_bytes);
    board->sent_ns = now_ns();
    comm->dispatch_send(x.data(), options.row_bytes, route, 0, 0, now_ns() + kDeadlineNs);
    comm->combine_recv(y.data(), options.row_bytes, 0, now_ns() + kDeadlineNs);
  }
}

double percentile(const double* values, uint32_t num_values, double share) {
  std::vector<double> sorted(values + num_values / 10, values + num_values);  // the first tenth warms up
  std::sort(sorted.begin(), sorted.end());
  return sorted[static_cast<size_t>(share * static_cast<double>(sorted.size() - 1))];
}

template <class T>
T* shared(uint64_t num_bytes) {
  void* data = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (data == MAP_FAILED) std::perror("mmap"), std::exit(1);
  return static_cast<T*>(data);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  if (argc > 1) options.rows = static_cast<uint32_t>(std::atoi(argv[1]));
  if (argc > 2) options.row_bytes = static_cast<uint32_t>(std::atoi(argv[2]));
  if (argc > 3) options.rounds = std::min(static_cast<uint32_t>(std::atoi(argv[3])), 1u << 16);
  options.reads = argc > 4 && std::string(argv[4]) == "reads";
  auto* board = shared<Board>(sizeof(Board));
  auto* landing = shared<unsigned char>(uint64_t{options.rows} * options.row_bytes);
  int connections[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, connections) != 0) std::perror("socketpair"), std::exit(1);
  const pid_t child = fork();
  if (child == 0) {
    close(connections[0]);
    run_receiver(options, connections[1], board, landing);
    _exit(0);
  }
  close(connections[1]);
  run_sender(options, connections[0], board, landing);
  int status = 0;
  waitpid(child, &status, 0);
  std::printf(
      "{\"rows\": %u, \"row_bytes\": %u, \"reads\": %s, \"memcpy_p50_us\": %.2f, \"memcpy_p99_us\": %.2f, "
      "\"m2n_p50_us\": %.2f, \"m2n_p99_us\": %.2f}\n",
      options.rows, options.row_bytes, options.reads ? "true" : "false",
      percentile(board->one_way_us[0], options.rounds, 0.5), percentile(board->one_way_us[0], options.rounds, 0.99),
      percentile(board->one_way_us[1], options.rounds, 0.5), percentile(board->one_way_us[1], options.rounds, 0.99));
  return status;
}
