// SPDX-License-Identifier: Apache-2.0
// The verbs of an attention rank as a device runs them: one launch each, or two, by several blocks, with all state in
// memory that the launches share. A launch carries one of the structs below.
#pragma once

#include <cstdint>

#include "core/arrive.h"
#include "exchange/bodies/combine.h"
#include "exchange/bodies/dispatch.h"
#include "exchange/bodies/outbox.h"
#include "exchange/device/verbs/stream_wait.h"
#include "exchange/device/verbs/wait.h"
#include "exchange/rows/layout.h"
#include "exchange/rows/route.h"

namespace m2n {

struct SlotState {
  Gate gate;
  uint32_t is_failed;  // its dispatch_send gave up: nothing was sent, so nothing is owed
  uint32_t is_late;    // the last combine_recv did not see every reply: nothing was consumed
  uint32_t layer;      // of what its dispatch_send sent
};

struct AttentionView : OutboxView {
  uint32_t max_peers;
  uint32_t placement_version;  // which every message tells
  Peers peers;
  const unsigned char* rows;  // our own window of reply rows
  SlotState* slots;           // [slot]
  int32_t* peers_of_ranks;    // [slot][max_peers]: to whom dispatch_send sent; -1: nobody
  int32_t* sources_of_ranks;  // [slot][max_peers]: whose reply combine_recv may read; -1: there is none
  const uint32_t* hosts;      // [num_ranks]: not 0: the rank hosts something
  uint32_t num_ranks;
  const Control* control;
  uint64_t* status;  // [peer], host memory
  Counters* counters;

