// SPDX-License-Identifier: Apache-2.0
// Taking the messages of a batch and building its lists, by the threads of one block: what dispatch.h does in one
// thread.
#pragma once

#include <cstdint>

#include "core/arrive.h"
#include "exchange/bodies/dispatch.h"
#include "exchange/bodies/inbox.h"
#include "exchange/device/verbs/tally.h"
#include "exchange/device/verbs/wait.h"
#include "exchange/rows/layout.h"

namespace m2n {

// The batch of a slot, as the verbs know it.
struct BatchState {
  uint32_t is_open;  // received and not answered: its lists are in use
  uint32_t arrivals;
  uint32_t layer;
  uint32_t num_messages;
  uint32_t num_rows;
  uint32_t num_pairs;
};

// Arrays of one slot, at full capacity.
struct SlotLists {
  BatchView lists;
  BatchMessage* messages;  // [max_peers]
  BatchState* state;
};

struct ExpertView {
  InboxView inbox;  // with the verbs' own table of peers
  Peers peers;
  Shape shape;
  uint32_t max_peers;
  const int32_t* expert_idx;  // [num_experts]: global id -> local index, -1: not hosted
  uint32_t num_local_experts;
  SlotLists* slots;    // [slot]
  int32_t* idxs;       // scratch of one receive: of the local experts, message after message
  float* row_weights;  // likewise
  uint32_t* counts;    // tally_words(num_local_experts + 1)
  const Control* control;
  Counters* counters;
};

struct Collected {
  uint32_t num_messages = 0;
  uint32_t num_rows = 0;
  uint32_t num_pairs = 0;
  Violation violation;
};

// Which messages go into the batch, in the order of joining; all threads learn the same. `row_counts` is shared.
template <class Exec>
M2N_HD Collected list_messages(Exec& exec, const ExpertView& view, const Wanted& wanted, uint32_t layer,
                               uint32_t microbatch, uint32_t* row_counts, uint32_t* ranks) {
  constexpr uint32_t kAbsent = UINT32_MAX;
  // Read once for all: a peer that joins meanwhile would be there for some threads and not for others.
  if (is_leader(exec)) row_counts[0] = view.inbox.peers.size();
  exec.sync();
  const uint32_t num_peers = row_counts[0];
  exec.sync();
  for (uint32_t i = exec.thread(); i < num_peers; i += exec.num_threads()) {
    const bool is_here = belongs(view.inbox, wanted, layer, microbatch, i);
    row_counts[i] = is_here ? view.inbox.at(i, microbatch).header.num_rows : kAbsent;
  }
  exec.sync();
  Collected found;
  for (uint32_t i = 0; i < num_peers; ++i) {
    if (row_counts[i] == kAbsent) continue;
    if (found.num_messages % exec.num_threads() == exec.thread()) {
      const BatchMessage message = message_of(view.inbox, i, microbatch, found.num_rows);
      view.slots[microbatch].messages[found.num_messages] = message;
      if (ranks != nullptr) ranks[found.num_messages] = view.inbox.peers.entries[i].rank;
    }
    ++found.num_messages;
    found.num_rows += row_counts[i];
  }
  exec.sync();
  return found;
}

// Each thread copies and checks rows of all messages. False: a row of some message is wrong, or not for us.
template <class Exec>
M2N_HD bool take_rows(Exec& exec, const ExpertView& view, const SlotLists& slot, uint32_t num_messages) {
  const uint32_t top_k = view.shape.top_k;
  bool is_wrong = false;
  Deal deal(exec.thread(), exec.num_threads());
  for (uint32_t i = 0; i < num_messages; ++i) {
    const BatchMessage message = slot.messages[i];
    deal(message.arrived.num_rows, [&](uint32_t row) {
      const uint64_t from = uint64_t{row} * top_k;
      int32_t* idxs = view.idxs + uint64_t{message.first_row} * top_k + from;
      float* weights = view.row_weights + uint64_t{message.first_row} * top_k + from;
      for (uint32_t k = 0; k < top_k; ++k) {
        idxs[k] = message.arrived.window_ids[from + k];
        weights[k] = message.arrived.window_weights[from + k];
      }
      const RecvResult result = check_row(idxs, weights, top_k, view.shape.num_experts, view.expert_idx, row);
      is_wrong |= result.error != RecvError::kNone;
    });
  }
  return !exec.any(is_wrong);
}

// The lists, from the private copies: pairs sorted by expert, in the order of rows. Their number.
template <class Exec>
M2N_HD uint32_t build_lists(Exec& exec, const ExpertView& view, const SlotLists& slot, const Collected& batch) {
  const uint32_t top_k = view.shape.top_k;
  const uint32_t num_experts = view.num_local_experts;
  const BatchView lists = slot.lists;
  const Tally tally = make_tally(exec, view.counts, num_experts + 1, batch.num_rows);  // the last key: of any expert
  const uint32_t part = exec.thread();  // each thread counts and fills its own
  const uint32_t begin = part < tally.num_parts ? tally.begin(part) : 0;
  const uint32_t end = part < tally.num_parts ? tally.begin(part + 1) : 0;
  const auto for_each_pair = [&](uint32_t row, auto&& body) {
    const int32_t* idxs = view.idxs + uint64_t{row} * top_k;
    for (uint32_t k = 0; k < top_k && idxs[k] != kNone; ++k) body(static_cast<uint32_t>(idxs[k]), k);
  };
  clear(exec, tally);
  for (uint32_t row = begin; row < end; ++row) {
    for_each_pair(row, [&](uint32_t expert, uint32_t) {
      ++tally.at(expert, part);
      ++tally.at(num_experts, part);
    });
  }
  add_up(exec, tally);
  if (is_leader(exec)) {
    int32_t offset = 0;
    for (uint32_t expert = 0; expert < num_experts; ++expert) {
      lists.expert_offsets[expert] = offset;
      offset += static_cast<int32_t>(tally.total(expert));
    }
    lists.expert_offsets[num_experts] = lists.pair_begin[batch.num_rows] = offset;
  }
  exec.sync();
  uint32_t message_idx = 0;
  for (uint32_t row = begin; row < end; ++row) {
    while (row - slot.messages[message_idx].first_row >= slot.messages[message_idx].arrived.num_rows) ++message_idx;
    const BatchMessage& message = slot.messages[message_idx];
    const auto window_row = static_cast<int32_t>(view.inbox.layout.dispatch_rows.row_in_window(
        message.arrived.peer_idx, message.arrived.slot, row - message.first_row));
    lists.pair_begin[row] = static_cast<int32_t>(tally.at(num_experts, part));
    for_each_pair(row, [&](uint32_t expert, uint32_t k) {
      const int32_t position = lists.expert_offsets[expert] + static_cast<int32_t>(tally.at(expert, part)++);
      lists.pair_position[tally.at(num_experts, part)++] = position;
      lists.row_index_by_expert[position] = window_row;
      lists.weights[position] = view.row_weights[uint64_t{row} * top_k + k];
    });
  }
  return tally.total(num_experts);
}

// The leader takes them one by one, so that what is refused or broken is told; whatever else came stays pending, for
// the next look.
template <class Exec>
M2N_HD Violation refuse(Exec& exec, const ExpertView& view, const Wanted& wanted, uint32_t layer, uint32_t microbatch) {
  Violation violation;
  for (uint32_t i = 0; i < view.inbox.peers.size() && violation.breach == Breach::kNone; ++i) {
    if (!belongs(view.inbox, wanted, layer, microbatch, i)) continue;
    const ArrivedMessage message = message_of(view.inbox, i, microbatch, 0).arrived;
    const Hosted hosted{view.shape.num_experts, view.expert_idx};
    const Taken taken = take_message(exec, view.inbox, message, hosted, view.idxs, view.row_weights, &violation);
    if (taken == Taken::kRefused) add_relaxed(&view.counters->messages_sent, uint64_t{1});
  }
  return violation;
}

// Takes all messages of (layer, microbatch) and builds the lists. Without messages: some were refused, or one breaks
// the protocol; only the leader's result says which. `ranks` may be nullptr.
template <class Exec>
M2N_HD Collected collect(Exec& exec, const ExpertView& view, const Wanted& wanted, uint32_t layer, uint32_t microbatch,
                         uint32_t* ranks) {
  const SlotLists& slot = view.slots[microbatch];
  Collected batch = list_messages(exec, view, wanted, layer, microbatch, exec.shared(), ranks);
  if (!take_rows(exec, view, slot, batch.num_messages)) {
    uint32_t* shared = exec.shared();
    Collected none;
    if (is_leader(exec)) {
      none.violation = refuse(exec, view, wanted, layer, microbatch);
      shared[0] = static_cast<uint32_t>(none.violation.breach);
    }
    exec.sync();
    none.violation.breach = static_cast<Breach>(shared[0]);
    exec.sync();
    return none;
  }
  batch.num_pairs = build_lists(exec, view, slot, batch);
  for (uint32_t i = exec.thread(); i < batch.num_messages; i += exec.num_threads()) {
    view.inbox.at(slot.messages[i].arrived.peer_idx, microbatch).is_pending = false;
  }
  if (is_leader(exec)) {
    BatchState& state = *slot.state;
    state.layer = layer;
    state.num_messages = batch.num_messages;
    state.num_rows = batch.num_rows;
    state.num_pairs = batch.num_pairs;
    add_relaxed(&view.counters->rows_received, uint64_t{batch.num_rows});
    store_release(&state.is_open, 1u);  // SYNC: slot-open
  }
  exec.sync();
  return batch;
}

}  // namespace m2n
