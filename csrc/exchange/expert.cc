// SPDX-License-Identifier: Apache-2.0
// dispatch_recv and combine_send on CPU threads: which batch goes next, and whom it waits for.
#include "exchange/expert.h"

#include <algorithm>
#include <limits>

namespace m2n {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

bool contains(const std::vector<uint32_t>& values, uint32_t value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

}  // namespace

ExpertComm::ExpertComm(const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport,
                       std::vector<uint32_t> local_experts)
    : Comm(Role::kExpert, shape, rank, max_peers, transport),
      num_local_experts_(static_cast<uint32_t>(local_experts.size())),
      expert_idx_(shape.num_experts, kNone),
      inboxes_(static_cast<size_t>(max_peers) * layout_.num_slots),
      next_(local_experts.size()) {
  for (Inbox& box : inboxes_) box.seq = {first_seq_, first_seq_};
  for (uint32_t i = 0; i < num_local_experts_; ++i) expert_idx_.at(local_experts[i]) = static_cast<int32_t>(i);
}

bool ExpertComm::is_served(uint32_t peer_idx) const { return state_of(links_[peer_idx]) == PeerState::kLive; }

void ExpertComm::reply_empty(uint32_t peer_idx, uint32_t slot, uint32_t num_rows, uint32_t detail) {
  Inbox& box = inbox(peer_idx, slot);
  Header header{};
  header.layer = box.header.layer;
  header.microbatch = slot;
  header.num_rows = num_rows;
  header.detail = detail;
  box.seq.replied = box.seq.accepted;
  send_empty_reply(exec_, layout_, links_[peer_idx].view, slot, box.seq.replied, header);
  add_relaxed(&stats_.messages_sent, uint64_t{1});
}

// Reads the header once into private memory, and checks it there.
void ExpertComm::note_arrival(uint32_t peer_idx, uint32_t slot, Signal signal) {
  Inbox& box = inbox(peer_idx, slot);
  const Header header = own_header(peer_idx, slot);
  const auto refuse = [&](const char* field, uint32_t value) {
    raise_violation(peer_idx, "message " + std::to_string(signal_seq(signal)) + " on slot " + std::to_string(slot) +
                                  ": bad " + field + " " + std::to_string(value));
  };
  if (signal_rows(signal) > shape_.max_tokens) refuse("number of rows", signal_rows(signal));
  if (header.num_rows != signal_rows(signal)) refuse("number of rows in the header", header.num_rows);
  if (header.microbatch != slot && slot != layout_.retry_slot()) refuse("microbatch", header.microbatch);
  if ((header.flags & ~kKnownFlags) != 0) refuse("flags", header.flags);
  box.seq.accepted = signal_seq(signal);
  box.header = header;
  box.is_expected = (header.flags & kFlagIdleNext) == 0;
  add_relaxed(&stats_.messages_received, uint64_t{1});
  if (header.num_rows == 0 && !box.is_expected) {
    reply_empty(peer_idx, slot, 0, 0);  // "nothing to send": answered here, nobody else sees it
    return;
  }
  box.is_pending = true;
  box.seen_ns = now_ns();
}

// Notes everything that has arrived since the last look.
void ExpertComm::scan() {
  for (uint32_t peer_idx = 0; peer_idx < num_links(); ++peer_idx) {
    if (!is_served(peer_idx)) continue;
    for (uint32_t slot = 0; slot < layout_.num_slots; ++slot) {
      const Inbox& box = inbox(peer_idx, slot);
      const Signal signal = poll_signal(own_signal(peer_idx, slot));
      const Arrival arrival = classify(signal, box.seq.accepted);
      if (arrival == Arrival::kNone) continue;
      if (arrival == Arrival::kViolation || box.seq.accepted != box.seq.replied) {
        raise_violation(peer_idx, "slot " + std::to_string(slot) + ": expected message " +
                                      std::to_string(box.seq.accepted + 1) + " after the reply to the last one, saw " +
                                      std::to_string(signal_seq(signal)));
      }
      note_arrival(peer_idx, slot, signal);
    }
  }
}

bool ExpertComm::matches(const Inbox& box, const RecvWanted& wanted) const {
  return box.is_pending && (!wanted.layer || *wanted.layer == box.header.layer) &&
         (!wanted.microbatch || *wanted.microbatch == box.header.microbatch);
}

bool ExpertComm::is_complete(const Work& work, const RecvWanted& wanted, int64_t* linger_until_ns) {
  int64_t first_seen_ns = kNever;
  bool is_anyone_missing = false;
  uint32_t num_strict = 0;
  for (uint32_t peer_idx = 0; peer_idx < num_links(); ++peer_idx) {
    if (!is_served(peer_idx)) continue;
    const Inbox& box = inbox(peer_idx, work.microbatch);
    const bool is_here = box.is_pending && box.header.layer == work.layer;
    if (is_here) first_seen_ns = std::min(first_seen_ns, box.seen_ns);
    if (is_here && contains(wanted.attention_ranks, links_[peer_idx].rank)) ++num_strict;
    // A peer whose slot holds another layer cannot send this one before that is answered.
    if (!box.is_pending && box.is_expected && box.seq.accepted == box.seq.replied) is_anyone_missing = true;
  }
  if (!wanted.attention_ranks.empty()) return num_strict == wanted.attention_ranks.size();
  if (!is_anyone_missing || now_ns() - first_seen_ns >= wanted.linger_ns) return true;
  *linger_until_ns = std::min(*linger_until_ns, first_seen_ns + wanted.linger_ns);
  return false;
}

// The complete (layer, microbatch) whose first message came first.
std::optional<Work> ExpertComm::find_complete(const RecvWanted& wanted, int64_t* linger_until_ns, bool* is_started) {
  std::optional<Work> found;
  int64_t found_seen_ns = kNever;
  *linger_until_ns = kNever;
  *is_started = false;
  for (uint32_t peer_idx = 0; peer_idx < num_links(); ++peer_idx) {
    if (!is_served(peer_idx)) continue;
    for (uint32_t slot = 0; slot < shape_.microbatches; ++slot) {
      const Inbox& box = inbox(peer_idx, slot);
      if (!matches(box, wanted)) continue;
      *is_started = true;
      const Work work{box.header.layer, slot};
      if (box.seen_ns >= found_seen_ns || !is_complete(work, wanted, linger_until_ns)) continue;
      found = work;
      found_seen_ns = box.seen_ns;
    }
  }
  return found;
}

std::shared_ptr<Batch> ExpertComm::dispatch_recv(const RecvWanted& wanted, int64_t deadline_ns) {
  require_usable();
  while (true) {
    std::shared_ptr<Batch> batch;
    int64_t linger_until_ns = kNever;
    bool is_started = false;
    const auto look = [&] {
      std::lock_guard lock(inbox_mutex_);
      scan();
      if (const auto work = find_complete(wanted, &linger_until_ns, &is_started)) batch = collect(*work, wanted);
      if (batch == nullptr) raise_if_lost(wanted);
      return batch != nullptr;
    };
    if (look()) return batch;
    const int64_t seen_linger_ns = linger_until_ns;
    // A first message starts the lingering: then wait again, with the shorter deadline.
    const auto is_changed = [&] { return look() || linger_until_ns != seen_linger_ns; };
    wait(is_changed, std::min(deadline_ns, seen_linger_ns));
    if (batch != nullptr) return batch;
    if (now_ns() < deadline_ns) continue;
    if (is_started && !wanted.attention_ranks.empty()) raise_timeout(wanted);
    return nullptr;  // what has arrived stays, and goes on lingering from when it came
  }
}

std::optional<Work> ExpertComm::wait_work(int64_t deadline_ns) {
  require_usable();
  std::optional<Work> work;
  const auto look = [&] {
    std::lock_guard lock(inbox_mutex_);
    scan();
    int64_t first_seen_ns = kNever;
    for (uint32_t peer_idx = 0; peer_idx < num_links(); ++peer_idx) {
      for (uint32_t slot = 0; slot < shape_.microbatches; ++slot) {
        const Inbox& box = inbox(peer_idx, slot);
        if (!box.is_pending || !is_served(peer_idx) || box.seen_ns >= first_seen_ns) continue;
        first_seen_ns = box.seen_ns;
        work = Work{box.header.layer, slot};
      }
    }
    if (!work) raise_if_lost({});
    return work.has_value();
  };
  wait(look, deadline_ns);
  return work;
}

std::shared_ptr<Batch> ExpertComm::collect(const Work& work, const RecvWanted& wanted) {
  auto batch = std::make_shared<Batch>();
  batch->owner = this;
  batch->layer = work.layer;
  batch->microbatch = work.microbatch;
  batch->expert_offsets.assign(num_local_experts_ + 1, 0);
  ids_.clear();
  row_weights_.clear();
  for (uint32_t peer_idx = 0; peer_idx < num_links(); ++peer_idx) {
    const Inbox& box = inbox(peer_idx, work.microbatch);
    if (!box.is_pending || box.header.layer != work.layer || !is_served(peer_idx)) continue;
    if (!wanted.attention_ranks.empty() && !contains(wanted.attention_ranks, links_[peer_idx].rank)) continue;
    take_message(*batch, peer_idx, work.microbatch);
  }
  if (batch->messages.empty()) return nullptr;  // all of them were refused
  for (const Batch::Message& message : batch->messages) {
    inbox(message.arrived.peer_idx, message.arrived.slot).is_pending = false;
  }
  build_lists(*batch);
  return batch;
}

// Takes one message into the batch; false when it was refused, which its sender learns.
bool ExpertComm::take_message(Batch& batch, uint32_t peer_idx, uint32_t slot) {
  Inbox& box = inbox(peer_idx, slot);
  ArrivedMessage message{};
  message.peer_idx = peer_idx;
  message.slot = slot;
  message.num_rows = box.header.num_rows;
  message.window_ids = reinterpret_cast<const int32_t*>(own_small(peer_idx) + small().ids(slot));
  message.window_weights = reinterpret_cast<const float*>(own_small(peer_idx) + small().weights(slot));
  const uint32_t first_row = static_cast<uint32_t>(ids_.size() / shape_.top_k);
  const size_t from = ids_.size();
  ids_.resize(from + message.num_rows * size_t{shape_.top_k}, kNone);
  row_weights_.resize(ids_.size());
  const RecvResult result = take_ids(message, shape_.top_k, shape_.num_experts, expert_idx_.data(), ids_.data() + from,
                                     row_weights_.data() + from);
  if (result.error == RecvError::kNone) {
    count_pairs(ids_.data() + from, message.num_rows, shape_.top_k, expert_idx_.data(), batch.expert_offsets.data());
    batch.messages.push_back({message, box.seq.accepted, first_row});
    batch.ranks.push_back(links_[peer_idx].rank);
    return true;
  }
  ids_.resize(from);
  row_weights_.resize(from);
  box.is_pending = false;
  if (result.error == RecvError::kNotHosted) {
    reply_empty(peer_idx, slot, kRefusedRows, static_cast<uint32_t>(result.value));
    return false;
  }
  raise_violation(peer_idx, "layer " + std::to_string(batch.layer) + ", row " + std::to_string(result.row) +
                                (result.error == RecvError::kWeight ? ": weight not finite for expert "
                                                                    : ": expert id out of range: ") +
                                std::to_string(result.value));
}

void ExpertComm::build_lists(Batch& batch) {
  uint64_t num_pairs = 0;
  for (int32_t count : batch.expert_offsets) num_pairs += static_cast<uint64_t>(count);
  batch.pair_begin.resize(ids_.size() / shape_.top_k + 1);
  batch.pair_position.resize(num_pairs);
  batch.row_index_by_expert.resize(num_pairs);
  batch.weights.resize(num_pairs);
  std::vector<ArrivedMessage> arrived;
  for (const Batch::Message& message : batch.messages) arrived.push_back(message.arrived);
  const BatchView view{batch.pair_begin.data(), batch.pair_position.data(), batch.row_index_by_expert.data(),
                       batch.expert_offsets.data(), batch.weights.data()};
  m2n::dispatch_recv(layout_, arrived.data(), static_cast<uint32_t>(arrived.size()), ids_.data(), row_weights_.data(),
                     expert_idx_.data(), num_local_experts_, next_.data(), view);
  add_relaxed(&stats_.rows_received, uint64_t{batch.num_rows()});
  const uint64_t row_bytes = layout_.dispatch_rows.row_bytes + 2 * sizeof(int32_t) * uint64_t{shape_.top_k};
  add_relaxed(&stats_.bytes_received, arrived.size() * sizeof(Header) + batch.num_rows() * row_bytes);
}

void ExpertComm::combine_send(Batch& batch, const unsigned char* y, uint64_t y_stride_bytes, DType y_dtype,
                              bool is_reduced) {
  require_usable();
  if (batch.owner != this) throw Error(Failure::kArgument, "batch: it was received by another comm");
  if (batch.is_answered) throw Error(Failure::kArgument, "batch: combine_send was already called for it");
  batch.is_answered = true;
  for (const Batch::Message& message : batch.messages) {
    const uint32_t peer_idx = message.arrived.peer_idx;
    const uint32_t first_row = message.first_row;
    CombineSend send{};
    send.peer = links_[peer_idx].view;
    send.slot = message.arrived.slot;
    send.seq = message.seq;
    send.header.layer = batch.layer;
    send.header.microbatch = batch.microbatch;
    send.first_row = first_row;
    send.num_rows = message.arrived.num_rows;
    send.header.num_rows =
        shape_.reduce_at == ReduceAt::kExpert
            ? send.num_rows
            : static_cast<uint32_t>(batch.pair_begin[first_row + send.num_rows] - batch.pair_begin[first_row]);
    send.y = y;
    send.y_stride_bytes = y_stride_bytes;
    send.y_dtype = y_dtype;
    send.is_reduced = is_reduced;
    send.pair_begin = batch.pair_begin.data();
    send.pair_position = batch.pair_position.data();
    send.weights = batch.weights.data();
    {
      // Before the signal: the answer may bring the next message at once.
      std::lock_guard lock(inbox_mutex_);
      inbox(peer_idx, send.slot).seq.replied = message.seq;
    }
    m2n::combine_send(exec_, layout_, shape_, send);
    add_relaxed(&stats_.messages_sent, uint64_t{1});
    add_relaxed(&stats_.rows_sent, uint64_t{send.header.num_rows});
    add_relaxed(&stats_.bytes_sent, sizeof(Header) + send.header.num_rows * layout_.combine_rows.row_bytes);
  }
}

void ExpertComm::recover(uint32_t attention_rank) {
  std::lock_guard lock(inbox_mutex_);
  give_up(attention_rank);
}

// A lost peer ends a wait that would otherwise go on: once no batch is ready, the caller must know.
void ExpertComm::raise_if_lost(const RecvWanted& wanted) {
  for (uint32_t peer_idx = 0; peer_idx < num_links(); ++peer_idx) {
    const Link& link = links_[peer_idx];
    const bool is_awaited = contains(wanted.attention_ranks, link.rank) && find_link(link.rank) == &link;
    if (is_lost(link) || (is_awaited && state_of(link) == PeerState::kLeft)) {
      raise_lost(link, "dispatch_recv");
    }
  }
}

void ExpertComm::raise_timeout(const RecvWanted& wanted) {
  for (uint32_t rank : wanted.attention_ranks) {
    const Link* link = find_link(rank);
    bool is_here = false;
    for (uint32_t slot = 0; link != nullptr && slot < shape_.microbatches; ++slot) {
      is_here |= matches(inbox(static_cast<uint32_t>(link - links_.data()), slot), wanted);
    }
    if (is_here) continue;
    throw Error(Failure::kTimeout,
                "dispatch_recv: attention rank " + std::to_string(rank) +
                    (link == nullptr ? " has not connected" : " has not dispatched") +
                    " in time, others have; with attention_ranks= every listed rank must send, if only zero rows",
                static_cast<int>(rank));
  }
  throw Error(Failure::kTimeout, "dispatch_recv: the listed attention ranks are at different layers or microbatches");
}

}  // namespace m2n
