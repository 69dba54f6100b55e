// SPDX-License-Identifier: Apache-2.0
// dispatch_recv and combine_send on CPU threads: which batch goes next, and whom it waits for.
#include "exchange/host/expert.h"

#include <algorithm>
#include <limits>

#include "exchange/rows/plain_floats.h"

namespace m2n {

ExpertComm::ExpertComm(const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport,
                       const std::vector<uint32_t>& local_experts)
    : ExpertRole(shape, rank, max_peers, transport, local_experts),
      inboxes_(static_cast<size_t>(max_peers) * layout_.num_slots),
      write_choices_(inboxes_.size()),
      holds_(std::make_shared<uint32_t[]>(inboxes_.size())),
      unserved_(max_peers),
      inbox_view_{layout_, shape.max_tokens, peers_, meta_window()->data(), inboxes_.data()},
      next_(local_experts.size()) {
  for (Inbox& box : inboxes_) box.seq = {first_seq_, first_seq_};
}

void ExpertComm::keep_verbs_out(const std::function<void()>& body) {
  std::lock_guard lock(inbox_mutex_);
  note_unserved();
  body();
}

void ExpertComm::note_unserved() {
  Scanned scanned;
  for (uint32_t peer_idx = 0; peer_idx < peers_.size(); ++peer_idx) {
    const PeerState state = peers_.state(peer_idx);
    bool is_pending = false;
    for (uint32_t slot = 0; m2n::is_gone(state) && slot < layout_.num_slots; ++slot) {
      with_sender([&](HostExec& exec) { return look_at(exec, inbox_view_, peer_idx, slot, state, &scanned); });
      is_pending |= inbox(peer_idx, slot).is_pending;
    }
    // One that ends only now has not been looked at once more. Relaxed: it is asked for by who holds this lock, and in
    // words.
    const bool is_unserved = !m2n::is_gone(state) || (is_pending && inbox_view_.is_served(peer_idx));
    store_relaxed(&unserved_[peer_idx], uint32_t{is_unserved});
  }
  if (scanned.num_arrived == 0) return;
  stamp(inbox_view_, now_ns());
  counters_.arrived(scanned.num_arrived);
  counters_.answered(scanned.num_answered);
}

bool ExpertComm::is_held(uint32_t peer_idx) {
  if (!is_closed() && load_relaxed(&unserved_[peer_idx]) != 0) return true;
  for (uint32_t slot = 0; slot < layout_.num_slots; ++slot) {
    if (m2n::is_held(&holds_[peer_idx * layout_.num_slots + slot])) return true;
  }
  return false;
}

std::string ExpertComm::why_held() const {
  return "sent what is not answered: call dispatch_recv and combine_send, or recover() for each";
}

void ExpertComm::reset_peer(uint32_t peer_idx) {
  for (uint32_t slot = 0; slot < layout_.num_slots; ++slot) {
    inbox(peer_idx, slot) = Inbox{};
    inbox(peer_idx, slot).seq = {first_seq_, first_seq_};
    write_choices_[peer_idx * layout_.num_slots + slot] = {};
  }
}

uint32_t ExpertComm::look_around() {
  const Scanned scanned = with_sender([this](HostExec& exec) { return scan(exec, inbox_view_); });
  if (scanned.num_arrived != 0) counters_.arrived(scanned.num_arrived);
  if (scanned.num_answered != 0) counters_.answered(scanned.num_answered);
  if (scanned.violation.breach != Breach::kNone) raise_breach(scanned.violation);
  return scanned.num_arrived;
}

void ExpertComm::look_and_stamp() {
  if (look_around() != 0) stamp(inbox_view_, now_ns());
}

void ExpertComm::raise_breach(const Violation& violation) {
  const uint32_t layer = inbox(violation.peer_idx, violation.slot).header.layer;
  raise_violation(violation.peer_idx, describe(violation, layer));
}

uint32_t ExpertComm::num_just_arrived(const Batch* batch) const {
  uint32_t count = 0;
  if (batch == nullptr) return 0;
  for (const BatchMessage& message : batch->messages) {
    count += inbox_view_.at(message.arrived.peer_idx, message.arrived.slot).seen_ns == kNever;
  }
  return count;
}

std::shared_ptr<Batch> ExpertComm::look(const Wanted& wanted, Found* found) {
  std::shared_ptr<Batch> batch;
  int64_t looked_ns = 0;
  const auto clock = [&] { return looked_ns != 0 ? looked_ns : looked_ns = now_ns(); };
  std::lock_guard lock(inbox_mutex_);
  const uint32_t num_arrived = look_around();
  *found = find_complete(inbox_view_, wanted, clock);
  // All messages of one may be refused; then the next is looked for.
  while (found->is_complete && (batch = collect(found->layer, found->microbatch, wanted)) == nullptr) {
    *found = find_complete(inbox_view_, wanted, clock);
  }
  // What has come and stays lingers from now on. Usually nothing does.
  if (num_arrived > num_just_arrived(batch.get())) stamp(inbox_view_, clock());
  if (batch == nullptr && (has_gone() || wanted.is_strict())) raise_if_lost(wanted, missing_rank(inbox_view_, wanted));
  return batch;
}

int64_t ExpertComm::give_up_at(const Wanted& wanted) {
  if (!wanted.is_strict() || give_up_ns_ == kForeverNs) return kNever;
  std::lock_guard lock(inbox_mutex_);
  int64_t seen_ns = kNever;
  for (uint32_t i = 0; i < peers_.size() * layout_.num_slots; ++i) {
    const uint32_t peer_idx = i / layout_.num_slots;
    if (!wanted.is_listed(rank_of(peer_idx)) || !wanted.matches(inboxes_[i])) continue;
    if (inbox_view_.is_served(peer_idx)) seen_ns = std::min(seen_ns, inboxes_[i].seen_ns);
  }
  return seen_ns == kNever ? kNever : seen_ns + give_up_ns_;
}

bool ExpertComm::give_up_missing(const Wanted& wanted) {
  const int64_t late_ns = give_up_at(wanted);
  if (late_ns == kNever || now_ns() < late_ns) return false;
  std::lock_guard lock(inbox_mutex_);
  const int32_t missing = missing_rank(inbox_view_, wanted);
  const int32_t peer_idx = missing < 0 ? kNone : peers_.find(static_cast<uint32_t>(missing));
  if (peer_idx == kNone || !peers_.is_live(static_cast<uint32_t>(peer_idx))) return false;
  give_up_late(static_cast<uint32_t>(peer_idx));
  return true;
}

std::shared_ptr<Batch> ExpertComm::dispatch_recv(const Wanted& wanted, int64_t deadline_ns) {
  require_microbatch(wanted.is_any_microbatch ? 0 : wanted.microbatch);
  while (true) {
    if (has_gone()) [[unlikely]]
      return_gone();
    Found found;
    std::shared_ptr<Batch> batch = look(wanted, &found);
    if (batch != nullptr) return batch;
    const int64_t seen_linger_ns = found.linger_until_ns, late_ns = give_up_at(wanted);
    // A first message starts the lingering: then wait again, with the shorter deadline.
    const auto is_changed = [&] {
      batch = look(wanted, &found);
      return batch != nullptr || found.linger_until_ns != seen_linger_ns || give_up_at(wanted) != late_ns;
    };
    wait(is_changed, std::min({deadline_ns, seen_linger_ns, late_ns}));
    if (batch != nullptr) return batch;
    if (give_up_missing(wanted)) continue;  // what follows raises
    if (deadline_ns != kNoWait && now_ns() < deadline_ns) continue;
    if (!found.is_started || !wanted.is_strict()) return nullptr;  // what has come stays, and lingers on
    std::lock_guard lock(inbox_mutex_);
    raise_timeout(missing_rank(inbox_view_, wanted));
  }
}

std::optional<Work> ExpertComm::wait_work(int64_t deadline_ns) {
  require_usable();
  std::optional<Work> work;
  const auto look = [&] {
    std::lock_guard lock(inbox_mutex_);
    const uint32_t num_arrived = look_around();
    const Found found = find_complete(inbox_view_, Wanted{}, now_ns);  // without lingering: the first of all
    if (num_arrived != 0) stamp(inbox_view_, now_ns());
    if (found.is_complete) work = Work{found.layer, found.microbatch};
    if (!work) raise_if_lost();
    return work.has_value();
  };
  wait(look, deadline_ns);
  return work;
}

std::shared_ptr<Batch> ExpertComm::collect(uint32_t layer, uint32_t microbatch, const Wanted& wanted) {
  std::shared_ptr<Batch> batch = make_batch();
  batch->owner = this;
  batch->layer = layer;
  batch->microbatch = microbatch;
  batch->hosting = hosting_;
  batch->num_slots = layout_.num_slots;
  if (batch->holds != holds_) batch->holds = holds_;  // one that is used again has them already
  batch->expert_offsets.assign(num_local_experts_ + 1, 0);
  batch->pair_begin.assign(1, 0);
  for (uint32_t peer_idx = 0; peer_idx < peers_.size(); ++peer_idx) {
    if (belongs(inbox_view_, wanted, layer, microbatch, peer_idx)) take_message(*batch, peer_idx, microbatch);
  }
  if (batch->messages.empty()) return nullptr;  // all of them were refused
  for (const BatchMessage& message : batch->messages) {
    inbox(message.arrived.peer_idx, message.arrived.slot).is_pending = false;
  }
  build_lists(*batch);
  return batch;
}

void ExpertComm::take_message(Batch& batch, uint32_t peer_idx, uint32_t slot) {
  const uint32_t first_row = batch.messages.empty() ? 0 : batch.messages.back().end_row();
  const BatchMessage message = message_of(inbox_view_, peer_idx, slot, first_row);
  const size_t from = size_t{first_row} * shape_.top_k;
  const size_t end = size_t{message.end_row()} * shape_.top_k;
  if (idxs_.size() < end) {
    idxs_.resize(end);
    row_weights_.resize(end);
  }
  int32_t* idxs = idxs_.data() + from;
  const Hosted hosted{shape_.num_experts, expert_idx_.data()};
  Violation violation;
  const Taken taken = with_sender([&](HostExec& exec) {
    return m2n::take_message(exec, inbox_view_, message.arrived, hosted, idxs, row_weights_.data() + from, &violation);
  });
  if (taken == Taken::kBroken) raise_breach(violation);
  if (taken == Taken::kRefused) {
    counters_.answered(1);
    return;
  }
  count_pairs(idxs, message.arrived.num_rows, shape_.top_k, batch.expert_offsets.data());
  batch.messages.push_back(message);
  add_hold(&holds_[peer_idx * layout_.num_slots + slot]);  // under the lock that the returner takes too
  batch.ranks.push_back(rank_of(peer_idx));
}

void ExpertComm::build_lists(Batch& batch) {
  uint64_t num_pairs = 0;
  for (int32_t count : batch.expert_offsets) num_pairs += static_cast<uint64_t>(count);
  batch.pair_begin.resize(batch.messages.back().end_row() + size_t{1});
  batch.pair_position.resize(num_pairs);
  batch.row_index_by_expert.resize(num_pairs);
  batch.weights.resize(num_pairs);
  const BatchView view{batch.pair_begin.data(), batch.pair_position.data(), batch.row_index_by_expert.data(),
                       batch.expert_offsets.data(), batch.weights.data()};
  m2n::dispatch_recv(layout_, batch.messages.data(), static_cast<uint32_t>(batch.messages.size()), idxs_.data(),
                     row_weights_.data(), num_local_experts_, next_.data(), view);
  counters_.taken(batch.messages.size(), batch.num_rows());
}

void ExpertComm::combine_send(Batch& batch, const unsigned char* y, uint64_t y_stride_bytes, DType y_dtype,
                              bool is_reduced) {
  require_answerable(batch.owner, batch.is_answered, y_dtype);
  batch.is_answered = true;
  answer(batch, y, y_stride_bytes, y_dtype, is_reduced);
  if (has_gone()) [[unlikely]]
    return_gone();
}

void ExpertComm::answer(Batch& batch, const unsigned char* y, uint64_t y_stride_bytes, DType y_dtype, bool is_reduced) {
  struct Over {
    Batch& batch;
    ~Over() { batch.drop_holds(); }
  };
  const Over over{batch};
  const PlainFloats floats;
  uint64_t num_rows = 0;
  CombineSend send{};
  send.header.layer = batch.layer;
  send.header.microbatch = batch.microbatch;
  send.y = y;
  send.y_stride_bytes = y_stride_bytes;
  send.y_dtype = y_dtype;
  send.is_reduced = is_reduced;
  send.pair_begin = batch.pair_begin.data();
  send.pair_position = batch.pair_position.data();
  send.weights = batch.weights.data();
  for (const BatchMessage& message : batch.messages) {
    const uint32_t peer_idx = message.arrived.peer_idx;
    send.peer = peers_.entries[peer_idx].view;
    send.slot = message.arrived.slot;
    send.seq = message.seq;
    choose_rows(send, shape_.reduce_at, message.first_row, message.arrived.num_rows);
    {
      // Before the signal: the answer may bring the next message at once.
      std::lock_guard lock(inbox_mutex_);
      inbox(peer_idx, send.slot).seq.replied = message.seq;
    }
    const auto put = [&](bool is_streamed) {
      send.is_streamed = is_streamed;
      with_sender([&](HostExec& exec) { m2n::combine_send(exec, layout_, shape_, send); }, /*is_free_after=*/true);
    };
    WriteChoice& choice = write_choices_[peer_idx * layout_.num_slots + send.slot];
    if (is_over_network(peer_idx)) {
      put(false);
    } else {
      choice.send(send.header.num_rows * layout_.combine_rows.row_bytes, put);
    }
    num_rows += send.header.num_rows;
  }
  counters_.sent(batch.messages.size(), num_rows);
}

void ExpertComm::recover(uint32_t attention_rank) {
  require_usable();  // before the lock: in a forked child nobody may be left to free it
  {
    std::lock_guard lock(inbox_mutex_);
    for (uint32_t peer_idx : give_up(attention_rank)) {
      for (uint32_t slot = 0; slot < layout_.num_slots; ++slot) inbox(peer_idx, slot).is_pending = false;
    }
  }
  return_gone();
}

void ExpertComm::set_experts(const std::vector<uint32_t>& local_experts) {
  require_usable();
  std::lock_guard lock(inbox_mutex_);
  host(local_experts);
  next_.resize(local_experts.size());
  ++hosting_;
}

ExpertRole::PlacementVersions ExpertComm::placement_versions() {
  require_usable();
  look_at_network();
  std::lock_guard lock(inbox_mutex_);
  look_and_stamp();
  return list_versions([this](uint32_t peer_idx) { return shown_version(inbox_view_, peer_idx); });
}

void ExpertComm::wait_placement(uint32_t version, int64_t deadline_ns) {
  const std::string doing = "wait_placement(" + std::to_string(version) + ")";
  int32_t behind = kNone;
  uint32_t shown = 0;
  const auto is_shown = [&] {
    std::lock_guard lock(inbox_mutex_);
    look_and_stamp();
    behind = find_behind(version, [&](uint32_t peer_idx) { return shown = shown_version(inbox_view_, peer_idx); });
    if (behind != kNone) raise_if_lost(doing.c_str());
    return behind == kNone;
  };
  if (wait(is_shown, deadline_ns) == WaitResult::kTimeout) raise_behind(static_cast<uint32_t>(behind), version, shown);
}

}  // namespace m2n
