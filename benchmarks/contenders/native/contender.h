// SPDX-License-Identifier: Apache-2.0
// The contract of a contender: one way to do the job that m2n does. Plug-ins (ucx.cc, mpi.cc) include this file alone
// and are compiled where their library is.
//
// The job of one exchange: every attention rank gathers rows of x by destination and moves them to the expert ranks;
// these read them and bring rows back. All processes call the same exchanges in the same order.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace m2n::bench {

// Who sends how many rows to whom, as this process sees it.
struct Traffic {
  uint32_t num_attention = 0;  // processes 0 .. M - 1
  uint32_t num_expert = 0;     // processes M .. M + N - 1
  uint32_t process = 0;        // this one
  uint64_t row_bytes = 0;
  uint64_t x_stride_bytes = 0;  // from one row of x to the next; y has none between
  uint64_t reply_row_bytes = 0;
  // Of every peer (expert ranks for an attention rank, and the reverse), by its rank.
  std::vector<uint32_t> rows;        // of the dispatch between it and this rank
  std::vector<uint32_t> reply_rows;  // of the combine
  // On attention ranks: rows of x for peer p, peer after peer.
  std::vector<int32_t> token_of_row;

  bool is_attention() const { return process < num_attention; }
  uint32_t rank() const { return is_attention() ? process : process - num_attention; }
  uint32_t num_peers() const { return is_attention() ? num_expert : num_attention; }
  uint32_t process_of_peer(uint32_t peer) const { return is_attention() ? num_attention + peer : peer; }
  uint32_t num_processes() const { return num_attention + num_expert; }
};

// What a contender may ask of the program that runs it.
struct Services {
  // While the links are made: leaves bytes under a name, and reads those of any process (waits for them).
  std::function<void(const std::string& name, const std::string& bytes)> publish;
  std::function<std::string(const std::string& name)> look_up;
  // Memory that all processes map under one name; zeroed.
  std::function<void*(const std::string& name, uint64_t bytes)> shared_memory;
  // Waits until ready() is true: spins where every process has a core of its own, else yields now and then. Throws when
  // another process has failed or nothing happens for too long.
  std::function<void(const std::function<bool()>& ready)> wait;
  bool is_oversubscribed = false;
};

class Contender {
 public:
  virtual ~Contender() = default;
  // On attention ranks. x: T rows in private memory. The rows have left, or the library keeps what it needs.
  virtual void dispatch_send(const unsigned char* x) = 0;
  // All replies are here. replies_from(p): the rows of expert rank p; nullptr: y holds their sums already.
  virtual void combine_recv(unsigned char* y) = 0;
  virtual const unsigned char* replies_from(uint32_t peer) = 0;
  // On expert ranks: the rows of all attention ranks are here, those of rank p at rows_from(p).
  virtual void dispatch_recv() = 0;
  virtual const unsigned char* rows_from(uint32_t peer) = 0;
  // y: reply rows of attention rank 0, then 1, ... in private memory.
  virtual void combine_send(const unsigned char* y) = 0;
  // False: signals alone.
  virtual bool moves_rows() const { return true; }
  // Brings what an exchange has left pending to its end. Not timed.
  virtual void settle() {}
};

// Does row `row` of what a peer gets lie right behind the one before, in x too?
inline bool is_neighbour(const Traffic& traffic, uint64_t row) {
  const int32_t* token = traffic.token_of_row.data() + row;
  return traffic.x_stride_bytes == traffic.row_bytes && token[0] == token[-1] + 1;
}

// Rows of x for one peer, packed. Neighbours in x go as one piece, as in m2n.
template <class Copy>
void gather_rows(const Traffic& traffic, const unsigned char* x, uint32_t first_row, uint32_t num_rows,
                 unsigned char* to, Copy&& copy) {
  uint32_t run = 1;
  for (uint32_t row = 0; row < num_rows; row += run) {
    const auto token = static_cast<uint64_t>(traffic.token_of_row[first_row + row]);
    for (run = 1; row + run < num_rows && is_neighbour(traffic, first_row + row + run); ++run) {
    }
    copy(to + row * traffic.row_bytes, x + token * traffic.x_stride_bytes, run * traffic.row_bytes);
  }
}

}  // namespace m2n::bench

// A plug-in defines it; `name` is the row's name, as in "ucx-tcp". Throws std::exception.
extern "C" m2n::bench::Contender* make_contender(const std::string& name, const m2n::bench::Traffic& traffic,
                                                 const m2n::bench::Services& services);