  M2N_HD int32_t* peer_of_rank(uint32_t slot) const { return peers_of_ranks + uint64_t{slot} * max_peers; }
  M2N_HD int32_t* source_of_rank(uint32_t slot) const { return sources_of_ranks + uint64_t{slot} * max_peers; }
};

struct DispatchVerb {
  AttentionView view;
  RouteView route;  // num_tokens 0: an empty message to every rank
  const unsigned char* x;
  uint64_t x_stride_bytes;
  DType x_dtype;  // see DispatchSend
  uint32_t slot;
  uint32_t layer;
  uint32_t flags;
  uint32_t first_rank;  // each attention rank starts with another peer
  int64_t timeout_ns;
};

inline constexpr uint32_t kGo = 1, kGiveUp = 2;  // verdicts

M2N_HD inline bool is_awaited(const DispatchVerb& verb, uint32_t peer_idx) {
  const uint32_t rank = verb.view.peers.table.entries[peer_idx].rank;
  return is_awaited(rank < verb.view.num_ranks && verb.view.hosts[rank] != 0, &verb.route, rank);
}

// One thread waits until a peer has answered the last message on the slot. False: it has not.
template <class Exec>
M2N_HD bool free_slot_of_peer(Exec& exec, const DispatchVerb& verb, uint32_t peer_idx) {
  const AttentionView& view = verb.view;
  SendSeq& seq = view.seq(peer_idx, verb.slot);
  if (!seq.awaits_reply()) return true;
  const auto is_free = [&](bool is_long) {
    return look_for_credit(view, peer_idx, verb.slot, is_long) != Look::kPending;
  };
  if (seq.reply_rows == 0 && !is_free(false) && !is_awaited(verb, peer_idx)) return true;
  const bool is_answered =
      wait_for(exec, &view.control->abort, [&] { return read_timeout(view.control, verb.timeout_ns); }, is_free);
  if (look_for_reply(view, peer_idx, verb.slot, false) == Look::kViolation) {
    const uint32_t seen = signal_seq(poll_signal(view.signal_of(peer_idx, verb.slot)));
    report(view.status + peer_idx, Status{Trouble::kViolation, Verb::kDispatchSend, verb.slot, seen});
  }
  if (is_answered) {
    seq.consume();
  } else {
    report(view.status + peer_idx, Status{Trouble::kTimeout, Verb::kDispatchSend, verb.slot, 0});
  }
  return is_answered;
}

// Whom the rows for a rank go to: -1 where it is gone, which is told if there are any.
M2N_HD inline int32_t choose_peer(const DispatchVerb& verb, uint32_t rank) {
  const AttentionView& view = verb.view;
  // Relaxed: the peer's state is written behind its view, and read with acquire.
  const int32_t peer_idx = load_relaxed(&view.peers.newest[rank]);  // SYNC: peer-mirror
  if (peer_idx == kNone) return kNone;
  if (view.peers.table.is_live(static_cast<uint32_t>(peer_idx))) {
    // Whoever has not answered yet hosts nothing, and gets no rows.
    return view.seq(static_cast<uint32_t>(peer_idx), verb.slot).awaits_reply() ? kNone : peer_idx;
  }
  if (rows_for(verb.route, rank) != 0) {
    report(view.status + peer_idx, Status{Trouble::kGone, Verb::kDispatchSend, verb.slot, 0});
  }
  return kNone;
}

// By the threads of one block: waits until the slot is free; then notes whom this dispatch goes to.
template <class Exec>
M2N_HD uint32_t begin_dispatch(Exec& exec, const DispatchVerb& verb) {
  const AttentionView& view = verb.view;
  const uint32_t num_peers = view.peers.table.size();
  bool is_late = false;
  for (uint32_t i = exec.thread(); i < num_peers; i += exec.num_threads()) {
    is_late |= !free_slot_of_peer(exec, verb, i);
  }
  const bool is_failed = exec.any(is_late);
  if (is_leader(exec)) {
    view.slots[verb.slot].is_failed = is_failed;
    view.slots[verb.slot].layer = verb.layer;
  }
  for (uint32_t rank = exec.thread(); rank < verb.route.num_ranks; rank += exec.num_threads()) {
    view.peer_of_rank(verb.slot)[rank] = is_failed ? kNone : choose_peer(verb, rank);
  }
  return is_failed ? kGiveUp : kGo;
}

// What one rank gets, read once per block.
struct Target {
  PeerView peer;
  int32_t peer_idx;  // -1: it gets nothing
  uint32_t first_row;
  uint32_t num_rows;
};
static_assert(sizeof(Target) <= shared_words(1) * sizeof(uint32_t) - shared_words(0) * sizeof(uint32_t));

// By the threads of a block, a rank each. What does not depend on the verdict is read while block 0 waits.
template <class Exec>
M2N_HD void find_rows(const Exec& exec, const RouteView& route, Target* targets) {
  for (uint32_t rank = exec.thread(); rank < route.num_ranks; rank += exec.num_threads()) {
    targets[rank].first_row = route.row_offsets[rank];
    targets[rank].num_rows = rows_for(route, rank);
  }
}
template <class Exec>
M2N_HD void find_peers(Exec& exec, const DispatchVerb& verb, Target* targets) {
  for (uint32_t rank = exec.thread(); rank < verb.route.num_ranks; rank += exec.num_threads()) {
    const int32_t peer_idx = verb.view.peer_of_rank(verb.slot)[rank];
    targets[rank].peer_idx = peer_idx;
    if (peer_idx != kNone) targets[rank].peer = verb.view.peers.table.entries[peer_idx].view;
  }
  exec.sync();
}

// By all threads, their share of all rows. In: as of put_dispatch.
template <class In, class Exec>
M2N_HD void put_to_ranks(Exec& exec, const DispatchVerb& verb, const Target* targets) {
  const uint32_t num_ranks = verb.route.num_ranks;
  const Target& last = targets[num_ranks - 1];
  const uint64_t num_rows = last.first_row + last.num_rows;
  PutDeal deal = deal_put(exec, num_rows * verb.view.layout.dispatch_rows.row_bytes);
  DispatchSend send{};
  send.slot = verb.slot;
  send.x = verb.x;
  send.x_stride_bytes = verb.x_stride_bytes;
  for (uint32_t i = 0; i < num_ranks; ++i) {
    const Target& target = targets[(verb.first_rank + i) % num_ranks];
    if (target.num_rows == 0 || target.peer_idx == kNone) continue;
    send.peer = target.peer;
    choose_rows(send, verb.route, verb.view.shape.top_k, target.first_row, target.num_rows);
    put_dispatch<In>(exec, verb.view.layout, verb.view.shape, send, deal);
  }
}

// By one thread, once all rows are written: tells a peer, and notes what it owes.
template <class Exec>
M2N_HD void finish_message(Exec& exec, const DispatchVerb& verb, uint32_t rank, const Target& target) {
  const AttentionView& view = verb.view;
  SendSeq& seq = view.seq(static_cast<uint32_t>(target.peer_idx), verb.slot);
  Header header{};
  header.layer = verb.layer;
  header.microbatch = verb.slot;
  header.placement_version = view.placement_version;
  header.flags = verb.flags;
  header.num_rows = target.num_rows;
  ++seq.sent;
  seq.reply_rows = reply_rows_for(view.shape, verb.route, rank);
  ring(exec, target.peer, view.layout.dispatch_meta, verb.slot, seq.sent, header);
  add_relaxed(&view.counters->messages_sent, uint64_t{1});
  add_relaxed(&view.counters->rows_sent, uint64_t{header.num_rows});
}

// All blocks write rows; the last one to arrive rings every peer, a thread each.
template <class In, class Exec>
M2N_HD void run_as(Exec& exec, const DispatchVerb& verb) {
  Gate* gate = &verb.view.slots[verb.slot].gate;
  auto* targets = reinterpret_cast<Target*>(exec.shared());
  find_rows(exec, verb.route, targets);
  const uint32_t verdict = decide(exec, gate, [&] { return begin_dispatch(exec, verb); });
  if (verdict == kGo) {
    find_peers(exec, verb, targets);
    put_to_ranks<In>(exec, verb, targets);
  }
  if (!exec.any(leave(exec, gate)) || verdict != kGo) return;
  for (uint32_t rank = exec.thread(); rank < verb.route.num_ranks; rank += exec.num_threads()) {
    if (targets[rank].peer_idx != kNone) finish_message(exec, verb, rank, targets[rank]);
  }
}

// Rows that travel as they are.
template <class Exec>
M2N_HD void run(Exec& exec, const DispatchVerb& verb) {
  run_as<void>(exec, verb);
}

// combine_recv is two launches, so that only one block spins: this one waits for every reply with rows, and notes which
// of them may be read.
struct AwaitVerb {
  AttentionView view;
  RouteView route;
  uint32_t slot;
  int64_t timeout_ns;
  StreamWait stream_wait = {};
  bool takes_nan = false;  // rows that will not come are no trouble
};

// The second one sums.
struct CombineRecvVerb {
  AttentionView view;
  RouteView route;
  unsigned char* y;
  uint64_t y_stride_bytes;
  uint32_t slot;
};

// What became of the reply that one peer owes; kNone: it may be read.
M2N_HD inline Status judge_reply(const AttentionView& view, uint32_t peer_idx, uint32_t slot, Look look) {
  const auto trouble = [&](Trouble kind, uint32_t detail) { return Status{kind, Verb::kCombineRecv, slot, detail}; };
  switch (look) {
    case Look::kPending:
      return trouble(Trouble::kTimeout, 0);
    case Look::kGone:
      return trouble(Trouble::kGone, 0);
    case Look::kViolation:
      return trouble(Trouble::kViolation, signal_seq(poll_signal(view.signal_of(peer_idx, slot))));
    case Look::kArrived:
      break;
  }
  const uint32_t layer = view.slots[slot].layer;
  const ArrivedReply reply = read_reply(view, peer_idx, slot, layer);
  switch (reply.fault) {
    case ReplyFault::kRefused:
      return trouble(Trouble::kRefused, reply.header.detail);
    case ReplyFault::kBatch:
      return trouble(Trouble::kWrongBatch, reply.header.layer != layer ? reply.header.layer : reply.header.microbatch);
    case ReplyFault::kNumRows:
      return trouble(Trouble::kViolation, reply.num_rows);
    case ReplyFault::kNone:
      add_relaxed(&view.counters->rows_received, uint64_t{reply.num_rows});
  }
  return trouble(Trouble::kNone, 0);
}

// One thread waits for the reply of one rank. True: it is late, and stays owed.
template <class Exec>
M2N_HD bool await_reply(Exec& exec, const AwaitVerb& verb, uint32_t rank) {
  const AttentionView& view = verb.view;
  const auto peer_idx = static_cast<uint32_t>(view.peer_of_rank(verb.slot)[rank]);
  Look look = Look::kPending;
  const auto is_told = [&](bool is_long) {
    look = look_for_reply(view, peer_idx, verb.slot, is_long);
    return look != Look::kPending;
  };
  const auto timeout_ns = [&] { return is_over(verb.stream_wait) ? 0 : read_timeout(view.control, verb.timeout_ns); };
  wait_for(exec, &view.control->abort, timeout_ns, is_told);
  const Status status = judge_reply(view, peer_idx, verb.slot, look);
  if (status.trouble == Trouble::kNone) {
    view.source_of_rank(verb.slot)[rank] = static_cast<int32_t>(peer_idx);
    add_relaxed(&view.counters->messages_received, uint64_t{1});
  } else if (status.trouble != Trouble::kGone || !verb.takes_nan) {
    report(view.status + peer_idx, status);
  }
  if (look == Look::kGone) view.peers.refresh(peer_idx);
  return status.trouble == Trouble::kTimeout;
}

// For one block.
template <class Exec>
M2N_HD void run(Exec& exec, const AwaitVerb& verb) {
  const AttentionView& view = verb.view;
  SlotState& slot = view.slots[verb.slot];
  bool is_late = slot.is_failed != 0;
  for (uint32_t rank = exec.thread(); rank < verb.route.num_ranks; rank += exec.num_threads()) {
    view.source_of_rank(verb.slot)[rank] = kNone;
    if (slot.is_failed == 0 && owes_rows(verb.route, view.peer_of_rank(verb.slot), rank))
      is_late |= await_reply(exec, verb, rank);
  }
  const bool is_any_late = exec.any(is_late);
  if (is_leader(exec)) slot.is_late = is_any_late;
  if (verb.stream_wait.words == nullptr) return;
  tell_round(exec, verb.stream_wait);
  for (uint32_t i = exec.thread(); i < view.peers.table.size(); i += exec.num_threads()) {
    tell_seq(verb.stream_wait, i, view.seq(i, verb.slot).sent);
  }
}

// Rows of T: a kernel holds the code of one type.
template <class T, class Exec>
M2N_HD void run_as(Exec& exec, const CombineRecvVerb& verb) {
  const AttentionView& view = verb.view;
  SlotState& slot = view.slots[verb.slot];
  CombineRecv recv{};
  recv.slot = verb.slot;
  recv.route = verb.route;
  recv.window = view.rows;
  recv.peer_of_rank = view.source_of_rank(verb.slot);
  recv.y = verb.y;
  recv.y_stride_bytes = verb.y_stride_bytes;
  combine_recv_as<T>(exec, view.layout, view.shape, recv);
  if (!exec.any(arrive(exec, &slot.gate.arrivals)) || slot.is_late != 0) return;
  for (uint32_t rank = exec.thread(); rank < verb.route.num_ranks; rank += exec.num_threads()) {
    if (!owes_rows(verb.route, view.peer_of_rank(verb.slot), rank)) continue;
    SendSeq& seq = view.seq(static_cast<uint32_t>(view.peer_of_rank(verb.slot)[rank]), verb.slot);
    seq.consume();
  }
}

// Is a reply with rows still to come?
M2N_HD inline bool is_any_pending(const AttentionView& view, const RouteView& route, uint32_t slot, bool is_long) {
  for (uint32_t rank = 0; rank < route.num_ranks; ++rank) {
    if (!owes_rows(route, view.peer_of_rank(slot), rank)) continue;
    const auto peer_idx = static_cast<uint32_t>(view.peer_of_rank(slot)[rank]);
    if (look_for_reply(view, peer_idx, slot, is_long) == Look::kPending) return true;
  }
  return false;
}

// The host asks which microbatch can be combined without waiting. For one thread.
struct PollVerb {
  AttentionView view;
  const RouteView* routes;       // [slot], host memory
  const uint32_t* microbatches;  // [count], host memory
  uint32_t count;
  int64_t timeout_ns;
  int32_t* found;  // host memory: a position in `microbatches`, or -1
};

template <class Exec>
M2N_HD void run(Exec& exec, const PollVerb& verb) {
  if (exec.block() != 0 || !is_leader(exec)) return;
  *verb.found = kNone;
  const auto is_any_ready = [&](bool is_long) {
    for (uint32_t i = 0; i < verb.count && *verb.found == kNone; ++i) {
      const uint32_t slot = verb.microbatches[i];
      const bool is_ready =
          verb.view.slots[slot].is_failed || !is_any_pending(verb.view, verb.routes[slot], slot, is_long);
      if (is_ready) *verb.found = static_cast<int32_t>(i);
    }
    return *verb.found != kNone;
  };
  wait_for(exec, &verb.view.control->abort, [&] { return verb.timeout_ns; }, is_any_ready);
}

}  // namespace m2n
