// SPDX-License-Identifier: Apache-2.0
// Rows into a peer's memory, shared among whoever runs a verb; and the signal behind them.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/peer.h"
#include "exchange/rows/layout.h"

namespace m2n {

// How rows are dealt out to groups of lanes, over several messages.
struct PutDeal {
  Deal deal;
  bool is_short;  // little for each group: in small pieces, so that all have some
};

#if defined(__CUDA_ARCH__)
inline constexpr uint32_t kShortAhead = 2, kLongAhead = 7;

template <uint32_t kLoads, class Exec, class RowAt, class PutBeside>
__device__ void put_row_pieces(Exec& exec, Deal& deal, unsigned char* to, uint32_t num_rows, uint32_t row_bytes,
                               RowAt&& row_at, PutBeside&& put_beside) {
  const uint32_t piece_bytes = exec.num_lanes() * kLoads * sizeof(uint4);
  const uint32_t num_pieces = (row_bytes + piece_bytes - 1) / piece_bytes;
  deal(num_rows * num_pieces, [&](uint32_t i) {
    const uint32_t row = i / num_pieces;
    const uint32_t begin = (i - row * num_pieces) * piece_bytes;
    const uint32_t left = row_bytes - begin;
    put<kLoads>(exec, to + uint64_t{row} * row_bytes + begin, row_at(row) + begin,
                left < piece_bytes ? left : piece_bytes);
    if (begin == 0) put_beside(row, row + 1);
  });
}
#endif

// `num_bytes`: of all messages.
template <class Exec>
M2N_HD PutDeal deal_put(const Exec& exec, [[maybe_unused]] uint64_t num_bytes) {
#if defined(__CUDA_ARCH__)
  const uint64_t num_groups = uint64_t{exec.num_blocks()} * (exec.num_threads() / exec.num_lanes());
  return {deal_to_groups(exec), num_bytes < 2 * num_groups * exec.num_lanes() * kLongAhead * sizeof(uint4)};
#else
  return {deal_to_groups(exec), false};
#endif
}

// Rows that travel as they are, in the order row_at(i) gives. put_beside(begin, end) puts what belongs to rows beside
// them. A device deals out pieces of rows; on the host each thread takes a run of rows, and neighbours go as one piece.
template <class Exec, class RowAt, class PutBeside>
M2N_HD void put_rows(Exec& exec, [[maybe_unused]] PutDeal& deal, unsigned char* to, uint32_t num_rows,
                     uint64_t row_bytes, [[maybe_unused]] bool is_streamed, RowAt&& row_at, PutBeside&& put_beside) {
#if defined(__CUDA_ARCH__)
  const auto bytes = static_cast<uint32_t>(row_bytes);
  if (deal.is_short) {
    put_row_pieces<kShortAhead>(exec, deal.deal, to, num_rows, bytes, row_at, put_beside);
  } else {
    put_row_pieces<kLongAhead>(exec, deal.deal, to, num_rows, bytes, row_at, put_beside);
  }
#else
  const uint32_t part = exec.block() * exec.num_threads() + exec.thread();
  const uint32_t num_parts = exec.num_blocks() * exec.num_threads();
  const uint32_t begin = share(num_rows, part, num_parts);
  const uint32_t end = share(num_rows, part + 1, num_parts);
  uint32_t run = 1;
  for (uint32_t row = begin; row < end; row += run) {
    const unsigned char* from = row_at(row);
    for (run = 1; row + run < end && row_at(row + run) == from + run * row_bytes; ++run) {
    }
    put(exec, to + row * row_bytes, from, run * row_bytes, is_streamed);
  }
  if (begin != end) put_beside(begin, end);
#endif
}

// Rows side by side in the send area that stands for the peer's memory, by one thread of the host: the message is one
// run of them, and reads nothing else any more.
template <class Exec, class RowAt, class PutBeside>
void pack_rows(Exec& exec, unsigned char* to, uint32_t num_rows, uint64_t row_bytes, RowAt&& row_at,
               PutBeside&& put_beside) {
  for (uint32_t row = 0; row < num_rows; ++row) std::memcpy(to + row * row_bytes, row_at(row), row_bytes);
  wrote(exec, to, num_rows * row_bytes);
  put_beside(0, num_rows);
}

M2N_HD inline Signal* peer_signal(const PeerView& peer, const Meta& meta, uint32_t slot) {
  return reinterpret_cast<Signal*>(peer.meta + meta.signal(slot));
}

// The end of a message, by one thread, behind drain(): its header, then its signal.
template <class Exec>
M2N_HD void ring(Exec& exec, const PeerView& peer, const Meta& meta, uint32_t slot, uint32_t seq,
                 const Header& header) {
  write_header(peer.meta + meta.header(slot), header);
  wrote(exec, peer.meta + meta.header(slot), sizeof header);
  signal(exec, peer, peer_signal(peer, meta, slot), make_signal(header.num_rows, seq));
}

}  // namespace m2n
