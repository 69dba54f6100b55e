// SPDX-License-Identifier: Apache-2.0
// The bodies of combine_send and combine_recv: results back, and their weighted sum (sum.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/peer.h"
#include "core/slot.h"
#include "exchange/layout.h"
#include "exchange/put_rows.h"
#include "exchange/route.h"
#include "exchange/sum.h"

namespace m2n {

// The reply to one message of a batch: rows first_row .. first_row + num_rows of the batch.
struct CombineSend {
  PeerView peer;
  uint32_t slot;
  uint32_t seq;
  Header header;  // num_rows = rows of the reply
  uint32_t first_row;
  uint32_t num_rows;       // of the message
  const unsigned char* y;  // [P][hidden] expert-major, or [R][hidden] in wire order when is_reduced
  uint64_t y_stride_bytes;
  DType y_dtype;
  bool is_reduced;
  const int32_t* pair_begin;     // of the batch
  const int32_t* pair_position;  // of the batch
  const float* weights;          // of the batch
  uint32_t* arrivals;            // of the blocks that run this; nullptr for one
  bool is_streamed;              // on the host: rows that travel as they are go past the caches
};

// The elements begin .. end of a row, cast once.
template <class In, class Out>
M2N_HD void cast_span(Out* to, const In* from, uint32_t begin, uint32_t end) {
  for (uint32_t h = begin; h < end; ++h) to[h] = from_float<Out>(to_float(from[h]));
}

template <class In>
M2N_HD const In* row_of(const unsigned char* base, uint64_t stride_bytes, uint64_t row) {
  return reinterpret_cast<const In*>(base + row * stride_bytes);
}

// reduce_at=expert: one reply row per row. When is_reduced y holds it, else it is the weighted sum over its experts in
// ascending global expert id.
template <class In, class Out, class Exec>
M2N_HD void put_reduced_rows(Exec& exec, const CombineSend& send, uint32_t hidden, Out* out) {
  for_each_span(exec, send.num_rows, hidden, [&](uint32_t row, uint32_t begin, uint32_t end) {
    Out* to = out + static_cast<uint64_t>(row) * hidden;
    if (send.is_reduced) {
      cast_span(to, row_of<In>(send.y, send.y_stride_bytes, send.first_row + row), begin, end);
      return;
    }
    const int32_t* pair = send.pair_position + send.pair_begin[send.first_row + row];
    const uint32_t num_pairs =
        static_cast<uint32_t>(send.pair_begin[send.first_row + row + 1] - send.pair_begin[send.first_row + row]);
    sum_span<true, In>(
        to, begin, end, num_pairs, [&](uint32_t i) { return row_of<In>(send.y, send.y_stride_bytes, pair[i]); },
        [&](uint32_t i) { return send.weights[pair[i]]; });
  });
}

// reduce_at=attention: one reply row per (row, expert), unweighted, in wire order.
template <class In, class Out, class Exec>
M2N_HD void put_pair_rows(Exec& exec, const CombineSend& send, uint32_t hidden, Out* out) {
  const int32_t* pair = send.pair_position + send.pair_begin[send.first_row];
  for_each_span(exec, send.header.num_rows, hidden, [&](uint32_t i, uint32_t begin, uint32_t end) {
    cast_span(out + static_cast<uint64_t>(i) * hidden, row_of<In>(send.y, send.y_stride_bytes, pair[i]), begin, end);
  });
}

// Reduces while it writes into the peer's window, then rings its signal.
template <class Exec>
M2N_HD void combine_send(Exec& exec, const Layout& layout, const Shape& shape, const CombineSend& send) {
  const uint64_t row_bytes = layout.combine_rows.row_bytes;
  unsigned char* rows = send.peer.rows + layout.combine_rows.row_in_object(send.slot, 0) * row_bytes;
  const bool is_paired = shape.reduce_at == ReduceAt::kAttention;
  const bool is_ready = send.y_dtype == shape.combine_dtype && (is_paired || send.is_reduced);
  if (is_ready) {
    const int32_t* pair = is_paired ? send.pair_position + send.pair_begin[send.first_row] : nullptr;
    put_rows(exec, rows, send.header.num_rows, row_bytes, send.is_streamed, [&](uint32_t row) {
      return send.y + (is_paired ? static_cast<uint64_t>(pair[row]) : send.first_row + row) * send.y_stride_bytes;
    });
  } else {
    with_dtype(send.y_dtype, [&](auto in) {
      with_dtype(shape.combine_dtype, [&](auto out) {
        using In = decltype(in);
        using Out = decltype(out);
        if (is_paired) {
          put_pair_rows<In>(exec, send, shape.hidden, reinterpret_cast<Out*>(rows));
        } else {
          put_reduced_rows<In>(exec, send, shape.hidden, reinterpret_cast<Out*>(rows));
        }
      });
    });
  }
  if (exec.block() == 0) {
    put(exec, send.peer.small + layout.combine_small.header(send.slot), &send.header, sizeof(Header));
  }
  if (!drain(exec, send.arrivals, send.is_streamed)) return;
  auto* word = reinterpret_cast<Signal*>(send.peer.small + layout.combine_small.signal(send.slot));
  signal(exec, send.peer, word, make_signal(send.header.num_rows, send.seq));
}

// A reply without rows: to an empty message, or a refusal. For one block.
template <class Exec>
M2N_HD void send_empty_reply(Exec& exec, const Layout& layout, const PeerView& peer, uint32_t slot, uint32_t seq,
                             const Header& header) {
  put(exec, peer.small + layout.combine_small.header(slot), &header, sizeof(Header));
  if (!drain(exec, nullptr)) return;
  auto* word = reinterpret_cast<Signal*>(peer.small + layout.combine_small.signal(slot));
  signal(exec, peer, word, make_signal(header.num_rows, seq));
}

struct CombineRecv {
  uint32_t slot;
  RouteView route;
  const unsigned char* window;  // our own: replies of all peers
  const int32_t* peer_of_rank;  // [N]: peer index, or -1 where the rank was given up: its share becomes NaN
  unsigned char* y;
  uint64_t y_stride_bytes;
};

// Sums the replies of every token into y, once all of them have arrived.
template <class Exec>
M2N_HD void combine_recv(Exec& exec, const Layout& layout, const Shape& shape, const CombineRecv& recv) {
  const Rows& rows = layout.combine_rows;
  with_dtype(shape.combine_dtype, [&](auto element) {
    using T = decltype(element);
    const auto sum = [&](uint32_t token, uint32_t begin, uint32_t end) {
      T* y = reinterpret_cast<T*>(recv.y + token * recv.y_stride_bytes);
      const uint64_t from = static_cast<uint64_t>(token) * shape.top_k;
      bool is_missing = false;
      const auto row_at = [&](uint32_t i) -> const T* {
        const int32_t rank = recv.route.source_rank[from + i];
        if (rank == kNone) return nullptr;
        const int32_t peer_idx = recv.peer_of_rank[rank];
        is_missing |= peer_idx == kNone;
        if (peer_idx == kNone) return nullptr;
        const uint64_t row = rows.row_in_window(peer_idx, recv.slot, recv.route.source_row[from + i]);
        return row_of<T>(recv.window, rows.row_bytes, row);
      };
      if (shape.reduce_at == ReduceAt::kExpert) {
        sum_span<false, T>(y, begin, end, shape.top_k, row_at, [](uint32_t) { return 1.0f; });
      } else {
        sum_span<true, T>(y, begin, end, shape.top_k, row_at,
                          [&](uint32_t i) { return recv.route.source_weight[from + i]; });
      }
      for (uint32_t h = begin; is_missing && h < end; ++h) y[h] = from_float<T>(bits_to_float(0x7FC00000u));
    };
    for_each_span(exec, recv.route.num_tokens, shape.hidden, sum);
  });
}

}  // namespace m2n
