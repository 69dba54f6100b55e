// SPDX-License-Identifier: Apache-2.0
// The attention rank's half of the exchange: dispatch_send and combine_recv on CPU threads.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/hold.h"
#include "exchange/bodies/combine.h"
#include "exchange/bodies/dispatch.h"
#include "exchange/bodies/outbox.h"
#include "exchange/host/route.h"
#include "exchange/host/write_choice.h"
#include "exchange/links/roles.h"

namespace m2n {

class AttentionComm final : public AttentionRole {
 public:
  AttentionComm(const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport);

  // x: [T][hidden] rows at a stride, of dispatch_dtype; where that is float8 of any other type, for they become float8
  // on their way. Borrowed until combine_recv of the slot has returned, unless the route packs. `placement_version`:
  // that of the oldest placement by which rows of this rank still go, or went and are not answered; expert ranks are
  // told.
  void dispatch_send(const unsigned char* x, uint64_t x_stride_bytes, DType x_dtype, std::shared_ptr<const Route> route,
                     uint32_t microbatch, uint32_t layer, int64_t deadline_ns, uint32_t placement_version = 0);
  // y: [T][hidden] of combine_dtype. Where an expert rank that is gone owes rows it throws kPeerLost, or with
  // `takes_nan` their tokens become NaN, once all other replies are there.
  void combine_recv(unsigned char* y, uint64_t y_stride_bytes, uint32_t microbatch, int64_t deadline_ns,
                    bool takes_nan = false);
  // For each expert rank that will not answer what is in flight any more the tokens whose rows it owes.
  Owed missing(uint32_t microbatch);
  // Would the next verb go without waiting? In flight: would combine_recv return or raise; else: is it free?
  bool is_ready(uint32_t microbatch);
  // Waits for the first ready one of `microbatches`; its position, or -1 at the deadline.
  int wait_ready(const std::vector<uint32_t>& microbatches, int64_t deadline_ns);
  bool is_busy(uint32_t microbatch) const;
  // Would dispatch_send go without waiting for the reply to an empty message? `route`: that of the dispatch.
  bool is_free(uint32_t microbatch, const RouteView* route = nullptr);
  // The expert ranks that host something. The others still hear of dispatches while their slot is free; but that one of
  // them does not answer an empty message holds up nothing. Until this is called, all.
  void set_hosts(const std::vector<uint32_t>& expert_ranks);
  uint32_t num_tokens(uint32_t microbatch) const;
  // Nothing to send for now: tells it to every peer, on each free slot. `placement_version` as of dispatch_send.
  void idle(int64_t deadline_ns, uint32_t placement_version = 0);

 protected:
  void peers_changed() override;

 private:
  struct Slot {
    bool is_busy = false;
    uint32_t layer = 0;
    std::shared_ptr<const Route> route;
    int64_t sent_ns = kForeverNs;       // when its last messages went, where somebody may be given up
    std::vector<int32_t> peer_of_rank;  // snapshot: who owes a reply; -1: nobody, or given up
    std::vector<int32_t> newest_peer;   // of each rank, as looked up in this epoch
    uint32_t epoch = 0;
    std::vector<bool> is_gone;  // the verdict on a rank that went without a reply: one that is late no longer counts
  };

  // is_ready() by what has arrived so far.
  bool would_go(uint32_t microbatch, bool takes_nan = false);
  bool is_held(uint32_t peer_idx) override;
  std::string why_held() const override;
  void reset_peer(uint32_t peer_idx) override;

  // From before a message is written until its reply is consumed, or given up.
  uint32_t& hold(uint32_t peer_idx, uint32_t slot) { return holds_[peer_idx * layout_.num_slots + slot]; }
  // Does this slot's own thread hold it?
  bool is_ours(uint32_t peer_idx, uint32_t slot) { return load_relaxed(&hold(peer_idx, slot)) != 0; }
  // Takes a hold of a live peer that is still the one of this rank.
  bool take_peer(uint32_t peer_idx, uint32_t slot, uint32_t rank);
  // Of the two looks of outbox.h; raises where it is kViolation.
  Look require_in_order(Look look, uint32_t peer_idx, uint32_t slot);
  Look look_for_rows(Slot& slot, uint32_t slot_idx, uint32_t rank);
  bool owes_rows(const Slot& slot, uint32_t rank) const {
    return m2n::owes_rows(slot.route->view(), slot.peer_of_rank.data(), rank);
  }
  // Does a peer still owe what the next message of a slot waits for?
  bool is_owing(uint32_t peer_idx, uint32_t slot) {
    return require_in_order(look_for_credit(outbox_, peer_idx, slot), peer_idx, slot) == Look::kPending;
  }
  // Must a dispatch wait until this peer has answered the last, empty message?
  bool is_awaited(uint32_t peer_idx, const RouteView* route) const {
    return m2n::is_awaited(load_relaxed(&hosts_nothing_[peer_idx]) == 0, route, rank_of(peer_idx));
  }
  // Waits for ready(); calls drop_late() once what it waits for is owed for give_up_ns_. False at the deadline.
  template <class Ready, class DropLate>
  bool wait_or_give_up(const Slot& slot, Ready&& ready, DropLate&& drop_late, int64_t deadline_ns);
  // The newest life of each rank. Looked up once, and again when somebody has joined.
  void find_newest_peers(Slot& slot, uint32_t num_ranks);
  // Before anything is sent: every peer that gets rows is LIVE.
  void find_peers(Slot& slot, uint32_t slot_idx, const RouteView& route);
  // The replies to empty messages are awaited here, not by combine_recv.
  void finish_empty_messages(uint32_t slot_idx, const RouteView* route, int64_t deadline_ns);
  // `send` but for what differs from peer to peer. Returns the number of rows.
  uint32_t send_to_peer(uint32_t peer_idx, const Slot& slot, DispatchSend send);
  void wait_replies(Slot& slot, uint32_t slot_idx, int64_t deadline_ns, bool takes_nan);
  [[noreturn]] void raise_fault(const Slot& slot, uint32_t slot_idx, uint32_t peer_idx, const ArrivedReply& reply);
  void take_replies(Slot& slot, uint32_t slot_idx);
  void end_round(Slot& slot, uint32_t slot_idx);
  // Whose rows are missing: nothing is read of them, and nothing is awaited any more.
  void leave_missing(Slot& slot, uint32_t slot_idx);
  [[noreturn]] void raise_missing(const Slot& slot, uint32_t slot_idx, uint32_t rank);

  std::vector<SendSeq> send_seqs_;          // [peer][slot]
  std::vector<uint32_t> holds_;             // likewise
  std::vector<WriteChoice> write_choices_;  // likewise
  const OutboxView outbox_;
  std::vector<Slot> slots_;
  std::mutex hosts_mutex_;  // held for a moment; verbs look at hosts_nothing_ alone
  std::optional<std::vector<uint32_t>> hosts_;
  std::vector<uint32_t> hosts_nothing_;  // by peer index
};

}  // namespace m2n
