// SPDX-License-Identifier: Apache-2.0
// Whom an attention rank waits for, for how long, and what is said of rows that will not come.
#include <algorithm>

#include "exchange/host/attention.h"

namespace m2n {
namespace {

// Who sleeps until a moment and wakes so much later did not run meanwhile, and perhaps nobody did.
constexpr int64_t kStoppedNs = 200'000'000;
constexpr size_t kMostNamed = 8;  // tokens in an error

std::string name_tokens(const std::vector<int32_t>& tokens) {
  std::string text = std::to_string(tokens.size()) + (tokens.size() == 1 ? " token (" : " tokens (");
  for (size_t i = 0; i < std::min(tokens.size(), kMostNamed); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(tokens[i]);
  }
  return text + (tokens.size() > kMostNamed ? ", ...)" : ")");
}

}  // namespace

void AttentionComm::set_hosts(const std::vector<uint32_t>& expert_ranks) {
  {
    std::lock_guard lock(hosts_mutex_);
    hosts_ = expert_ranks;
  }
  peers_changed();
}

void AttentionComm::peers_changed() {
  std::lock_guard lock(hosts_mutex_);
  if (!hosts_) return;
  for (uint32_t peer_idx = 0; peer_idx < peers_.size(); ++peer_idx) {
    const bool hosts_something = std::find(hosts_->begin(), hosts_->end(), rank_of(peer_idx)) != hosts_->end();
    store_relaxed(&hosts_nothing_[peer_idx], uint32_t{!hosts_something});  // relaxed: an older answer is as good
  }
}

bool AttentionComm::is_free(uint32_t microbatch, const RouteView* route) {
  if (is_busy(microbatch)) return false;
  for (uint32_t peer_idx = 0; peer_idx < peers_.size(); ++peer_idx) {
    if (!is_ours(peer_idx, microbatch)) continue;
    if (is_owing(peer_idx, microbatch)) {
      if (is_awaited(peer_idx, route)) return false;
      continue;
    }
    outbox_.seq(peer_idx, microbatch).consume();
    drop_hold(&hold(peer_idx, microbatch));
  }
  return true;
}

bool AttentionComm::would_go(uint32_t microbatch, bool takes_nan) {
  if (!is_busy(microbatch)) return is_free(microbatch);
  Slot& slot = slots_[microbatch];
  bool is_any_pending = false;
  for (uint32_t rank = 0; rank < slot.peer_of_rank.size(); ++rank) {
    if (!owes_rows(slot, rank)) continue;
    const Look look = look_for_rows(slot, microbatch, rank);
    if (look == Look::kGone && !takes_nan) return true;
    is_any_pending |= look == Look::kPending;
  }
  return !is_any_pending;
}

template <class Ready, class DropLate>
bool AttentionComm::wait_or_give_up(const Slot& slot, Ready&& ready, DropLate&& drop_late, int64_t deadline_ns) {
  int64_t late_ns = give_up_ns_ == kForeverNs ? kForeverNs : slot.sent_ns + give_up_ns_;
  while (true) {
    const bool is_late = late_ns != kForeverNs && now_ns() >= late_ns;
    if (wait(ready, is_late ? kNoWait : std::min(deadline_ns, late_ns)) == WaitResult::kReady) return true;
    if (late_ns == kForeverNs) return false;
    const int64_t now = now_ns();
    if (now < late_ns || (!is_late && now - late_ns > kStoppedNs && now < deadline_ns)) {
      if (deadline_ns == kNoWait || now >= deadline_ns) return false;
      if (now >= late_ns) late_ns = now + kStoppedNs;  // this process was stopped: then the peer may have been, too
      continue;
    }
    drop_late();
    late_ns = kForeverNs;
  }
}

void AttentionComm::finish_empty_messages(uint32_t slot_idx, const RouteView* route, int64_t deadline_ns) {
  const auto is_late = [&](uint32_t peer_idx) { return is_ours(peer_idx, slot_idx) && is_awaited(peer_idx, route); };
  const auto drop_late = [&] {
    for (uint32_t peer_idx = 0; peer_idx < peers_.size(); ++peer_idx) {
      if (is_late(peer_idx) && is_owing(peer_idx, slot_idx)) give_up_late(peer_idx);
    }
  };
  if (wait_or_give_up(slots_[slot_idx], [&] { return is_free(slot_idx, route); }, drop_late, deadline_ns)) {
    return;
  }
  for (uint32_t peer_idx = 0; peer_idx < peers_.size(); ++peer_idx) {
    if (!is_late(peer_idx)) continue;
    const std::string rank = std::to_string(rank_of(peer_idx));
    throw Error(Failure::kTimeout,
                "dispatch_send(microbatch=" + std::to_string(slot_idx) + "): expert rank " + rank +
                    " has not answered the last, empty message on this slot; is it still serving batches? Call again "
                    "to go on waiting, or drop(" +
                    rank + ") to go on without it",
                static_cast<int>(rank_of(peer_idx)));
  }
}

void AttentionComm::wait_replies(Slot& slot, uint32_t slot_idx, int64_t deadline_ns, bool takes_nan) {
  const auto is_late = [&](uint32_t rank) {
    return owes_rows(slot, rank) && look_for_rows(slot, slot_idx, rank) == Look::kPending;
  };
  const auto drop_late = [&] {
    for (uint32_t rank = 0; rank < slot.peer_of_rank.size(); ++rank) {
      if (is_late(rank)) give_up_late(static_cast<uint32_t>(slot.peer_of_rank[rank]));
    }
  };
  const bool is_over = wait_or_give_up(slot, [&] { return would_go(slot_idx, takes_nan); }, drop_late, deadline_ns);
  for (uint32_t rank = 0; rank < slot.peer_of_rank.size() && !is_over; ++rank) {
    if (!is_late(rank)) continue;
    throw Error(Failure::kTimeout,
                "combine_recv(microbatch=" + std::to_string(slot_idx) + "): " + peer_name(rank) +
                    " is alive but has not replied to layer " + std::to_string(slot.layer) +
                    " in time; call again to go on waiting, or drop(" + std::to_string(rank) + ") to go on without it",
                static_cast<int>(rank));
  }
  for (uint32_t rank = 0; rank < slot.peer_of_rank.size() && !takes_nan; ++rank) {
    if (owes_rows(slot, rank) && look_for_rows(slot, slot_idx, rank) == Look::kGone) {
      raise_missing(slot, slot_idx, rank);
    }
  }
}

void AttentionComm::raise_fault(const Slot& slot, uint32_t slot_idx, uint32_t peer_idx, const ArrivedReply& reply) {
  const auto batch = [](uint32_t layer, uint32_t microbatch) {
    return "layer " + std::to_string(layer) + " of microbatch " + std::to_string(microbatch);
  };
  if (reply.fault == ReplyFault::kBatch) {
    raise_violation(peer_idx, "expected a reply to " + batch(slot.layer, slot_idx) + ", got one to " +
                                  batch(reply.header.layer, reply.header.microbatch));
  }
  raise_violation(peer_idx, "expected a reply of " + std::to_string(outbox_.seq(peer_idx, slot_idx).reply_rows) +
                                " rows, got " + std::to_string(reply.num_rows));
}

Owed AttentionComm::missing(uint32_t microbatch) {
  Owed owed;
  if (!is_busy(microbatch)) return owed;
  look_at_network();
  Slot& slot = slots_[microbatch];
  const RouteView& view = slot.route->view();
  for (uint32_t rank = 0; rank < slot.peer_of_rank.size(); ++rank) {
    if (!owes_rows(slot, rank) || look_for_rows(slot, microbatch, rank) != Look::kGone) continue;
    owed.emplace_back(rank, std::vector<int32_t>(view.token_of_row + view.row_offsets[rank],
                                                 view.token_of_row + view.row_offsets[rank + 1]));
  }
  return owed;
}

void AttentionComm::leave_missing(Slot& slot, uint32_t slot_idx) {
  for (uint32_t rank = 0; rank < slot.peer_of_rank.size(); ++rank) {
    if (!slot.is_gone[rank]) continue;
    const auto peer_idx = static_cast<uint32_t>(slot.peer_of_rank[rank]);
    outbox_.seq(peer_idx, slot_idx).consume();
    drop_hold(&hold(peer_idx, slot_idx));
    slot.peer_of_rank[rank] = kNone;
  }
}

void AttentionComm::raise_missing(const Slot& slot, uint32_t slot_idx, uint32_t rank) {
  Owed owed = missing(slot_idx);
  const auto own = std::find_if(owed.begin(), owed.end(), [rank](const auto& entry) { return entry.first == rank; });
  const std::string more =
      "; rows of " + name_tokens(own->second) + " will not come, and missing='nan' takes the others";
  raise_lost(static_cast<uint32_t>(slot.peer_of_rank[rank]),
             "combine_recv(microbatch=" + std::to_string(slot_idx) + ")", more, std::move(owed));
}

}  // namespace m2n
