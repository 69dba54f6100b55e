// SPDX-License-Identifier: Apache-2.0
// MPI as programs use it: rows are gathered into a buffer per peer and go as one message; receives wait ahead of them.
//
// Favourable to MPI: both sides know all row counts, so no counts are exchanged, and receives are posted before the
// clock starts.
#include <mpi.h>

#include <climits>
#include <cstring>

#include "contender.h"

namespace m2n::bench {
namespace {

constexpr int kDispatchTag = 0;
constexpr int kCombineTag = 1;

int message_bytes(uint64_t bytes) {
  if (bytes > INT_MAX) throw std::runtime_error("MPI: more than 2 GB in one message");
  return static_cast<int>(bytes);
}

// A buffer of one direction: what goes to or comes from every peer, peer after peer.
struct Buffer {
  Buffer(const std::vector<uint32_t>& rows, uint64_t row_bytes) {
    uint64_t num_bytes = 0;
    for (uint32_t num_rows : rows) {
      first_byte.push_back(num_bytes);
      sizes.push_back(message_bytes(num_rows * row_bytes));
      num_bytes += num_rows * row_bytes;
    }
    bytes.resize(num_bytes + 1);  // also without rows there is an address to give
  }
  unsigned char* of(uint32_t peer) { return bytes.data() + first_byte[peer]; }

  std::vector<uint64_t> first_byte;
  std::vector<int> sizes;
  std::vector<unsigned char> bytes;
};

// Without an error handler of ours: an error inside MPI ends the process, and mpirun the others.
class Mpi final : public Contender {
 public:
  explicit Mpi(const Traffic& traffic)
      : traffic_(traffic),
        rows_(traffic.rows, traffic.row_bytes),
        replies_(traffic.reply_rows, traffic.reply_row_bytes) {
    MPI_Init(nullptr, nullptr);
    int rank = 0, num_ranks = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &num_ranks);
    if (static_cast<uint32_t>(rank) != traffic.process || static_cast<uint32_t>(num_ranks) != traffic.num_processes()) {
      MPI_Finalize();
      throw std::runtime_error("MPI: this is rank " + std::to_string(rank) + " of " + std::to_string(num_ranks) +
                               ", but process " + std::to_string(traffic.process) + " of " +
                               std::to_string(traffic.num_processes()) + "; start the run with mpirun");
    }
    make_receives();
    start_receives();
  }

  ~Mpi() override {
    // An exchange broke off: MPI_Finalize would wait for messages that do not come.
    if (is_exchanging_) MPI_Abort(MPI_COMM_WORLD, 1);
    for (MPI_Request& receive : receives_) {
      MPI_Cancel(&receive);
      MPI_Wait(&receive, MPI_STATUS_IGNORE);
      MPI_Request_free(&receive);
    }
    MPI_Finalize();
  }

  void dispatch_send(const unsigned char* x) override {
    is_exchanging_ = true;
    uint32_t first_row = 0;
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      gather_rows(traffic_, x, first_row, traffic_.rows[peer], rows_.of(peer), std::memcpy);
      send(rows_.of(peer), rows_.sizes[peer], peer, kDispatchTag);
      first_row += traffic_.rows[peer];
    }
  }
  void combine_recv(unsigned char*) override { wait_for_receives(); }
  const unsigned char* replies_from(uint32_t peer) override { return replies_.of(peer); }

  void dispatch_recv() override {
    is_exchanging_ = true;
    wait_for_receives();
  }
  const unsigned char* rows_from(uint32_t peer) override { return rows_.of(peer); }
  // Straight from y: the rows of one rank lie together, and y stays as it is until settle.
  void combine_send(const unsigned char* y) override {
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      send(y, replies_.sizes[peer], peer, kCombineTag);
      y += replies_.sizes[peer];
    }
  }

  void settle() override {
    MPI_Waitall(static_cast<int>(sends_.size()), sends_.data(), MPI_STATUSES_IGNORE);
    sends_.clear();
    start_receives();
    is_exchanging_ = false;
  }

 private:
  // Persistent requests: what can be prepared once is.
  void make_receives() {
    Buffer& buffer = traffic_.is_attention() ? replies_ : rows_;
    const int tag = traffic_.is_attention() ? kCombineTag : kDispatchTag;
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      if (buffer.sizes[peer] == 0) continue;
      receives_.emplace_back();
      MPI_Recv_init(buffer.of(peer), buffer.sizes[peer], MPI_BYTE, static_cast<int>(traffic_.process_of_peer(peer)),
                    tag, MPI_COMM_WORLD, &receives_.back());
    }
  }

  // One by one: MPI_Startall refuses none.
  void start_receives() {
    for (MPI_Request& receive : receives_) MPI_Start(&receive);
  }

  void send(const unsigned char* bytes, int size, uint32_t peer, int tag) {
    if (size == 0) return;  // the peer knows
    sends_.emplace_back();
    MPI_Isend(bytes, size, MPI_BYTE, static_cast<int>(traffic_.process_of_peer(peer)), tag, MPI_COMM_WORLD,
              &sends_.back());
  }

  void wait_for_receives() { MPI_Waitall(static_cast<int>(receives_.size()), receives_.data(), MPI_STATUSES_IGNORE); }

  const Traffic& traffic_;
  Buffer rows_, replies_;
  std::vector<MPI_Request> receives_, sends_;
  bool is_exchanging_ = false;
};

}  // namespace
}  // namespace m2n::bench

extern "C" m2n::bench::Contender* make_contender(const std::string&, const m2n::bench::Traffic& traffic,
                                                 const m2n::bench::Services&) {
  return new m2n::bench::Mpi(traffic);
}
