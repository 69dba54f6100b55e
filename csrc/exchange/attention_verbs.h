// SPDX-License-Identifier: Apache-2.0
// The verbs of an attention rank as a device runs them: one launch each, by several blocks, with all state in memory
// that the launches share. A launch carries one of the structs below.
#pragma once

#include <cstdint>

#include "core/arrive.h"
#include "exchange/combine.h"
#include "exchange/device_wait.h"
#include "exchange/dispatch.h"
#include "exchange/layout.h"
#include "exchange/route.h"

namespace m2n {

struct SlotState {
  Gate gate;
  uint32_t is_failed;  // its dispatch_send gave up: nothing was sent, so nothing is owed
};

struct AttentionView {
  Layout layout;
  Shape shape;
  uint32_t max_peers;
  PeerTable peers;
  const unsigned char* rows;   // our own window of reply rows
  const unsigned char* small;  // and of their signals and headers, by peer index
  SendSeq* seqs;               // [peer][slot]
  SlotState* slots;            // [slot]
  int32_t* peers_of_ranks;     // [slot][max_peers]: to whom dispatch_send sent; -1: nobody
  int32_t* sources_of_ranks;   // [slot][max_peers]: whose reply combine_recv may read; -1: there is none
  uint32_t* arrivals;          // [slot][max_peers]: blocks that have written their part of a message
  const Control* control;
  uint64_t* status;  // [peer]

