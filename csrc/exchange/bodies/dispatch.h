// SPDX-License-Identifier: Apache-2.0
// The bodies of dispatch_send and dispatch_recv: tokens to experts. Host and device run the same lines.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/peer.h"
#include "core/slot.h"
#include "exchange/rows/layout.h"
#include "exchange/rows/put_rows.h"
#include "exchange/rows/quantize.h"
#include "exchange/rows/route.h"

namespace m2n {

// What one peer gets: R rows of x, and for each its ids and weights.
struct DispatchSend {
  PeerView peer;
  uint32_t slot;
  uint32_t seq;
  Header header;  // num_rows = R
  const unsigned char* x;
  uint64_t x_stride_bytes;
  DType x_dtype;                // that of the shape; for float8 rows, whatever x has
  const int32_t* token_of_row;  // [R]
  const int32_t* ids;           // [R][top_k]
  const float* weights;         // [R][top_k]
  bool is_streamed;             // on the host: its rows go past the caches
  bool is_packed;               // to a send area: its rows are first copied there
};

// Which rows of a route, in the messages' order; else it is an empty message.
M2N_HD inline void choose_rows(DispatchSend& send, const RouteView& route, uint32_t top_k, uint32_t first_row,
                               uint32_t num_rows) {
  send.header.num_rows = num_rows;
  send.token_of_row = route.token_of_row + first_row;
  send.ids = route.ids + uint64_t{first_row} * top_k;
  send.weights = route.weights + uint64_t{first_row} * top_k;
}

// Writes the rows straight from x into the peer's window. The slot must be free. In: the type of x where they become
// float8 on their way; void: they travel as they are.
template <class In, class Exec>
M2N_HD void put_dispatch(Exec& exec, const Layout& layout, const Shape& shape, const DispatchSend& send,
                         PutDeal& deal) {
  const uint64_t row_bytes = layout.dispatch_rows.row_bytes;
  unsigned char* rows = send.peer.rows + layout.dispatch_rows.row_in_object(send.slot, 0) * row_bytes;
  const auto row_at = [&](uint32_t row) {
    return send.x + static_cast<uint64_t>(send.token_of_row[row]) * send.x_stride_bytes;
  };
  const auto put_ids = [&](uint32_t begin, uint32_t end) {
    const uint64_t first = uint64_t{begin} * layout.top_k;
    const uint64_t num_bytes = uint64_t{end - begin} * layout.top_k * sizeof(int32_t);
    unsigned char* meta = send.peer.meta + first * sizeof(int32_t);
    put(exec, meta + layout.dispatch_meta.ids(send.slot), send.ids + first, num_bytes);
    put(exec, meta + layout.dispatch_meta.weights(send.slot), send.weights + first, num_bytes);
  };
  if constexpr (std::is_void_v<In>) {
    if constexpr (kHasOutgoing<Exec>) {
      if (send.is_packed) return pack_rows(exec, rows, send.header.num_rows, row_bytes, row_at, put_ids);
    }
    put_rows(exec, deal, rows, send.header.num_rows, row_bytes, send.is_streamed, row_at, put_ids);
  } else {
    put_quantized_rows<In>(exec, deal.deal, rows, send.header.num_rows, row_bytes, shape.hidden, row_at, put_ids);
    wrote(exec, rows, send.header.num_rows * row_bytes);
  }
}

// One message by one thread of the host: the rows, then the signal.
template <class Exec>
void dispatch_send(Exec& exec, const Layout& layout, const Shape& shape, const DispatchSend& send) {
  PutDeal deal{{0, 1}, false};
  flush(exec, peer_signal(send.peer, layout.dispatch_meta, send.slot));
  if (shape.dispatch_dtype == DType::kFloat8E4M3) {
    with_dtype(send.x_dtype, [&](auto in) { put_dispatch<decltype(in)>(exec, layout, shape, send, deal); });
  } else {
    put_dispatch<void>(exec, layout, shape, send, deal);
  }
  if (drain(exec, nullptr, send.is_streamed)) {
    ring(exec, send.peer, layout.dispatch_meta, send.slot, send.seq, send.header);
  }
}

// One arrived message, as read once from its signal and header and checked (num_rows <= max_tokens).
struct ArrivedMessage {
  uint32_t peer_idx;
  uint32_t slot;
  uint32_t num_rows;
  const int32_t* window_ids;    // [num_rows][top_k] in the window: a peer may still scribble there
  const float* window_weights;  // likewise
};

// One message of a batch.
struct BatchMessage {
  ArrivedMessage arrived;
  uint32_t seq;
  uint32_t first_row;  // of the batch, in wire order

