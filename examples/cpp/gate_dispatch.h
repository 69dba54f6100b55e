// SPDX-License-Identifier: Apache-2.0
// An example for authors of kernels: gate, top-k and dispatch in one launch, with the library's headers alone. Each
// token goes to its experts' ranks as soon as it has chosen them; combine_recv follows as it does behind dispatch_send.
//
//   one group of lanes, for each of its tokens       the last block to arrive
//   logits, top-k, weights                           rows of each rank, header, signal
//   the next row of a rank's message: row, ids, weights
//
// For reduce_at=expert only: with reduce_at=attention a token's sources are its pairs, numbered in the order of rows,
// which nobody knows before all rows are dealt out.
//
// An Exec (m2n/core/arrive.h) needs two things more here, among the lanes of a group: `sync_lanes()`, and
// `from_first_lane(value)`, which gives all lanes the value of lane 0.
#pragma once

#include <m2n/exchange/device/verbs/attention.h>

#include <cmath>
#include <cstdint>

namespace gate_dispatch {

using namespace m2n;

// What a launch carries: plain pointers to memory where it runs. T is the type of dispatched rows. Needs
// num_tokens <= max_tokens and top_k <= num_experts.
template <class T>
struct GateDispatch {
  DispatchVerb verb;            // of prepare_dispatch(), and in it x [T][hidden] with its stride
  const T* w_gate;              // [hidden][num_experts]
  const int32_t* rank_offsets;  // [num_experts + 1], into `ranks`: the expert ranks that host an expert
  const int32_t* ranks;
  uint32_t own_rank;
  float* logits;        // [T][num_experts]: scratch, and what a caller may want to see
  int32_t* topk_ids;    // [T][top_k]: likewise; -1 where a token goes nowhere
  float* topk_weights;  // [T][top_k]
};

// Each lane works out the logits of some experts: of neighbouring lanes neighbouring ones, so that they read w_gate
// together. Sums run over ascending h, in float32.
template <class T, class Exec>
M2N_HD void find_logits(Exec& exec, const GateDispatch<T>& launch, uint32_t token) {
  const Shape& shape = launch.verb.view.shape;
  const T* x = row_of<T>(launch.verb.x, launch.verb.x_stride_bytes, token);
  float* logits = launch.logits + uint64_t{token} * shape.num_experts;
  for (uint32_t expert = exec.lane(); expert < shape.num_experts; expert += exec.num_lanes()) {
    float sum = 0.0f;
    for (uint32_t h = 0; h < shape.hidden; ++h) {
      sum += to_float(x[h]) * to_float(launch.w_gate[uint64_t{h} * shape.num_experts + expert]);
    }
    logits[expert] = sum;
  }
  exec.sync_lanes();
}

// The place of an expert among all of a token: how many come before it. Of equal logits the lower id comes first.
M2N_HD inline uint32_t place_of(const float* logits, uint32_t num_experts, uint32_t expert) {
  uint32_t place = 0;
  for (uint32_t other = 0; other < num_experts; ++other) {
    const bool is_equal = logits[other] == logits[expert];
    place += logits[other] > logits[expert] || (is_equal && other < expert);
  }
  return place;
}

// Top-k, and its weights: a softmax over all experts, normalised over the chosen ones, is the softmax over those.
// False: a logit is not finite, so that no weight would be; the same for all lanes.
template <class T, class Exec>
M2N_HD bool choose_experts(Exec& exec, const GateDispatch<T>& launch, uint32_t token) {
  const Shape& shape = launch.verb.view.shape;
  const float* logits = launch.logits + uint64_t{token} * shape.num_experts;
  int32_t* ids = launch.topk_ids + uint64_t{token} * shape.top_k;
  float* weights = launch.topk_weights + uint64_t{token} * shape.top_k;
  bool is_finite = true;
  for (uint32_t expert = 0; expert < shape.num_experts; ++expert) {
    is_finite &= logits[expert] - logits[expert] == 0.0f;
  }
  for (uint32_t k = exec.lane(); !is_finite && k < shape.top_k; k += exec.num_lanes()) {
    ids[k] = kNone;
    weights[k] = 0.0f;
  }
  if (!is_finite) return false;
  for (uint32_t expert = exec.lane(); expert < shape.num_experts; expert += exec.num_lanes()) {
    const uint32_t place = place_of(logits, shape.num_experts, expert);
    if (place < shape.top_k) ids[place] = static_cast<int32_t>(expert);
  }
  exec.sync_lanes();
  const float highest = logits[ids[0]];
  float total = 0.0f;
  for (uint32_t k = 0; k < shape.top_k; ++k) total += expf(logits[ids[k]] - highest);
  for (uint32_t k = exec.lane(); k < shape.top_k; k += exec.num_lanes()) {
    weights[k] = expf(logits[ids[k]] - highest) / total;
  }
  exec.sync_lanes();
  return true;
}

// The lanes write a token straight into a row of a peer's window, and beside it the ids and weights of the experts
// there: in ascending id, -1 behind the last.
template <class T, class Exec, class RankOf>
M2N_HD void put_token(Exec& exec, const GateDispatch<T>& launch, const PeerView& peer, uint32_t rank, uint32_t row,
                      uint32_t token, RankOf&& rank_of) {
  const DispatchVerb& verb = launch.verb;
  const Layout& layout = verb.view.layout;
  const uint64_t row_bytes = layout.dispatch_rows.row_bytes;
  unsigned char* to = peer.rows + layout.dispatch_rows.row_in_object(verb.slot, row) * row_bytes;
  put(exec, to, verb.x + token * verb.x_stride_bytes, row_bytes);

  const uint32_t top_k = layout.top_k;
  const int32_t* ids = launch.topk_ids + uint64_t{token} * top_k;
  const float* weights = launch.topk_weights + uint64_t{token} * top_k;
  auto* peer_ids = reinterpret_cast<int32_t*>(peer.meta + layout.dispatch_meta.ids(verb.slot)) + uint64_t{row} * top_k;
  auto* peer_weights =
      reinterpret_cast<float*>(peer.meta + layout.dispatch_meta.weights(verb.slot)) + uint64_t{row} * top_k;
  for (uint32_t k = exec.lane(); k < top_k; k += exec.num_lanes()) {
    uint32_t num_here = 0, num_before = 0;
    for (uint32_t j = 0; j < top_k; ++j) {
      if (rank_of(token, j) != rank) continue;
      ++num_here;
      num_before += ids[j] < ids[k];
    }
    if (rank_of(token, k) == rank) {
      peer_ids[num_before] = ids[k];
      peer_weights[num_before] = weights[k];
    }
    if (k >= num_here) {
      peer_ids[k] = kNone;
      peer_weights[k] = 0.0f;
    }
  }
}

// Sends a token to each rank that hosts one of its experts, once, and notes for combine_recv where its replies will
// lie.
template <class T, class Exec>
M2N_HD void send_token(Exec& exec, const GateDispatch<T>& launch, uint32_t token) {
  const AttentionView& view = launch.verb.view;
  const RouteView& route = launch.verb.route;
  const uint32_t top_k = view.shape.top_k;
  const uint64_t from = uint64_t{token} * top_k;
  const int32_t* ids = launch.topk_ids + from;
  const auto rank_of = [&](uint32_t of_token, uint32_t k) {
    return replica_of(ids[k], of_token, launch.own_rank, launch.rank_offsets, launch.ranks);
  };
  for (uint32_t k = 0; exec.lane() == 0 && k < top_k; ++k) route.source_rank[from + k] = kNone;
  for (uint32_t k = 0; k < top_k; ++k) {
    if (!opens_row(ids, token, k, rank_of)) continue;
    const uint32_t rank = rank_of(token, k);
    uint32_t row = 0;
    if (exec.lane() == 0) {
      row = add_relaxed(route.next_row + rank, 1u);  // relaxed: leave() comes between it and who reads the sum
      add_source(route, from, rank, row);
    }
    row = exec.from_first_lane(row);
    const int32_t peer_idx = view.peer_of_rank(launch.verb.slot)[rank];
    if (peer_idx == kNone) continue;  // it is gone: its share of the result becomes NaN
    put_token(exec, launch, view.peers.table.entries[peer_idx].view, rank, row, token, rank_of);
  }
}

// A token that was not sent, as nobody has its row: combine_recv gives NaN, which is what it would be.
template <class Exec>
M2N_HD void leave_unsent(const Exec& exec, const DispatchVerb& verb, uint32_t token) {
  const uint32_t top_k = verb.view.shape.top_k;
  for (uint32_t k = exec.lane(); k < top_k; k += exec.num_lanes()) {
    verb.route.source_rank[uint64_t{token} * top_k + k] = kUnknown;
  }
}

// By the threads of block 0, before any row is dealt out: the route's memory may have been used before.
// begin_dispatch() reads it too, so they wait for each other.
template <class Exec>
M2N_HD uint32_t begin(Exec& exec, const DispatchVerb& verb) {
  const RouteView& route = verb.route;
  for (uint32_t rank = exec.thread(); rank <= route.num_ranks; rank += exec.num_threads()) {
    route.row_offsets[rank] = 0;
    if (rank < route.num_ranks) route.next_row[rank] = route.pair_counts[rank] = 0;
  }
  exec.sync();
  return begin_dispatch(exec, verb);
}

// By one thread, behind the last row: what finish_message() and combine_recv read of the route.
M2N_HD inline void note_rows(const RouteView& route) {
  for (uint32_t rank = 0; rank < route.num_ranks; ++rank) {
    route.row_offsets[rank + 1] = route.row_offsets[rank] + load_relaxed(route.next_row + rank);  // relaxed: as above
  }
}

// The launch. All its blocks must run at once: they wait for block 0.
template <class T, class Exec>
M2N_HD void run(Exec& exec, const GateDispatch<T>& launch) {
  const DispatchVerb& verb = launch.verb;
  const AttentionView& view = verb.view;
  Gate* gate = &view.slots[verb.slot].gate;
  // Block 0 waits until the slot is free, and finds out who is there.
  const uint32_t verdict = decide(exec, gate, [&] { return begin(exec, verb); });
  Deal deal = deal_to_groups(exec);
  deal(verb.route.num_tokens, [&](uint32_t token) {
    if (verdict == kGo) find_logits(exec, launch, token);
    if (verdict == kGo && choose_experts(exec, launch, token)) return send_token(exec, launch, token);
    leave_unsent(exec, verb, token);
  });
  // The last block to arrive sees what all have written, and rings every rank, a thread each.
  const bool is_last = leave(exec, gate);
  if (is_last && verdict == kGo) note_rows(verb.route);
  if (!exec.any(is_last) || verdict != kGo) return;
  for (uint32_t rank = exec.thread(); rank < verb.route.num_ranks; rank += exec.num_threads()) {
    const int32_t peer_idx = view.peer_of_rank(verb.slot)[rank];
    if (peer_idx != kNone) {
      const PeerView& peer = view.peers.table.entries[peer_idx].view;
      finish_message(exec, verb, rank, {peer, peer_idx, verb.route.row_offsets[rank], rows_for(verb.route, rank)});
    } else {
      choose_peer(verb, rank);  // once more, now that its rows are counted: tells that they had nobody to go to
    }
  }
}

}  // namespace gate_dispatch
