// SPDX-License-Identifier: Apache-2.0
// The verbs of an expert rank as a device runs them: one launch each, with all state in memory that the launches
// share. Lists of a batch have fixed addresses per slot. A launch carries one of the structs below.
#pragma once

#include <cstdint>

#include "exchange/combine.h"
#include "exchange/device_wait.h"
#include "exchange/dispatch.h"
#include "exchange/inbox.h"
#include "exchange/layout.h"

namespace m2n {

// One message of a batch.
struct BatchMessage {
  ArrivedMessage arrived;
  uint32_t seq;
  uint32_t first_row;  // of the batch, in wire order
};

// Arrays of one slot, at full capacity.
struct SlotLists {
  BatchView lists;
  BatchMessage* messages;  // [max_peers]
};

struct ExpertView {
  InboxView inbox;
  Shape shape;
  uint32_t max_peers;
  const int32_t* expert_idx;  // [num_experts]: global id -> local index, -1: not hosted
  uint32_t num_local_experts;
  SlotLists* slots;         // [slot]
  int32_t* idxs;            // scratch of one receive: of the local experts, message after message
  float* row_weights;       // likewise
  ArrivedMessage* arrived;  // likewise, [max_peers]
  int32_t* next;            // [num_local_experts]
  uint32_t* arrivals;       // [slot][max_peers]: blocks that have written their part of a reply
  const Control* control;
};

// What a receive found, in host memory.
struct Received {
  bool is_batch;    // a batch was taken; else nothing was complete in time
  bool is_started;  // not complete, but at least one message that matches waits
  uint32_t layer;
  uint32_t microbatch;
  uint32_t num_messages;
  uint32_t num_rows;
  uint32_t num_pairs;
  uint32_t num_arrived;   // messages noted
  uint32_t num_answered;  // replies without rows
  int32_t missing_rank;   // strict: the first listed rank that has not sent, or -1
  Violation violation;
  uint32_t violation_layer;
};

struct ReceiveVerb {
  ExpertView view;
  Wanted wanted;
  bool is_peek;  // only says what is ready
  int64_t timeout_ns;
  Received* received;
  uint32_t* ranks;  // host memory [max_peers]: of the attention ranks, message by message
};

// Takes one message: its ids and weights into the private copies. False: refused, which its sender learns, or broken.
template <class Exec>
M2N_HD bool take_message(Exec& exec, const ReceiveVerb& verb, uint32_t peer_idx, uint32_t slot) {
  const ExpertView& view = verb.view;
  const Layout& layout = view.inbox.layout;
  Received& received = *verb.received;
  Inbox& box = view.inbox.at(peer_idx, slot);
  BatchMessage message{};
  message.arrived.peer_idx = peer_idx;
  message.arrived.slot = slot;
  message.arrived.num_rows = box.header.num_rows;
  const unsigned char* small = view.inbox.small_of(peer_idx);
  message.arrived.window_ids = reinterpret_cast<const int32_t*>(small + layout.dispatch_small.ids(slot));
  message.arrived.window_weights = reinterpret_cast<const float*>(small + layout.dispatch_small.weights(slot));
  message.seq = box.seq.accepted;
  message.first_row = received.num_rows;
  const uint64_t from = uint64_t{received.num_rows} * layout.top_k;
  const RecvResult result = take_ids(message.arrived, layout.top_k, view.shape.num_experts, view.expert_idx,
                                     view.idxs + from, view.row_weights + from);
  box.is_pending = false;
  if (result.error == RecvError::kNotHosted) {
    answer_empty(exec, view.inbox, peer_idx, slot, kRefusedRows, static_cast<uint32_t>(result.value));
    ++received.num_answered;
    return false;
  }
  if (result.error != RecvError::kNone) {
    const Breach breach = result.error == RecvError::kWeight ? Breach::kWeight : Breach::kIdRange;
    received.violation = {breach, peer_idx, slot, result.row, result.value};
    received.violation_layer = box.header.layer;
    return false;
  }
  received.num_pairs +=
      count_pairs(view.idxs + from, message.arrived.num_rows, layout.top_k, view.slots[slot].lists.expert_offsets);
  view.slots[slot].messages[received.num_messages] = message;
  view.arrived[received.num_messages] = message.arrived;
  verb.ranks[received.num_messages] = view.inbox.peers.entries[peer_idx].rank;
  ++received.num_messages;
  received.num_rows += message.arrived.num_rows;
  return true;
}

// Takes all messages of (layer, microbatch) and builds the index lists. A message that breaks the protocol ends it:
// those taken before stay pending.
template <class Exec>
M2N_HD void collect(Exec& exec, const ReceiveVerb& verb, uint32_t layer, uint32_t microbatch) {
  const ExpertView& view = verb.view;
  Received& received = *verb.received;
  const SlotLists& slot = view.slots[microbatch];
  for (uint32_t e = 0; e <= view.num_local_experts; ++e) slot.lists.expert_offsets[e] = 0;
  received.num_messages = received.num_rows = received.num_pairs = 0;
  for (uint32_t peer_idx = 0; peer_idx < view.inbox.peers.size(); ++peer_idx) {
    if (belongs(view.inbox, verb.wanted, layer, microbatch, peer_idx)) take_message(exec, verb, peer_idx, microbatch);
    if (received.violation.breach == Breach::kNone) continue;
    for (uint32_t i = 0; i < received.num_messages; ++i) {
      view.inbox.at(slot.messages[i].arrived.peer_idx, microbatch).is_pending = true;
    }
    return;
  }
  if (received.num_messages == 0) return;  // all of them were refused
  received.is_batch = true;
  received.layer = layer;
  received.microbatch = microbatch;
  dispatch_recv(view.inbox.layout, view.arrived, received.num_messages, view.idxs, view.row_weights,
                view.num_local_experts, view.next, slot.lists);
}

// One look; true when there is something to tell.
template <class Exec>
M2N_HD bool look_around(Exec& exec, const ReceiveVerb& verb) {
  Received& received = *verb.received;
  const Scanned scanned = scan(exec, verb.view.inbox);
  received.num_arrived += scanned.num_arrived;
  received.num_answered += scanned.num_answered;
  if (scanned.violation.breach != Breach::kNone) {
    received.violation = scanned.violation;
    return true;
  }
  const auto clock = [&] { return exec.now_ns(); };
  if (scanned.num_arrived != 0) stamp(verb.view.inbox, clock());
  while (true) {
    const Found found = find_complete(verb.view.inbox, verb.wanted, clock);
    received.is_started = found.is_started;
    if (!found.is_complete) return false;
    if (verb.is_peek) {
      received.is_batch = true;
      received.layer = found.layer;
      received.microbatch = found.microbatch;
      return true;
    }
    collect(exec, verb, found.layer, found.microbatch);
    if (received.is_batch || received.violation.breach != Breach::kNone) return true;
    // All its messages were refused: the next one.
  }
}

// Receiving is serial: one thread of one block.
template <class Exec>
M2N_HD void run(Exec& exec, const ReceiveVerb& verb) {
  if (exec.block() != 0 || !is_leader(exec)) return;
  *verb.received = Received{};
  wait_for(exec, verb.view.control, verb.timeout_ns, [&](bool) { return look_around(exec, verb); });
  verb.received->missing_rank = missing_rank(verb.view.inbox, verb.wanted);
}

struct CombineSendVerb {
  ExpertView view;
  uint32_t slot;
  uint32_t layer;
  uint32_t num_messages;
  const unsigned char* y;
  uint64_t y_stride_bytes;
  DType y_dtype;
  bool is_reduced;
};

template <class Exec>
M2N_HD void run(Exec& exec, const CombineSendVerb& verb) {
  const ExpertView& view = verb.view;
  const SlotLists& slot = view.slots[verb.slot];
  for (uint32_t i = 0; i < verb.num_messages; ++i) {
    const BatchMessage& message = slot.messages[i];
    const uint32_t peer_idx = message.arrived.peer_idx;
    // Before the signal, which this block helps to ring: the answer may bring the next message at once.
    if (exec.block() == 0 && is_leader(exec)) view.inbox.at(peer_idx, verb.slot).seq.replied = message.seq;
    CombineSend send{};
    send.peer = view.inbox.peers.entries[peer_idx].view;
    send.slot = verb.slot;
    send.seq = message.seq;
    send.header.layer = verb.layer;
    send.header.microbatch = verb.slot;
    send.first_row = message.first_row;
    send.num_rows = message.arrived.num_rows;
    const int32_t* pair_begin = slot.lists.pair_begin + message.first_row;
    send.header.num_rows = view.shape.reduce_at == ReduceAt::kExpert
                               ? send.num_rows
                               : static_cast<uint32_t>(pair_begin[send.num_rows] - pair_begin[0]);
    send.y = verb.y;
    send.y_stride_bytes = verb.y_stride_bytes;
    send.y_dtype = verb.y_dtype;
    send.is_reduced = verb.is_reduced;
    send.pair_begin = slot.lists.pair_begin;
    send.pair_position = slot.lists.pair_position;
    send.weights = slot.lists.weights;
    send.arrivals = view.arrivals + uint64_t{verb.slot} * view.max_peers + peer_idx;
    combine_send(exec, view.inbox.layout, view.shape, send);
  }
}

}  // namespace m2n
