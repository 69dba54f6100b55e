// SPDX-License-Identifier: Apache-2.0
// The bodies of combine_send and combine_recv: results back, and their weighted sum (sum.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/peer.h"
#include "core/slot.h"
#include "exchange/rows/layout.h"
#include "exchange/rows/put_rows.h"
#include "exchange/rows/route.h"
#include "exchange/rows/sum.h"

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
  bool is_streamed;              // on the host: rows that travel as they are go past the caches
};

// Which message, by its rows in the batch.
M2N_HD inline void choose_rows(CombineSend& send, ReduceAt reduce_at, uint32_t first_row, uint32_t num_rows) {
  const int32_t* pair_begin = send.pair_begin + first_row;
  send.first_row = first_row;
  send.num_rows = num_rows;
  send.header.num_rows =
      reduce_at == ReduceAt::kExpert ? num_rows : static_cast<uint32_t>(pair_begin[num_rows] - pair_begin[0]);
}

template <class In>
M2N_HD const In* row_of(const unsigned char* base, uint64_t stride_bytes, uint64_t row) {
  return reinterpret_cast<const In*>(base + row * stride_bytes);
}

// reduce_at=expert: one reply row per row. When is_reduced y holds it, else it is the weighted sum over its experts in
// ascending global expert id.
template <class In, class Out, class Exec>
M2N_HD void put_reduced_rows(const Exec& exec, Deal& deal, const CombineSend& send, uint32_t hidden, Out* out) {
  const bool are_whole =
      are_whole_spans(hidden, send.y, send.y_stride_bytes) && are_whole_spans(hidden, out, hidden * sizeof(Out));
  for_each_span(exec, deal, send.num_rows, hidden, are_whole, [&](uint32_t row, const Spans& spans) {
    Out* to = out + static_cast<uint64_t>(row) * hidden;
    if (send.is_reduced) {
      return cast_spans(to, row_of<In>(send.y, send.y_stride_bytes, send.first_row + row), spans);
    }
    const int32_t* pair = send.pair_position + send.pair_begin[send.first_row + row];
    const uint32_t num_pairs =
        static_cast<uint32_t>(send.pair_begin[send.first_row + row + 1] - send.pair_begin[send.first_row + row]);
    sum_spans<true, In>(
        to, spans, num_pairs, [&](uint32_t i) { return row_of<In>(send.y, send.y_stride_bytes, pair[i]); },
        [&](uint32_t i) { return send.weights[pair[i]]; });
  });
}

// reduce_at=attention: one reply row per (row, expert), unweighted, in wire order.
template <class In, class Out, class Exec>
M2N_HD void put_pair_rows(const Exec& exec, Deal& deal, const CombineSend& send, uint32_t hidden, Out* out) {
  const int32_t* pair = send.pair_position + send.pair_begin[send.first_row];
  const bool are_whole =
      are_whole_spans(hidden, send.y, send.y_stride_bytes) && are_whole_spans(hidden, out, hidden * sizeof(Out));
  for_each_span(exec, deal, send.header.num_rows, hidden, are_whole, [&](uint32_t i, const Spans& spans) {
    cast_spans(out + static_cast<uint64_t>(i) * hidden, row_of<In>(send.y, send.y_stride_bytes, pair[i]), spans);
  });
}

// Reduces while it writes into the peer's window. In is the type of y, Out that of the reply.
template <class In, class Out, class Exec>
M2N_HD void put_combine_as(Exec& exec, const Layout& layout, const Shape& shape, const CombineSend& send,
                           PutDeal& deal) {
  const uint64_t row_bytes = layout.combine_rows.row_bytes;
  unsigned char* rows = send.peer.rows + layout.combine_rows.row_in_object(send.slot, 0) * row_bytes;
  const bool is_paired = shape.reduce_at == ReduceAt::kAttention;
  if (std::is_same_v<In, Out> && (is_paired || send.is_reduced)) {  // as it is
    const int32_t* pair = is_paired ? send.pair_position + send.pair_begin[send.first_row] : nullptr;
    const auto row_at = [&](uint32_t row) {
      return send.y + (is_paired ? static_cast<uint64_t>(pair[row]) : send.first_row + row) * send.y_stride_bytes;
    };
    const auto nothing_beside = [](uint32_t, uint32_t) {};
    return put_rows(exec, deal, rows, send.header.num_rows, row_bytes, send.is_streamed, row_at, nothing_beside);
  }
  if (is_paired) {
    put_pair_rows<In>(exec, deal.deal, send, shape.hidden, reinterpret_cast<Out*>(rows));
  } else {
    put_reduced_rows<In>(exec, deal.deal, send, shape.hidden, reinterpret_cast<Out*>(rows));
  }
  wrote(exec, rows, send.header.num_rows * row_bytes);
}

// One reply by one thread of the host: the rows, then the signal.
template <class Exec>
void combine_send(Exec& exec, const Layout& layout, const Shape& shape, const CombineSend& send) {
  PutDeal deal{{0, 1}, false};
  flush(exec, peer_signal(send.peer, layout.combine_meta, send.slot));
  with_dtypes(send.y_dtype, shape.combine_dtype,
              [&](auto in, auto out) { put_combine_as<decltype(in), decltype(out)>(exec, layout, shape, send, deal); });
  if (drain(exec, nullptr, send.is_streamed)) {
    ring(exec, send.peer, layout.combine_meta, send.slot, send.seq, send.header);
  }
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
template <class T, class Exec>
M2N_HD void combine_recv_as(const Exec& exec, const Layout& layout, const Shape& shape, const CombineRecv& recv) {
  const Rows& rows = layout.combine_rows;
  const auto sum = [&](uint32_t token, const Spans& spans) {
    T* y = reinterpret_cast<T*>(recv.y + token * recv.y_stride_bytes);
    const uint64_t from = static_cast<uint64_t>(token) * shape.top_k;
    bool is_missing = false;
    const auto row_at = [&](uint32_t i) -> const T* {
      const int32_t rank = recv.route.source_rank[from + i];
      is_missing |= rank == kUnknown;
      if (rank < 0) return nullptr;
      const int32_t peer_idx = recv.peer_of_rank[rank];
      is_missing |= peer_idx == kNone;
      if (peer_idx == kNone) return nullptr;
      const uint64_t row = rows.row_in_window(peer_idx, recv.slot, recv.route.source_row[from + i]);
      return row_of<T>(recv.window, rows.row_bytes, row);
    };
    if (shape.reduce_at == ReduceAt::kExpert) {
      sum_spans<false, T>(y, spans, shape.top_k, row_at, [](uint32_t) { return 1.0f; });
    } else {
      sum_spans<true, T>(y, spans, shape.top_k, row_at, [&](uint32_t i) { return recv.route.source_weight[from + i]; });
    }
    if (is_missing) fill_with_nan(y, spans);
  };
  Deal deal = deal_to_groups(exec);
  const bool are_whole = are_whole_spans(shape.hidden, recv.y, recv.y_stride_bytes) &&
                         are_whole_spans(shape.hidden, recv.window, rows.row_bytes);
  for_each_span(exec, deal, recv.route.num_tokens, shape.hidden, are_whole, sum);
}

}  // namespace m2n
