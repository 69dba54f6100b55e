// SPDX-License-Identifier: Apache-2.0
// The verbs of an expert rank as a device runs them: one launch each, with all state in memory that the launches
// share. Lists of a batch have fixed addresses per slot. A launch carries one of the structs below.
#pragma once

#include <cstdint>

#include "exchange/bodies/combine.h"
#include "exchange/bodies/dispatch.h"
#include "exchange/bodies/inbox.h"
#include "exchange/device/verbs/collect.h"
#include "exchange/device/verbs/stream_wait.h"
#include "exchange/device/verbs/wait.h"
#include "exchange/rows/layout.h"

namespace m2n {

// What a receive found, in host memory.
struct Received {
  bool is_batch;    // a batch was taken; else nothing was complete in time
  bool is_started;  // not complete, but at least one message that matches waits
  uint32_t layer;
  uint32_t microbatch;
  uint32_t num_messages;
  uint32_t num_rows;
  uint32_t num_pairs;
  int32_t missing_rank;  // strict: the first listed rank that has not sent, or -1
  Violation violation;
  uint32_t violation_layer;
};

struct ReceiveVerb {
  ExpertView view;
  Wanted wanted;
  bool is_peek;  // only says what is ready
  int64_t timeout_ns;
  Received* received;
  uint32_t* ranks;      // host memory [max_peers]: of the attention ranks, message by message
  uint64_t* is_unread;  // host memory: set where nothing was received; nullptr: the host reads `received` anyway
  uint32_t* versions = nullptr;  // host memory [max_peers]: the placement versions that peers have shown
  StreamWait stream_wait = {};
};

// All threads look for new messages, a message each. False: one of them breaks the protocol, which a second, serial
// look names.
template <class Exec>
M2N_HD bool scan_together(Exec& exec, const ExpertView& view, bool is_long) {
  const InboxView& inbox = view.inbox;
  Scanned scanned;
  bool is_broken = false;
  const uint32_t num_signals = inbox.peers.size() * inbox.layout.num_slots;
  for (uint32_t i = exec.thread(); i < num_signals; i += exec.num_threads()) {
    const uint32_t peer_idx = i / inbox.layout.num_slots;
    const uint32_t slot = i - peer_idx * inbox.layout.num_slots;
    if (is_long && slot == 0) view.peers.refresh(peer_idx);
    const PeerState state = inbox.peers.state(peer_idx);
    if (state == PeerState::kUnused) continue;  // there may be no memory at this index just now
    const uint32_t num_before = scanned.num_arrived;
    is_broken |= look_at(exec, inbox, peer_idx, slot, state, &scanned).breach != Breach::kNone;
    if (scanned.num_arrived != num_before) inbox.at(peer_idx, slot).seen_ns = exec.now_ns();
  }
  if (scanned.num_arrived != 0) {
    add_relaxed(&view.counters->messages_received, uint64_t{scanned.num_arrived});
    add_relaxed(&view.counters->messages_sent, uint64_t{scanned.num_answered});
  }
  return !exec.any(is_broken);
}

// What the leader decides after a look, for all threads.
enum class Next : uint32_t { kLookAgain, kCollect, kTell };

// Slots whose batch is still being served are not looked at: its lists are in use.
M2N_HD inline uint64_t find_open_slots(const ReceiveVerb& verb) {
  uint64_t open_slots = 0;
  for (uint32_t slot = 0; slot < verb.view.inbox.layout.num_slots; ++slot) {
    if (!verb.wanted.is_any_microbatch && slot != verb.wanted.microbatch) continue;
    if (load_acquire(&verb.view.slots[slot].state->is_open) != 0) open_slots |= uint64_t{1} << slot;  // SYNC: slot-open
  }
  return open_slots;
}

template <class Exec>
M2N_HD Next choose_next(Exec& exec, const ReceiveVerb& verb, Received& received) {
  const InboxView& inbox = verb.view.inbox;
  const auto clock = [&] { return exec.now_ns(); };
  Wanted wanted = verb.wanted;
  wanted.open_slots = find_open_slots(verb);
  const Found found = find_complete(inbox, wanted, clock);
  received.is_started = found.is_started;
  received.layer = found.layer;
  received.microbatch = found.microbatch;
  if (!found.is_complete) return Next::kLookAgain;
  received.is_batch = verb.is_peek;
  return verb.is_peek ? Next::kTell : Next::kCollect;
}

// One look by all threads; true when there is something to tell. `received` is the leader's.
template <class Exec>
M2N_HD bool look_around(Exec& exec, const ReceiveVerb& verb, bool is_long, Received& received) {
  const ExpertView& view = verb.view;
  uint32_t* shared = exec.shared();
  if (!scan_together(exec, view, is_long)) {
    if (is_leader(exec)) received.violation = scan(exec, view.inbox).violation;
    return true;
  }
  while (true) {
    if (is_leader(exec)) {
      shared[0] = static_cast<uint32_t>(choose_next(exec, verb, received));
      shared[1] = received.layer;
      shared[2] = received.microbatch;
    }
    exec.sync();
    const Next next = static_cast<Next>(shared[0]);
    const uint32_t layer = shared[1], microbatch = shared[2];
    exec.sync();
    if (next != Next::kCollect) return next == Next::kTell;
    const Collected collected = collect(exec, view, verb.wanted, layer, microbatch, verb.ranks);
    if (collected.violation.breach == Breach::kNone && collected.num_messages == 0) continue;  // all were refused
    if (is_leader(exec)) {
      received.is_batch = collected.violation.breach == Breach::kNone;
      received.num_messages = collected.num_messages;
      received.num_rows = collected.num_rows;
      received.num_pairs = collected.num_pairs;
      received.violation = collected.violation;
      received.violation_layer = layer;
    }
    return true;
  }
}

// No batch: lists without a row, so that what follows in the stream does nothing.
template <class Exec>
M2N_HD void leave_empty(Exec& exec, const ExpertView& view, uint32_t microbatch) {
  const SlotLists& slot = view.slots[microbatch];
  for (uint32_t e = exec.thread(); e <= view.num_local_experts; e += exec.num_threads())
    slot.lists.expert_offsets[e] = 0;
  if (!is_leader(exec)) return;
  slot.state->num_messages = slot.state->num_rows = slot.state->num_pairs = 0;
  slot.lists.pair_begin[0] = 0;
}

// By all threads, a peer each.
template <class Exec>
M2N_HD void tell_versions(Exec& exec, const InboxView& inbox, uint32_t* versions) {
  exec.sync();  // behind the looks
  for (uint32_t i = exec.thread(); i < inbox.peers.size(); i += exec.num_threads()) {
    versions[i] = shown_version(inbox, i);
  }
}

// By all threads, a message of the batch each.
template <class Exec>
M2N_HD void tell_taken(Exec& exec, const ReceiveVerb& verb) {
  tell_round(exec, verb.stream_wait);  // behind the looks, too
  const SlotLists& slot = verb.view.slots[verb.wanted.microbatch];
  for (uint32_t i = exec.thread(); i < slot.state->num_messages; i += exec.num_threads()) {
    tell_seq(verb.stream_wait, slot.messages[i].arrived.peer_idx, slot.messages[i].seq);
  }
}

// For one block. All its threads look together, and its leader says when to stop.
template <class Exec>
M2N_HD void run(Exec& exec, const ReceiveVerb& verb) {
  const Control* control = verb.view.control;
  Received received{};
  bool is_told = look_around(exec, verb, /*is_long=*/false, received);
  const int64_t began_ns = exec.now_ns();
  const int64_t wait_ns = is_told || is_over(verb.stream_wait) ? 0 : read_timeout(control, verb.timeout_ns);
  bool is_last = false;
  for (uint32_t i = 1; !is_told && !is_last; ++i) {
    exec.pause();
    const bool is_long = i % kLooksPerLong == 0;
    // Before the look: the last one comes after the end.
    const bool is_late = is_leader(exec) && exec.now_ns() - began_ns >= wait_ns;
    is_last = exec.any(is_late || (is_long && load_acquire(&control->abort) != 0));  // SYNC: verb-abort
    is_told = look_around(exec, verb, is_long || is_last, received);
  }
  if (verb.is_unread != nullptr && !is_told) leave_empty(exec, verb.view, verb.wanted.microbatch);
  if (verb.versions != nullptr) tell_versions(exec, verb.view.inbox, verb.versions);
  if (verb.stream_wait.words != nullptr) tell_taken(exec, verb);
  if (!is_leader(exec) || (verb.is_unread != nullptr && received.is_batch)) return;
  received.missing_rank = missing_rank(verb.view.inbox, verb.wanted);
  *verb.received = received;
  if (verb.is_unread != nullptr) store_release(verb.is_unread, uint64_t{1});  // SYNC: receive-status
}

struct CombineSendVerb {
  ExpertView view;
  SlotLists lists;  // of the slot
  uint32_t slot;
  const unsigned char* y;
  uint64_t y_stride_bytes;
  DType y_dtype;
  bool is_reduced;
};

// The reply to one message, read once per block.
struct Reply {
  PeerView peer;
  uint32_t first_row;
  uint32_t num_rows;
};
static_assert(sizeof(Reply) <= shared_words(1) * sizeof(uint32_t) - shared_words(0) * sizeof(uint32_t));

M2N_HD inline CombineSend rows_of(const CombineSendVerb& verb, const Reply& reply) {
  const BatchView& lists = verb.lists.lists;
  CombineSend send{};
  send.peer = reply.peer;
  send.slot = verb.slot;
  send.y = verb.y;
  send.y_stride_bytes = verb.y_stride_bytes;
  send.y_dtype = verb.y_dtype;
  send.is_reduced = verb.is_reduced;
  send.pair_begin = lists.pair_begin;
  send.pair_position = lists.pair_position;
  send.weights = lists.weights;
  choose_rows(send, verb.view.shape.reduce_at, reply.first_row, reply.num_rows);
  return send;
}

// By one thread, once all rows are written.
template <class Exec>
M2N_HD void finish_reply(Exec& exec, const CombineSendVerb& verb, const BatchMessage& message, const Reply& reply) {
  const ExpertView& view = verb.view;
  Header header{};
  header.layer = verb.lists.state->layer;
  header.microbatch = verb.slot;
  header.num_rows = rows_of(verb, reply).header.num_rows;
  // Before the signal, which may bring the next message at once.
  view.inbox.at(message.arrived.peer_idx, verb.slot).seq.replied = message.seq;
  ring(exec, reply.peer, view.inbox.layout.combine_meta, verb.slot, message.seq, header);
  add_relaxed(&view.counters->messages_sent, uint64_t{1});
  add_relaxed(&view.counters->rows_sent, uint64_t{header.num_rows});
}

// All blocks write rows; the last one to arrive rings every peer, a thread each, and gives the slot's lists back.
template <class In, class Out, class Exec>
M2N_HD void run_as(Exec& exec, const CombineSendVerb& verb) {
  const ExpertView& view = verb.view;
  BatchState& state = *verb.lists.state;
  const uint32_t num_messages = state.num_messages;
  auto* replies = reinterpret_cast<Reply*>(exec.shared());
  for (uint32_t i = exec.thread(); i < num_messages; i += exec.num_threads()) {
    const BatchMessage& message = verb.lists.messages[i];
    replies[i] = {view.inbox.peers.entries[message.arrived.peer_idx].view, message.first_row, message.arrived.num_rows};
  }
  exec.sync();
  PutDeal deal = deal_put(exec, state.num_pairs * view.inbox.layout.combine_rows.row_bytes);
  for (uint32_t i = 0; i < num_messages; ++i) {
    put_combine_as<In, Out>(exec, view.inbox.layout, view.shape, rows_of(verb, replies[i]), deal);
  }
  if (!exec.any(arrive(exec, &state.arrivals))) return;
  for (uint32_t i = exec.thread(); i < num_messages; i += exec.num_threads()) {
    finish_reply(exec, verb, verb.lists.messages[i], replies[i]);
  }
  exec.sync();
  if (!is_leader(exec)) return;
  state.num_messages = 0;
  store_release(&state.is_open, 0u);  // SYNC: slot-open
}

}  // namespace m2n