  M2N_HD SendSeq& seq(uint32_t peer_idx, uint32_t slot) const { return seqs[peer_idx * layout.num_slots + slot]; }
  M2N_HD int32_t* peer_of_rank(uint32_t slot) const { return peers_of_ranks + uint64_t{slot} * max_peers; }
  M2N_HD int32_t* source_of_rank(uint32_t slot) const { return sources_of_ranks + uint64_t{slot} * max_peers; }
  M2N_HD const unsigned char* small_of(uint32_t peer_idx) const {
    return small + peer_idx * layout.combine_small.object_bytes;
  }
  M2N_HD const Signal* signal_of(uint32_t peer_idx, uint32_t slot) const {
    return reinterpret_cast<const Signal*>(small_of(peer_idx) + layout.combine_small.signal(slot));
  }
};

// One look for the reply to the last message. The peer's state is read only where `is_long`.
M2N_HD inline Look look_for_reply(const AttentionView& view, uint32_t peer_idx, uint32_t slot, bool is_long) {
  const auto is_live = [&] { return !is_long || view.peers.is_live(peer_idx); };
  return look_for(view.signal_of(peer_idx, slot), view.seq(peer_idx, slot).sent - 1, is_live);
}

struct DispatchVerb {
  AttentionView view;
  RouteView route;  // num_tokens 0: an empty message to every rank
  const unsigned char* x;
  uint64_t x_stride_bytes;
  uint32_t slot;
  uint32_t layer;
  uint32_t flags;
  uint32_t first_rank;  // each attention rank starts with another peer
  int64_t timeout_ns;
};

inline constexpr uint32_t kGo = 1, kGiveUp = 2;  // verdicts

// Does a peer still owe the reply to the last message on this slot? That to an empty one is taken here.
M2N_HD inline bool owes_reply(const AttentionView& view, uint32_t peer_idx, uint32_t slot, bool is_long) {
  const SendSeq& seq = view.seq(peer_idx, slot);
  if (!seq.awaits_reply()) return false;
  const Look look = look_for_reply(view, peer_idx, slot, is_long);
  if (look == Look::kGone) return false;
  return look == Look::kPending || seq.reply_rows != 0;
}

// Waits until the slot is free; then notes whom this dispatch goes to.
template <class Exec>
M2N_HD uint32_t begin_dispatch(Exec& exec, const DispatchVerb& verb) {
  const AttentionView& view = verb.view;
  const uint32_t num_peers = view.peers.size();
  const auto is_free = [&](bool is_long) {
    for (uint32_t i = 0; i < num_peers; ++i) {
      if (owes_reply(view, i, verb.slot, is_long)) return false;
    }
    return true;
  };
  SlotState& slot = view.slots[verb.slot];
  slot.is_failed = !wait_for(exec, view.control, verb.timeout_ns, is_free);
  for (uint32_t i = 0; i < num_peers; ++i) {
    if (view.seq(i, verb.slot).awaits_reply() && look_for_reply(view, i, verb.slot, false) == Look::kViolation) {
      const uint32_t seen = signal_seq(poll_signal(view.signal_of(i, verb.slot)));
      report(view.status + i, {Trouble::kViolation, Verb::kDispatchSend, verb.slot, seen});
    }
    if (!owes_reply(view, i, verb.slot, true)) {
      view.seq(i, verb.slot).consumed = view.seq(i, verb.slot).sent;
    } else {
      report(view.status + i, {Trouble::kTimeout, Verb::kDispatchSend, verb.slot, 0});
    }
  }
  for (uint32_t rank = 0; rank < verb.route.num_ranks; ++rank) {
    view.peer_of_rank(verb.slot)[rank] = slot.is_failed ? kNone : view.peers.find(rank);
  }
  return slot.is_failed ? kGiveUp : kGo;
}

M2N_HD inline uint32_t rows_for(const RouteView& route, uint32_t rank) {
  return route.row_offsets[rank + 1] - route.row_offsets[rank];
}

template <class Exec>
M2N_HD void send_to_rank(Exec& exec, const DispatchVerb& verb, uint32_t rank) {
  const AttentionView& view = verb.view;
  const int32_t peer_idx = view.peer_of_rank(verb.slot)[rank];
  if (peer_idx == kNone) return;
  const uint64_t first = verb.route.row_offsets[rank];
  DispatchSend send{};
  send.peer = view.peers.entries[peer_idx].view;
  send.slot = verb.slot;
  send.seq = view.seq(peer_idx, verb.slot).sent + 1;
  send.header.layer = verb.layer;
  send.header.microbatch = verb.slot;
  send.header.flags = verb.flags;
  send.header.num_rows = rows_for(verb.route, rank);
  send.x = verb.x;
  send.x_stride_bytes = verb.x_stride_bytes;
  send.token_of_row = verb.route.token_of_row + first;
  send.ids = verb.route.ids + first * view.shape.top_k;
  send.weights = verb.route.weights + first * view.shape.top_k;
  send.arrivals = view.arrivals + uint64_t{verb.slot} * view.max_peers + peer_idx;
  dispatch_send(exec, view.layout, send);
}

template <class Exec>
M2N_HD void run(Exec& exec, const DispatchVerb& verb) {
  const AttentionView& view = verb.view;
  Gate* gate = &view.slots[verb.slot].gate;
  const uint32_t verdict = decide(exec, gate, [&] { return begin_dispatch(exec, verb); });
  for (uint32_t i = 0; verdict == kGo && i < verb.route.num_ranks; ++i) {
    send_to_rank(exec, verb, (verb.first_rank + i) % verb.route.num_ranks);
  }
  if (!leave(exec, gate)) return;
  for (uint32_t rank = 0; rank < verb.route.num_ranks; ++rank) {
    const int32_t peer_idx = view.peer_of_rank(verb.slot)[rank];
    if (peer_idx == kNone) continue;
    SendSeq& seq = view.seq(peer_idx, verb.slot);
    ++seq.sent;
    seq.reply_rows =
        view.shape.reduce_at == ReduceAt::kExpert ? rows_for(verb.route, rank) : verb.route.pair_counts[rank];
  }
}

struct CombineRecvVerb {
  AttentionView view;
  RouteView route;
  unsigned char* y;
  uint64_t y_stride_bytes;
  uint32_t slot;
  int64_t timeout_ns;
};

// Is a reply with rows still to come?
M2N_HD inline bool is_any_pending(const AttentionView& view, const RouteView& route, uint32_t slot, bool is_long) {
  for (uint32_t rank = 0; rank < route.num_ranks; ++rank) {
    const int32_t peer_idx = view.peer_of_rank(slot)[rank];
    if (peer_idx == kNone || rows_for(route, rank) == 0) continue;
    if (look_for_reply(view, peer_idx, slot, is_long) == Look::kPending) return true;
  }
  return false;
}

// What became of the reply that one peer owes; kNone: it may be read.
M2N_HD inline Status judge_reply(const AttentionView& view, uint32_t peer_idx, uint32_t slot) {
  const auto trouble = [&](Trouble kind, uint32_t detail) { return Status{kind, Verb::kCombineRecv, slot, detail}; };
  switch (look_for_reply(view, peer_idx, slot, true)) {
    case Look::kPending:
      return trouble(Trouble::kTimeout, 0);
    case Look::kGone:
      return trouble(Trouble::kGone, 0);
    case Look::kViolation:
      return trouble(Trouble::kViolation, signal_seq(poll_signal(view.signal_of(peer_idx, slot))));
    case Look::kArrived:
      break;
  }
  const uint32_t num_rows = signal_rows(poll_signal(view.signal_of(peer_idx, slot)));
  Header header;
  memcpy(&header, view.small_of(peer_idx) + view.layout.combine_small.header(slot), sizeof header);
  if (num_rows == kRefusedRows) return trouble(Trouble::kRefused, header.detail);
  const bool is_right = num_rows == view.seq(peer_idx, slot).reply_rows && header.num_rows == num_rows;
  return trouble(is_right ? Trouble::kNone : Trouble::kViolation, num_rows);
}

// Waits for every reply with rows, and notes which of them may be read. What is late stays owed.
template <class Exec>
M2N_HD uint32_t begin_combine(Exec& exec, const CombineRecvVerb& verb) {
  const AttentionView& view = verb.view;
  const bool is_failed = view.slots[verb.slot].is_failed;
  if (!is_failed) {
    wait_for(exec, view.control, verb.timeout_ns,
             [&](bool is_long) { return !is_any_pending(view, verb.route, verb.slot, is_long); });
  }
  bool is_late = is_failed;
  for (uint32_t rank = 0; rank < verb.route.num_ranks; ++rank) {
    const int32_t peer_idx = view.peer_of_rank(verb.slot)[rank];
    int32_t& source = view.source_of_rank(verb.slot)[rank];
    source = kNone;
    if (peer_idx == kNone || rows_for(verb.route, rank) == 0) continue;
    const Status status = judge_reply(view, peer_idx, verb.slot);
    is_late |= status.trouble == Trouble::kTimeout;
    if (status.trouble == Trouble::kNone) {
      source = peer_idx;
    } else if (load_relaxed(&view.peers.entries[peer_idx].is_given_up) == 0) {  // relaxed: else told twice at most
      report(view.status + peer_idx, status);
    }
  }
  return is_late ? kGiveUp : kGo;
}

template <class Exec>
M2N_HD void run(Exec& exec, const CombineRecvVerb& verb) {
  const AttentionView& view = verb.view;
  Gate* gate = &view.slots[verb.slot].gate;
  const uint32_t verdict = decide(exec, gate, [&] { return begin_combine(exec, verb); });
  CombineRecv recv{};
  recv.slot = verb.slot;
  recv.route = verb.route;
  recv.window = view.rows;
  recv.peer_of_rank = view.source_of_rank(verb.slot);
  recv.y = verb.y;
  recv.y_stride_bytes = verb.y_stride_bytes;
  combine_recv(exec, view.layout, view.shape, recv);
  if (!leave(exec, gate) || verdict != kGo) return;
  for (uint32_t rank = 0; rank < verb.route.num_ranks; ++rank) {
    const int32_t peer_idx = view.peer_of_rank(verb.slot)[rank];
    if (peer_idx == kNone || rows_for(verb.route, rank) == 0) continue;
    view.seq(peer_idx, verb.slot).consumed = view.seq(peer_idx, verb.slot).sent;
  }
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
  wait_for(exec, verb.view.control, verb.timeout_ns, [&](bool is_long) {
    for (uint32_t i = 0; i < verb.count && *verb.found == kNone; ++i) {
      const uint32_t slot = verb.microbatches[i];
      const bool is_ready =
          verb.view.slots[slot].is_failed || !is_any_pending(verb.view, verb.routes[slot], slot, is_long);
      if (is_ready) *verb.found = static_cast<int32_t>(i);
    }
    return *verb.found != kNone;
  });
}

}  // namespace m2n
