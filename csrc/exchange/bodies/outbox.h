// SPDX-License-Identifier: Apache-2.0
// What an attention rank knows of its messages: which reply counts, who owes one, and when a slot is free. Host and
// device run the same lines.
#pragma once

#include <cstdint>

#include "core/peer.h"
#include "core/slot.h"
#include "exchange/rows/layout.h"
#include "exchange/rows/route.h"

namespace m2n {

struct OutboxView {
  Layout layout;
  Shape shape;
  PeerTable watched;          // the peers' states as they are told: where that is far away, long looks alone read it
  const unsigned char* meta;  // our own window of meta objects, by peer index
  SendSeq* seqs;              // [peer][slot]

  M2N_HD SendSeq& seq(uint32_t peer_idx, uint32_t slot) const { return seqs[peer_idx * layout.num_slots + slot]; }
  M2N_HD const unsigned char* meta_of(uint32_t peer_idx) const {
    return meta + peer_idx * layout.combine_meta.object_bytes;
  }
  M2N_HD const Signal* signal_of(uint32_t peer_idx, uint32_t slot) const {
    return reinterpret_cast<const Signal*>(meta_of(peer_idx) + layout.combine_meta.signal(slot));
  }
};

M2N_HD inline uint32_t rows_for(const RouteView& route, uint32_t rank) {
  return route.row_offsets[rank + 1] - route.row_offsets[rank];
}

// How many rows the reply to a message must have.
M2N_HD inline uint32_t reply_rows_for(const Shape& shape, const RouteView& route, uint32_t rank) {
  return shape.reduce_at == ReduceAt::kExpert ? rows_for(route, rank) : route.pair_counts[rank];
}

// Has a rank rows of a dispatch in flight? `peer_of_rank`: to whom it went; -1: nobody.
M2N_HD inline bool owes_rows(const RouteView& route, const int32_t* peer_of_rank, uint32_t rank) {
  return peer_of_rank[rank] != kNone && rows_for(route, rank) != 0;
}

// One look for the reply to the last message of a slot.
M2N_HD inline Look look_for_reply(const OutboxView& view, uint32_t peer_idx, uint32_t slot, bool is_long = true) {
  const auto is_live = [&] { return !is_long || view.watched.is_live(peer_idx); };
  const Look look = look_for(view.signal_of(peer_idx, slot), view.seq(peer_idx, slot).sent - 1, is_live);
  // What is read next comes from the same core.
  if (look == Look::kArrived) prefetch(view.meta_of(peer_idx) + view.layout.combine_meta.header(slot));
  return look;
}

// Does a peer still owe what the next message of a slot waits for: the reply to the last one? kPending: it does; only
// combine_recv takes a reply with rows. Else it is to be consumed.
M2N_HD inline Look look_for_credit(const OutboxView& view, uint32_t peer_idx, uint32_t slot, bool is_long = true) {
  const SendSeq& seq = view.seq(peer_idx, slot);
  if (!seq.awaits_reply()) return Look::kArrived;
  const Look look = look_for_reply(view, peer_idx, slot, is_long);
  return look == Look::kGone || seq.reply_rows == 0 ? look : Look::kPending;
}

// Must a dispatch wait for that? Not where the peer's rank hosts nothing and gets nothing: it hears of the next
// dispatch that finds its slot free. `route`: nullptr where there are no rows.
M2N_HD inline bool is_awaited(bool hosts_something, const RouteView* route, uint32_t rank) {
  return hosts_something || (route != nullptr && rank < route->num_ranks && rows_for(*route, rank) != 0);
}

enum class ReplyFault : uint32_t { kNone, kRefused, kBatch, kNumRows };

// A reply that has come: the private copy of its header, and what is wrong.
struct ArrivedReply {
  Header header;
  uint32_t num_rows;
  ReplyFault fault;
};

// To a dispatch of `layer`.
M2N_HD inline ArrivedReply read_reply(const OutboxView& view, uint32_t peer_idx, uint32_t slot, uint32_t layer) {
  ArrivedReply reply{read_header(view.meta_of(peer_idx) + view.layout.combine_meta.header(slot)),
                     signal_rows(poll_signal(view.signal_of(peer_idx, slot))), ReplyFault::kNone};
  const bool is_right =
      reply.num_rows == view.seq(peer_idx, slot).reply_rows && reply.header.num_rows == reply.num_rows;
  if (reply.header.layer != layer || reply.header.microbatch != slot) {
    reply.fault = ReplyFault::kBatch;
  } else if (reply.num_rows == kRefusedRows) {
    reply.fault = ReplyFault::kRefused;
  } else if (!is_right) {
    reply.fault = ReplyFault::kNumRows;
  }
  return reply;
}

}  // namespace m2n
