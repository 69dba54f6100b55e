// SPDX-License-Identifier: Apache-2.0
// dispatch_recv and combine_send as launches.
#include "exchange/device/expert.h"

#include <algorithm>
#include <chrono>
#include <thread>

namespace m2n {
namespace {

constexpr int64_t kVersionPauseNs = 1'000'000;  // between two looks at the versions that peers have shown

}  // namespace

DeviceExpertComm::DeviceExpertComm(const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport,
                                   const std::string& device, const std::vector<uint32_t>& local_experts)
    : DeviceComm(device, shape, rank, max_peers, transport, local_experts),
      unserved_(max_peers),
      received_(memory_.on_host<Received>(1)),
      ranks_(memory_.on_host<uint32_t>(max_peers)),
      versions_(memory_.on_host<uint32_t>(max_peers)),
      launched_(memory_.on_host<Received>(layout_.num_slots)),
      is_unread_(memory_.on_host<uint64_t>(layout_.num_slots)),
      received_event_(memory_.machine().make_event()) {
  const uint64_t per_slot = uint64_t{layout_.num_slots} * max_peers;
  const uint64_t max_pairs = uint64_t{max_peers} * shape_.max_tokens * shape_.top_k;
  Inbox inbox;
  inbox.seq = {first_seq_, first_seq_};
  view_.inbox.layout = layout_;
  view_.inbox.max_tokens = shape_.max_tokens;
  view_.peers = memory_.mirror(peers_, max_peers);
  view_.inbox.peers = view_.peers.table;
  view_.inbox.meta = meta_window()->data();
  view_.inbox.inboxes = memory_.uploaded(std::vector<Inbox>(per_slot, inbox));
  view_.shape = shape_;
  view_.max_peers = max_peers;
  view_.expert_idx = memory_.uploaded(expert_idx_);
  view_.num_local_experts = num_local_experts_;
  for (uint32_t slot = 0; slot < layout_.num_slots; ++slot) slots_.push_back(make_lists());
  batches_.resize(layout_.num_slots);
  view_.slots = memory_.uploaded(slots_);
  view_.idxs = memory_.on_device<int32_t>(max_pairs);
  view_.row_weights = memory_.on_device<float>(max_pairs);
  view_.counts = memory_.on_device<uint32_t>(tally_words(num_local_experts_ + 1));
  view_.control = memory_.control();
  view_.counters = memory_.counters();
}

void DeviceExpertComm::keep_verbs_out(const std::function<void()>& body) {
  DeviceComm::keep_verbs_out([&] {
    for (uint32_t peer_idx = 0; peer_idx < peers_.size(); ++peer_idx) {
      // Relaxed: as of ExpertComm.
      store_relaxed(&unserved_[peer_idx], uint32_t{!is_gone(peer_idx) || has_unserved(peer_idx)});
    }
    body();
  });
}

bool DeviceExpertComm::has_unserved(uint32_t peer_idx) {
  if (peers_.is_given_up(peer_idx) || peers_.find(rank_of(peer_idx)) != static_cast<int32_t>(peer_idx)) return false;
  Machine& machine = memory_.machine();
  std::vector<Inbox> boxes(layout_.num_slots);
  machine.copy(boxes.data(), view_.inbox.inboxes + uint64_t{peer_idx} * layout_.num_slots,
               boxes.size() * sizeof(Inbox));
  for (uint32_t slot = 0; slot < layout_.num_slots; ++slot) {
    Signal signal;
    machine.copy(&signal, own_signal(peer_idx, slot), sizeof signal);
    const bool is_new = !boxes[slot].is_closed && signal_seq(without_ahead(signal)) == boxes[slot].seq.accepted + 1;
    if (is_new || boxes[slot].is_pending) return true;
  }
  return false;
}

bool DeviceExpertComm::is_between_rounds() {
  const auto is_open = [](const std::weak_ptr<DeviceBatch>& last) {
    const auto batch = last.lock();
    return batch != nullptr && !batch->is_answered;
  };
  return std::none_of(batches_.begin(), batches_.end(), is_open) && memory_.machine().is_passed(received_event_.get());
}

void DeviceExpertComm::reset_peer(uint32_t peer_idx) {
  Inbox inbox;
  inbox.seq = {first_seq_, first_seq_};
  const std::vector<Inbox> fresh(layout_.num_slots, inbox);
  memory_.machine().copy(&view_.inbox.inboxes[peer_idx * layout_.num_slots], fresh.data(),
                         fresh.size() * sizeof(Inbox));
  if (waits_ != nullptr) waits_->forget(peer_idx);
}

SlotLists DeviceExpertComm::make_lists() {
  const uint64_t max_rows = uint64_t{max_peers_} * shape_.max_tokens;
  const uint64_t max_pairs = max_rows * shape_.top_k;
  const uint64_t words = max_rows + 1 + 3 * max_pairs + num_local_experts_ + 1;
  list_memory_.push_back(memory_.machine().allocate(words * sizeof(int32_t)));
  SlotLists slot{};
  slot.lists.pair_begin = static_cast<int32_t*>(list_memory_.back().get());
  slot.lists.pair_position = slot.lists.pair_begin + max_rows + 1;
  slot.lists.row_index_by_expert = slot.lists.pair_position + max_pairs;
  slot.lists.expert_offsets = slot.lists.row_index_by_expert + max_pairs;
  slot.lists.weights = reinterpret_cast<float*>(slot.lists.expert_offsets + num_local_experts_ + 1);
  slot.messages = memory_.on_device<BatchMessage>(max_peers_);
  slot.state = memory_.on_device<BatchState>(1);
  return slot;
}

const uint32_t* DeviceExpertComm::keep_ranks(const Wanted& wanted) {
  if (!wanted.is_strict()) return nullptr;
  const std::vector<uint32_t> ranks(wanted.attention_ranks, wanted.attention_ranks + wanted.num_attention_ranks);
  const auto [entry, is_new] = kept_ranks_.try_emplace(ranks, nullptr);
  if (is_new) entry->second = memory_.uploaded(ranks);
  return entry->second;
}

void DeviceExpertComm::require_few_ranks(const Wanted& wanted) const {
  if (wanted.num_attention_ranks <= max_peers_) return;
  throw Error(Failure::kArgument, "attention_ranks: " + std::to_string(wanted.num_attention_ranks) +
                                      " ranks, but max_peers is " + std::to_string(max_peers_));
}

std::shared_ptr<DeviceBatch> DeviceExpertComm::make_batch(uint32_t layer, uint32_t microbatch) {
  const auto batch = std::make_shared<DeviceBatch>();
  batch->owner = this;
  batch->layer = layer;
  batch->microbatch = microbatch;
  batch->num_local_experts = num_local_experts_;
  batch->device = memory_.device();
  batch->slot = slots_[microbatch];
  batch->memory = list_memory_[microbatch];
  batches_[microbatch] = batch;
  return batch;
}

Received DeviceExpertComm::receive(const Wanted& wanted, bool is_peek, int64_t deadline_ns, Stream stream,
                                   const std::shared_ptr<DeviceBatch>& batch, std::vector<uint32_t>* versions) {
  std::lock_guard receive_lock(receive_mutex_);
  require_usable();
  Machine& machine = memory_.machine();
  if (machine.is_capturing(stream)) {
    throw Error(
        Failure::kSetup,
        "dispatch_recv: a graph cannot be captured while the host waits for rows; name layer and microbatch, and "
        "give sync=False");
  }
  raise_trouble();
  ReceiveVerb verb{view_, wanted, is_peek, 0, received_, ranks_, nullptr};
  verb.wanted.attention_ranks = keep_ranks(wanted);
  verb.timeout_ns = std::clamp<int64_t>(deadline_ns - now_ns(), 0, kSliceNs);
  if (versions != nullptr) verb.versions = versions_;
  {
    const auto launching = this->launching();
    machine.wait(stream, received_event_.get());
    machine.launch(verb, stream);
    machine.record(received_event_.get(), stream);
  }
  machine.synchronize(received_event_.get());
  const Received received = *received_;
  if (versions != nullptr) versions->assign(versions_, versions_ + max_peers_);
  if (received.is_batch && batch != nullptr) batch->ranks.assign(ranks_, ranks_ + received.num_messages);
  return received;
}

void DeviceExpertComm::raise_if_broken(const Received& received) {
  if (received.violation.breach == Breach::kNone) return;
  raise_violation(received.violation.peer_idx, describe(received.violation, received.violation_layer));
}

Received DeviceExpertComm::receive_until(const Wanted& wanted, bool is_peek, int64_t deadline_ns, Stream stream,
                                         const std::shared_ptr<DeviceBatch>& batch) {
  require_microbatch(wanted.is_any_microbatch ? 0 : wanted.microbatch);
  require_few_ranks(wanted);
  while (true) {
    if (has_gone()) return_gone();
    const Received received = receive(wanted, is_peek, deadline_ns, stream, batch);
    raise_if_broken(received);
    if (received.is_batch) {
      waits_since_ns_ = 0;
      return received;
    }
    raise_if_lost(wanted, received.missing_rank);
    give_up_missing(received);
    if (now_ns() >= deadline_ns) return received;
    if (on_sleep != nullptr) on_sleep();
  }
}

void DeviceExpertComm::give_up_missing(const Received& received) {
  if (give_up_ns_ == kForeverNs || !received.is_started || received.missing_rank < 0) {
    waits_since_ns_ = 0;
    return;
  }
  const int64_t now = now_ns();
  if (waits_since_ns_ == 0) waits_since_ns_ = now;
  const int32_t peer_idx = peers_.find(static_cast<uint32_t>(received.missing_rank));
  if (now - waits_since_ns_ < give_up_ns_ || peer_idx == kNone) return;
  waits_since_ns_ = 0;
  give_up_late(static_cast<uint32_t>(peer_idx));
  raise_if_lost();
}

std::shared_ptr<DeviceBatch> DeviceExpertComm::dispatch_recv(const Wanted& wanted, int64_t deadline_ns, Stream stream) {
  const auto found = std::make_shared<DeviceBatch>();
  const Received received = receive_until(wanted, /*is_peek=*/false, deadline_ns, stream, found);
  if (!received.is_batch) {
    if (received.is_started && wanted.is_strict()) raise_timeout(received.missing_rank);
    return nullptr;  // what has arrived stays, and goes on lingering from when it came
  }
  const auto batch = make_batch(received.layer, received.microbatch);
  batch->is_counted = true;
  batch->ranks = std::move(found->ranks);
  batch->num_rows = received.num_rows;
  batch->num_pairs = received.num_pairs;
  return batch;
}

std::shared_ptr<DeviceBatch> DeviceExpertComm::launch_recv(const Wanted& wanted, int64_t timeout_ns, Stream stream) {
  std::lock_guard receive_lock(receive_mutex_);
  require_few_ranks(wanted);
  require_microbatch(wanted.microbatch);
  raise_trouble();
  Machine& machine = memory_.machine();
  const uint32_t slot = wanted.microbatch;
  if (const auto open = batches_[slot].lock(); open != nullptr && !open->is_answered) {
    throw Error(Failure::kSlotBusy, "dispatch_recv: the last batch of microbatch " + std::to_string(slot) +
                                        " is not answered, and its lists are in use; call combine_send first");
  }
  const bool is_captured = machine.is_capturing(stream);
  if (is_captured && wanted.is_strict() &&
      !kept_ranks_.contains({wanted.attention_ranks, wanted.attention_ranks + wanted.num_attention_ranks})) {
    throw Error(Failure::kSetup,
                "dispatch_recv: memory cannot be allocated while a graph is captured; receive once with these "
                "attention_ranks before");
  }
  ReceiveVerb verb{view_, wanted, /*is_peek=*/false, timeout_ns, &launched_[slot], nullptr, &is_unread_[slot]};
  verb.wanted.attention_ranks = keep_ranks(wanted);
  const auto launching = this->launching();
  if (!is_captured) machine.wait(stream, received_event_.get());
  begin_round(slot, stream, [&](uint32_t rank) { return wanted.is_listed(rank); });
  verb.stream_wait = wait_on_stream(slot, timeout_ns, stream);
  machine.launch(verb, stream);
  if (!is_captured) machine.record(received_event_.get(), stream);
  note_launch(slot, stream);
  const auto batch = make_batch(wanted.layer, slot);
  batch->num_rows = max_peers_ * shape_.max_tokens;
  batch->num_pairs = batch->num_rows * std::min(shape_.top_k, num_local_experts_);
  return batch;
}

std::optional<Work> DeviceExpertComm::wait_work(int64_t deadline_ns, Stream stream) {
  const Received received = receive_until(Wanted{}, /*is_peek=*/true, deadline_ns, stream, nullptr);
  if (!received.is_batch) return std::nullopt;
  return Work{received.layer, received.microbatch};
}

std::vector<uint32_t> DeviceExpertComm::read_versions(Stream stream) {
  std::vector<uint32_t> versions;
  raise_if_broken(receive(Wanted{}, /*is_peek=*/true, /*deadline_ns=*/0, stream, nullptr, &versions));
  return versions;
}

ExpertRole::PlacementVersions DeviceExpertComm::placement_versions(Stream stream) {
  const std::vector<uint32_t> versions = read_versions(stream);
  return list_versions([&](uint32_t peer_idx) { return versions[peer_idx]; });
}

void DeviceExpertComm::wait_placement(uint32_t version, int64_t deadline_ns, Stream stream) {
  const std::string doing = "wait_placement(" + std::to_string(version) + ")";
  while (true) {
    const std::vector<uint32_t> versions = read_versions(stream);
    const int32_t behind = find_behind(version, [&](uint32_t peer_idx) { return versions[peer_idx]; });
    if (behind == kNone) return;
    raise_if_lost(doing.c_str());
    if (now_ns() >= deadline_ns) {
      raise_behind(static_cast<uint32_t>(behind), version, versions[static_cast<uint32_t>(behind)]);
    }
    if (on_sleep != nullptr) on_sleep();
    std::this_thread::sleep_for(std::chrono::nanoseconds(kVersionPauseNs));  // messages that wait do not end it
  }
}

void DeviceExpertComm::combine_send(DeviceBatch& batch, const unsigned char* y, uint64_t y_stride_bytes, DType y_dtype,
                                    bool is_reduced, uint32_t num_sms, Stream stream) {
  require_answerable(batch.owner, batch.is_answered, y_dtype);
  const auto launching = this->launching();
  batch.is_answered = true;
  const CombineSendVerb verb{view_, batch.slot, batch.microbatch, y, y_stride_bytes, y_dtype, is_reduced};
  const uint64_t num_bytes = (is_reduced ? batch.num_rows : batch.num_pairs) * layout_.combine_rows.row_bytes;
  memory_.machine().launch(verb, num_sms, num_bytes, stream);
  note_launch(batch.microbatch, stream);
}

void DeviceExpertComm::use_stream_waits() {
  wait_on_streams([is_unread = is_unread_](uint32_t slot) {
    return load_acquire(&is_unread[slot]) != 0;  // SYNC: receive-status
  });
}

void DeviceExpertComm::raise_trouble() {
  for (uint32_t slot = 0; slot < layout_.num_slots; ++slot) {
    if (load_acquire(&is_unread_[slot]) == 0) continue;  // SYNC: receive-status
    const Received received = launched_[slot];
    store_release(&is_unread_[slot], uint64_t{0});  // SYNC: receive-status
    doubt_rounds(slot);
    raise_if_broken(received);
    if (received.is_started) raise_timeout(received.missing_rank);
    throw Error(Failure::kTimeout, "dispatch_recv(microbatch=" + std::to_string(slot) +
                                       "): no attention rank has dispatched in time; its lists were left empty");
  }
}

}  // namespace m2n
