// SPDX-License-Identifier: Apache-2.0
// The bodies of dispatch_send and dispatch_recv: tokens to experts. Host and device run the same lines.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/peer.h"
#include "core/slot.h"
#include "exchange/layout.h"
#include "exchange/route.h"

namespace m2n {

// What one peer gets: R rows of x, and for each its ids and weights.
struct DispatchSend {
  PeerView peer;
  uint32_t slot;
  uint32_t seq;
  Header header;  // num_rows = R
  const unsigned char* x;
  uint64_t x_stride_bytes;
  const int32_t* token_of_row;  // [R]
  const int32_t* ids;           // [R][top_k]
  const float* weights;         // [R][top_k]
  uint32_t* arrivals;           // of the blocks that run this; nullptr for one
};

// Where the share of one of `num_parts` begins.
M2N_HD constexpr uint32_t share(uint32_t num_items, uint32_t part, uint32_t num_parts) {
  return static_cast<uint32_t>(uint64_t{num_items} * part / num_parts);
}

// Writes the rows straight from x into the peer's window, then rings its signal. The slot must be free.
template <class Exec>
M2N_HD void dispatch_send(Exec& exec, const Layout& layout, const DispatchSend& send) {
  const uint64_t row_bytes = layout.dispatch_rows.row_bytes;
  unsigned char* rows = send.peer.rows + layout.dispatch_rows.row_in_object(send.slot, 0) * row_bytes;
  // Each block takes a run of the rows.
  const uint32_t begin = share(send.header.num_rows, exec.block(), exec.num_blocks());
  const uint32_t end = share(send.header.num_rows, exec.block() + 1, exec.num_blocks());
  uint32_t run = 1;
  for (uint32_t row = begin; row < end; row += run) {
    const uint64_t token = static_cast<uint64_t>(send.token_of_row[row]);
    // Neighbours in x that are neighbours in the window travel as one piece.
    for (run = 1; send.x_stride_bytes == row_bytes && row + run < end; ++run) {
      if (static_cast<uint64_t>(send.token_of_row[row + run]) != token + run) break;
    }
    put(exec, rows + row * row_bytes, send.x + token * send.x_stride_bytes, run * row_bytes);
  }
  if (begin != end) {
    const uint64_t first = uint64_t{begin} * layout.top_k;
    const uint64_t ids_bytes = uint64_t{end - begin} * layout.top_k * sizeof(int32_t);
    const uint64_t ids_offset = first * sizeof(int32_t);
    unsigned char* small = send.peer.small + ids_offset;
    put(exec, small + layout.dispatch_small.ids(send.slot), send.ids + first, ids_bytes);
    put(exec, small + layout.dispatch_small.weights(send.slot), send.weights + first, ids_bytes);
  }
  if (exec.block() == 0) {
    put(exec, send.peer.small + layout.dispatch_small.header(send.slot), &send.header, sizeof(Header));
  }
  if (!drain(exec, send.arrivals)) return;
  auto* word = reinterpret_cast<Signal*>(send.peer.small + layout.dispatch_small.signal(send.slot));
  signal(exec, send.peer, word, make_signal(send.header.num_rows, send.seq));
}

// One arrived message, as read once from its signal and header and checked (num_rows <= max_tokens).
struct ArrivedMessage {
  uint32_t peer_idx;
  uint32_t slot;
  uint32_t num_rows;
  const int32_t* window_ids;    // [num_rows][top_k] in the window: a peer may still scribble there
  const float* window_weights;  // likewise
};

enum class RecvError : uint32_t { kNone, kIdRange, kWeight, kNotHosted };

struct RecvResult {
  RecvError error = RecvError::kNone;
  uint32_t row = 0;
  int32_t value = 0;
};

// Copies a message's ids and weights once into private memory, and checks the private copy, which alone is used from
// then on. `expert_idx` maps a global id to the index of the local expert, or -1. Valid ids come first in a row.
M2N_HD inline RecvResult take_ids(const ArrivedMessage& message, uint32_t top_k, uint32_t num_experts,
                                  const int32_t* expert_idx, int32_t* ids, float* weights) {
  const uint64_t num_bytes = uint64_t{message.num_rows} * top_k * sizeof(int32_t);
  if (num_bytes != 0) {
    memcpy(ids, message.window_ids, num_bytes);
    memcpy(weights, message.window_weights, num_bytes);
  }
  for (uint32_t row = 0; row < message.num_rows; ++row) {
    const uint64_t from = uint64_t{row} * top_k;
    for (uint32_t k = 0; k < top_k; ++k) {
      const int32_t id = ids[from + k];
      if (id == kNone && k > 0) break;
      // A row is sent for at least one expert, so that -1 in front is out of range too.
      if (id < 0 || static_cast<uint32_t>(id) >= num_experts) return {RecvError::kIdRange, row, id};
      const float weight = weights[from + k];
      if (!(weight - weight == 0.0f)) return {RecvError::kWeight, row, id};
      if (expert_idx[id] == kNone) return {RecvError::kNotHosted, row, id};
    }
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
M2N_HD inline uint32_t count_pairs(const int32_t* ids, uint32_t num_rows, uint32_t top_k, const int32_t* expert_idx,
                                   int32_t* expert_offsets) {
  uint32_t num_pairs = 0;
  for (uint32_t row = 0; row < num_rows; ++row) {
    for (uint32_t k = 0; k < top_k && ids[row * uint64_t{top_k} + k] != kNone; ++k) {
      ++expert_offsets[expert_idx[ids[row * uint64_t{top_k} + k]] + 1];
      ++num_pairs;
    }
  }
  return num_pairs;
}

// dispatch_recv once all its messages have arrived and were taken: builds the index lists. Serial. `ids` and
// `weights` are the private copies, message after message; `next` is scratch [E].
M2N_HD inline void dispatch_recv(const Layout& layout, const ArrivedMessage* messages, uint32_t num_messages,
                                 const int32_t* ids, const float* weights, const int32_t* expert_idx,
                                 uint32_t num_local_experts, int32_t* next, const BatchView& batch) {
  for (uint32_t e = 0; e < num_local_experts; ++e) {
    batch.expert_offsets[e + 1] += batch.expert_offsets[e];
    next[e] = batch.expert_offsets[e];
  }
  uint32_t row_of_batch = 0;
  int32_t pair = 0;
  for (uint32_t i = 0; i < num_messages; ++i) {
    for (uint32_t row = 0; row < messages[i].num_rows; ++row, ++row_of_batch) {
      const uint64_t from = static_cast<uint64_t>(row_of_batch) * layout.top_k;
      const auto window_row =
          static_cast<int32_t>(layout.dispatch_rows.row_in_window(messages[i].peer_idx, messages[i].slot, row));
      batch.pair_begin[row_of_batch] = pair;
      for (uint32_t k = 0; k < layout.top_k && ids[from + k] != kNone; ++k) {
        const int32_t position = next[expert_idx[ids[from + k]]]++;
        batch.pair_position[pair++] = position;
        batch.row_index_by_expert[position] = window_row;
        batch.weights[position] = weights[from + k];
      }
    }
  }
  batch.pair_begin[row_of_batch] = pair;
}

}  // namespace m2n
