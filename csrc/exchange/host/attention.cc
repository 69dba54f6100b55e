// SPDX-License-Identifier: Apache-2.0
// dispatch_send and combine_recv on CPU threads: who is waited for, and what ends a wait.
#include "exchange/host/attention.h"

#include <algorithm>

#include "exchange/rows/plain_floats.h"

namespace m2n {

AttentionComm::AttentionComm(const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport)
    : AttentionRole(shape, rank, max_peers, transport),
      send_seqs_(static_cast<size_t>(max_peers) * layout_.num_slots, SendSeq{first_seq_, first_seq_, 0}),
      holds_(send_seqs_.size()),
      write_choices_(send_seqs_.size()),
      outbox_{layout_, shape, peers_, meta_window()->data(), send_seqs_.data()},
      slots_(layout_.num_slots),
      hosts_nothing_(max_peers) {}

bool AttentionComm::is_held(uint32_t peer_idx) {
  for (uint32_t slot = 0; slot < layout_.num_slots; ++slot) {
    if (m2n::is_held(&hold(peer_idx, slot))) return true;
  }
  return false;
}

std::string AttentionComm::why_held() const { return "owe a reply: call combine_recv for what is in flight"; }

void AttentionComm::reset_peer(uint32_t peer_idx) {
  for (uint32_t slot = 0; slot < layout_.num_slots; ++slot) {
    outbox_.seq(peer_idx, slot) = {first_seq_, first_seq_, 0};
    write_choices_[peer_idx * layout_.num_slots + slot] = {};
  }
}

bool AttentionComm::take_peer(uint32_t peer_idx, uint32_t slot, uint32_t rank) {
  uint32_t* word = &hold(peer_idx, slot);
  if (take_hold(word, &peers_.entries[peer_idx].state) && rank_of(peer_idx) == rank) return true;
  drop_hold(word);
  return false;
}

bool AttentionComm::is_busy(uint32_t microbatch) const {
  require_microbatch(microbatch);
  return slots_[microbatch].is_busy;
}

uint32_t AttentionComm::num_tokens(uint32_t microbatch) const {
  if (!is_busy(microbatch)) raise_nothing_sent(microbatch);
  return slots_[microbatch].route->view().num_tokens;
}

void AttentionComm::find_newest_peers(Slot& slot, uint32_t num_ranks) {
  const uint32_t now = epoch();
  if (slot.epoch == now && slot.newest_peer.size() == num_ranks) return;
  slot.epoch = now;
  slot.newest_peer.assign(num_ranks, kNone);
  for (uint32_t rank = 0; rank < num_ranks; ++rank) slot.newest_peer[rank] = peers_.find(rank);
}

void AttentionComm::find_peers(Slot& slot, uint32_t slot_idx, const RouteView& route) {
  find_newest_peers(slot, route.num_ranks);
  slot.peer_of_rank.assign(route.num_ranks, kNone);
  try {
    for (uint32_t rank = 0; rank < route.num_ranks; ++rank) {
      int32_t peer_idx = slot.newest_peer[rank];
      // Whoever is ours yet owes an answer, hosts nothing, and gets no rows.
      if (peer_idx != kNone && is_ours(static_cast<uint32_t>(peer_idx), slot_idx)) continue;
      while (peer_idx == kNone || !take_peer(static_cast<uint32_t>(peer_idx), slot_idx, rank)) {
        peer_idx = rows_for(route, rank) != 0 ? static_cast<int32_t>(require_live(rank)) : kNone;
        if (peer_idx == kNone) break;
      }
      slot.peer_of_rank[rank] = peer_idx;
    }
  } catch (...) {
    for (const int32_t peer_idx : slot.peer_of_rank) {
      if (peer_idx != kNone) drop_hold(&hold(static_cast<uint32_t>(peer_idx), slot_idx));
    }
    throw;
  }
}

uint32_t AttentionComm::send_to_peer(uint32_t peer_idx, const Slot& slot, DispatchSend send) {
  const uint32_t peer_rank = rank_of(peer_idx);
  send.peer = peers_.entries[peer_idx].view;
  SendSeq& seq = outbox_.seq(peer_idx, send.slot);
  send.seq = seq.sent + 1;
  uint32_t reply_rows = 0;
  if (slot.route != nullptr) {
    const RouteView& view = slot.route->view();
    choose_rows(send, view, shape_.top_k, view.row_offsets[peer_rank], rows_for(view, peer_rank));
    reply_rows = reply_rows_for(shape_, view, peer_rank);
  }
  const auto put = [&](bool is_streamed) {
    send.is_streamed = is_streamed;
    with_sender([&](HostExec& exec) { m2n::dispatch_send(exec, layout_, shape_, send); });
  };
  const bool is_computed = shape_.dispatch_dtype == DType::kFloat8E4M3;
  if (is_computed || is_over_network(peer_idx)) {
    // Sent from where it lies, or (packed) from the send area; what is computed is made there.
    const PlainFloats floats;
    send.is_packed = slot.route != nullptr && slot.route->packs() && !is_computed;
    if (send.is_packed) counters_.packed(send.header.num_rows * layout_.dispatch_rows.row_bytes);
    put(false);
  } else {
    WriteChoice& choice = write_choices_[peer_idx * layout_.num_slots + send.slot];
    choice.send(send.header.num_rows * layout_.dispatch_rows.row_bytes, put);
  }
  seq.sent = send.seq;
  seq.reply_rows = reply_rows;
  return send.header.num_rows;
}

void AttentionComm::dispatch_send(const unsigned char* x, uint64_t x_stride_bytes, DType x_dtype,
                                  std::shared_ptr<const Route> route, uint32_t microbatch, uint32_t layer,
                                  int64_t deadline_ns, uint32_t placement_version) {
  require_microbatch(microbatch);
  require_x_dtype(x_dtype);
  if (route->shape() != shape_) {
    throw Error(Failure::kArgument, "route: it was made for another Shape than this comm's");
  }
  Slot& slot = slots_[microbatch];
  if (slot.is_busy) raise_slot_busy(microbatch, slot.layer);
  finish_empty_messages(microbatch, &route->view(), deadline_ns);
  if (has_gone()) [[unlikely]]
    return_gone();
  find_peers(slot, microbatch, route->view());
  slot.layer = layer;
  slot.route = std::move(route);
  slot.is_gone.assign(slot.peer_of_rank.size(), false);
  slot.is_busy = true;
  slot.sent_ns = give_up_ns_ == kForeverNs ? kForeverNs : now_ns();
  DispatchSend send{};
  send.slot = microbatch;
  send.header.layer = layer;
  send.header.microbatch = microbatch;
  send.header.placement_version = placement_version;
  send.x = x;
  send.x_stride_bytes = x_stride_bytes;
  send.x_dtype = x_dtype;
  // Each attention rank starts with another peer, so that they do not all write to one at a time.
  const uint32_t num_ranks = slot.route->view().num_ranks;
  uint64_t num_messages = 0, num_rows = 0;
  for (uint32_t i = 0; i < num_ranks; ++i) {
    const int32_t peer_idx = slot.peer_of_rank[(rank_ + i) % num_ranks];
    if (peer_idx == kNone) continue;
    num_rows += send_to_peer(static_cast<uint32_t>(peer_idx), slot, send);
    ++num_messages;
  }
  counters_.sent(num_messages, num_rows);
}

Look AttentionComm::require_in_order(Look look, uint32_t peer_idx, uint32_t slot) {
  if (look != Look::kViolation) return look;
  const Signal seen = load_relaxed(own_signal(peer_idx, slot));  // relaxed: for the message only
  raise_violation(peer_idx, "microbatch " + std::to_string(slot) + ": expected reply " +
                                std::to_string(outbox_.seq(peer_idx, slot).sent) + ", saw " +
                                std::to_string(signal_seq(seen)));
}

Look AttentionComm::look_for_rows(Slot& slot, uint32_t slot_idx, uint32_t rank) {
  if (slot.is_gone[rank]) return Look::kGone;
  const auto peer_idx = static_cast<uint32_t>(slot.peer_of_rank[rank]);
  const Look look = require_in_order(look_for_reply(outbox_, peer_idx, slot_idx), peer_idx, slot_idx);
  slot.is_gone[rank] = look == Look::kGone;
  return look;
}

bool AttentionComm::is_ready(uint32_t microbatch) {
  look_at_network();
  return would_go(microbatch);
}

int AttentionComm::wait_ready(const std::vector<uint32_t>& microbatches, int64_t deadline_ns) {
  int found = -1;
  const auto is_any_ready = [&] {
    for (size_t i = 0; i < microbatches.size(); ++i) {
      if (!would_go(microbatches[i])) continue;
      found = static_cast<int>(i);
      return true;
    }
    return false;
  };
  wait(is_any_ready, deadline_ns);
  return found;
}

void AttentionComm::take_replies(Slot& slot, uint32_t slot_idx) {
  int32_t refused_by = kNone;
  uint32_t refused_expert = 0;
  uint64_t num_messages = 0, num_received = 0;
  for (uint32_t rank = 0; rank < slot.peer_of_rank.size(); ++rank) {
    if (!owes_rows(slot, rank) || slot.is_gone[rank]) continue;
    const uint32_t peer_idx = static_cast<uint32_t>(slot.peer_of_rank[rank]);
    const ArrivedReply reply = read_reply(outbox_, peer_idx, slot_idx, slot.layer);
    if (reply.fault == ReplyFault::kRefused) {
      refused_by = static_cast<int32_t>(rank);
      refused_expert = reply.header.detail;
    } else if (reply.fault != ReplyFault::kNone) {
      slot.is_gone[rank] = true;  // what it owed will not come
      raise_fault(slot, slot_idx, peer_idx, reply);
    }
    outbox_.seq(peer_idx, slot_idx).consume();
    // The rows of x are the caller's again: nothing reads them any more.
    if (is_over_network(peer_idx)) {
      network_.get()->finish(peer_signal(peers_.entries[peer_idx].view, layout_.dispatch_meta, slot_idx));
    }
    ++num_messages;
    num_received += reply.fault == ReplyFault::kRefused ? 0 : reply.num_rows;
  }
  counters_.received(num_messages, num_received);
  if (refused_by == kNone) return;
  end_round(slot, slot_idx);  // every reply is here: the slot is free for a dispatch with the right placement
  raise_refused(static_cast<uint32_t>(refused_by), refused_expert, slot.layer, slot_idx);
}

void AttentionComm::combine_recv(unsigned char* y, uint64_t y_stride_bytes, uint32_t microbatch, int64_t deadline_ns,
                                 bool takes_nan) {
  num_tokens(microbatch);  // something must be in flight
  Slot& slot = slots_[microbatch];
  wait_replies(slot, microbatch, deadline_ns, takes_nan);
  take_replies(slot, microbatch);
  if (takes_nan) leave_missing(slot, microbatch);
  CombineRecv recv{};
  recv.slot = microbatch;
  recv.route = slot.route->view();
  recv.window = rows_window()->data();
  recv.peer_of_rank = slot.peer_of_rank.data();
  recv.y = y;
  recv.y_stride_bytes = y_stride_bytes;
  const PlainFloats floats;
  with_dtype(shape_.combine_dtype,
             [&](auto element) { combine_recv_as<decltype(element)>(exec_, layout_, shape_, recv); });
  end_round(slot, microbatch);
}

void AttentionComm::end_round(Slot& slot, uint32_t slot_idx) {
  for (uint32_t rank = 0; rank < slot.peer_of_rank.size(); ++rank) {
    if (owes_rows(slot, rank) && slot.peer_of_rank[rank] != kNone)
      drop_hold(&hold(static_cast<uint32_t>(slot.peer_of_rank[rank]), slot_idx));
  }
  slot.is_busy = false;
  slot.route.reset();
  if (has_gone()) [[unlikely]]
    return_gone();
}

void AttentionComm::idle(int64_t deadline_ns, uint32_t placement_version) {
  require_usable();
  for (uint32_t slot_idx = 0; slot_idx < shape_.microbatches; ++slot_idx) {
    Slot& slot = slots_[slot_idx];
    if (slot.is_busy) continue;
    finish_empty_messages(slot_idx, nullptr, deadline_ns);
    DispatchSend send{};
    send.slot = slot_idx;
    send.header.microbatch = slot_idx;
    send.header.placement_version = placement_version;
    send.header.flags = kFlagIdleNext;
    slot.route.reset();
    slot.sent_ns = give_up_ns_ == kForeverNs ? kForeverNs : now_ns();
    uint64_t num_messages = 0;
    for (uint32_t peer_idx = 0; peer_idx < peers_.size(); ++peer_idx) {
      // Whoever is ours yet owes an answer, hosts nothing, and is not waited for.
      if (is_ours(peer_idx, slot_idx) || !take_peer(peer_idx, slot_idx, rank_of(peer_idx))) continue;
      send_to_peer(peer_idx, slot, send);
      ++num_messages;
    }
    counters_.sent(num_messages, 0);
  }
}

}  // namespace m2n