  M2N_HD uint32_t end_row() const { return first_row + arrived.num_rows; }
};

enum class RecvError : uint32_t { kNone, kIdRange, kWeight, kNotHosted };

struct RecvResult {
  RecvError error = RecvError::kNone;
  uint32_t row = 0;
  int32_t value = 0;
};

// Checks the private copy of one row's ids and weights. In it an id becomes the index of the local expert
// (`expert_idx`, by global id). A row ends at the first -1.
M2N_HD inline RecvResult check_row(int32_t* idxs, const float* weights, uint32_t top_k, uint32_t num_experts,
                                   const int32_t* expert_idx, uint32_t row) {
  for (uint32_t k = 0; k < top_k; ++k) {
    const int32_t id = idxs[k];
    if (id == kNone && k > 0) break;
    // A row is sent for at least one expert, so that -1 in front is out of range too.
    if (id < 0 || static_cast<uint32_t>(id) >= num_experts) return {RecvError::kIdRange, row, id};
    if (!(weights[k] - weights[k] == 0.0f)) return {RecvError::kWeight, row, id};
    idxs[k] = expert_idx[id];
    if (idxs[k] == kNone) return {RecvError::kNotHosted, row, id};
  }
  return {};
}

// Copies a message's ids and weights once into private memory, and checks the private copy, which alone is used from
// then on.
M2N_HD inline RecvResult take_ids(const ArrivedMessage& message, uint32_t top_k, uint32_t num_experts,
                                  const int32_t* expert_idx, int32_t* idxs, float* weights) {
  const uint64_t num_pairs = uint64_t{message.num_rows} * top_k;
  if (num_pairs == 0) return {};
  memcpy(idxs, message.window_ids, num_pairs * sizeof(int32_t));
  memcpy(weights, message.window_weights, num_pairs * sizeof(float));
  for (uint32_t row = 0; row < message.num_rows; ++row) {
    const uint64_t from = uint64_t{row} * top_k;
    const RecvResult result = check_row(idxs + from, weights + from, top_k, num_experts, expert_idx, row);
    if (result.error != RecvError::kNone) return result;
  }
  return {};
}

// The index lists of a batch: R rows of all messages, P (row, expert) pairs, E local experts. Pairs are
// numbered twice: by message, row and k ("wire order"), and expert by expert, which is how an expert
// computes.
struct BatchView {
  int32_t* pair_begin;           // [R + 1]: first pair of each row, in wire order
  int32_t* pair_position;        // [P]: wire order -> expert-major position
  int32_t* row_index_by_expert;  // [P]: row of the window, expert-major
  int32_t* expert_offsets;       // [E + 1]
  float* weights;                // [P], expert-major
};

// Adds the pairs of one message to the counts in expert_offsets[e + 1]; returns how many there are.
M2N_HD inline uint32_t count_pairs(const int32_t* idxs, uint32_t num_rows, uint32_t top_k, int32_t* expert_offsets) {
  uint32_t num_pairs = 0;
  for (uint32_t row = 0; row < num_rows; ++row) {
    for (uint32_t k = 0; k < top_k && idxs[row * uint64_t{top_k} + k] != kNone; ++k) {
      ++expert_offsets[idxs[row * uint64_t{top_k} + k] + 1];
      ++num_pairs;
    }
  }
  return num_pairs;
}

// dispatch_recv once all its messages have arrived and were taken: builds the index lists. Serial. `idxs` and
// `weights` are the private copies, message after message; `next` is scratch [E].
M2N_HD inline void dispatch_recv(const Layout& layout, const BatchMessage* messages, uint32_t num_messages,
                                 const int32_t* idxs, const float* weights, uint32_t num_local_experts, int32_t* next,
                                 const BatchView& batch) {
  for (uint32_t e = 0; e < num_local_experts; ++e) {
    batch.expert_offsets[e + 1] += batch.expert_offsets[e];
    next[e] = batch.expert_offsets[e];
  }
  const BatchView lists = batch;  // private, as the top_k: what is written below cannot change them
  const uint32_t top_k = layout.top_k;
  uint32_t row_of_batch = 0;
  int32_t pair = 0;
  for (uint32_t i = 0; i < num_messages; ++i) {
    const ArrivedMessage message = messages[i].arrived;
    auto window_row = static_cast<int32_t>(layout.dispatch_rows.row_in_window(message.peer_idx, message.slot, 0));
    for (uint32_t row = 0; row < message.num_rows; ++row, ++row_of_batch, ++window_row) {
      const uint64_t from = static_cast<uint64_t>(row_of_batch) * top_k;
      lists.pair_begin[row_of_batch] = pair;
      for (uint32_t k = 0; k < top_k && idxs[from + k] != kNone; ++k) {
        const int32_t position = next[idxs[from + k]]++;
        lists.pair_position[pair++] = position;
        lists.row_index_by_expert[position] = window_row;
        lists.weights[position] = weights[from + k];
      }
    }
  }
  lists.pair_begin[row_of_batch] = pair;
}

}  // namespace m2n
