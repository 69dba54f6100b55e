// SPDX-License-Identifier: Apache-2.0
// dispatch_recv and combine_send as launches.
#include "exchange/device_expert.h"

#include <algorithm>

namespace m2n {

DeviceExpertComm::DeviceExpertComm(const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport,
                                   const std::string& device, const std::vector<uint32_t>& local_experts)
    : ExpertSide(shape, rank, max_peers, transport, local_experts),
      memory_(device, *transport_),
      received_(memory_.on_host<Received>(1)),
      ranks_(memory_.on_host<uint32_t>(max_peers)),
      wanted_ranks_(memory_.on_host<uint32_t>(max_peers)),
      received_event_(memory_.machine().make_event()) {
  const uint64_t per_slot = uint64_t{layout_.num_slots} * max_peers;
  const uint64_t max_pairs = uint64_t{max_peers} * shape_.max_tokens * shape_.top_k;
  Inbox inbox;
  inbox.seq = {first_seq_, first_seq_};
  view_.inbox.layout = layout_;
  view_.inbox.max_tokens = shape_.max_tokens;
  view_.inbox.peers = peers_;
  view_.inbox.small = small_window()->data();
  view_.inbox.inboxes = memory_.uploaded(std::vector<Inbox>(per_slot, inbox));
  view_.shape = shape_;
  view_.max_peers = max_peers;
  view_.expert_idx = memory_.uploaded(expert_idx_);
  view_.num_local_experts = num_local_experts_;
  for (uint32_t slot = 0; slot < layout_.num_slots; ++slot) {
    slots_.push_back(make_lists());
    sent_.push_back(memory_.machine().make_event());
  }
  view_.slots = memory_.uploaded(slots_);
  view_.idxs = memory_.on_device<int32_t>(max_pairs);
  view_.row_weights = memory_.on_device<float>(max_pairs);
  view_.arrived = memory_.on_device<ArrivedMessage>(max_peers);
  view_.next = memory_.on_device<int32_t>(num_local_experts_);
  view_.arrivals = memory_.on_device<uint32_t>(per_slot);
  view_.control = memory_.control();
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
  return slot;
}

Received DeviceExpertComm::receive(const Wanted& wanted, bool is_peek, int64_t deadline_ns, Stream stream,
                                   const std::shared_ptr<DeviceBatch>& batch) {
  std::lock_guard receive_lock(receive_mutex_);
  require_usable();
  Machine& machine = memory_.machine();
  ReceiveVerb verb{view_, wanted, is_peek, 0, received_, ranks_};
  std::copy_n(wanted.attention_ranks, wanted.num_attention_ranks, wanted_ranks_);
  verb.wanted.attention_ranks = wanted_ranks_;
  {
    std::lock_guard lock(open_mutex_);
    verb.wanted.open_slots = open_slots_;
  }
  verb.timeout_ns = std::clamp<int64_t>(deadline_ns - now_ns(), 0, kSliceNs);
  for (uint32_t slot = 0; slot < layout_.num_slots; ++slot) {
    if ((verb.wanted.open_slots >> slot & 1) == 0) machine.wait(stream, sent_[slot].get());
  }
  machine.launch(verb, stream);
  machine.record(received_event_.get(), stream);
  machine.synchronize(received_event_.get());
  const Received received = *received_;
  if (received.is_batch && batch != nullptr) {
    std::lock_guard lock(open_mutex_);
    open_slots_ |= uint64_t{1} << received.microbatch;
    batch->ranks.assign(ranks_, ranks_ + received.num_messages);
  }
  return received;
}

Received DeviceExpertComm::receive_until(const Wanted& wanted, bool is_peek, int64_t deadline_ns, Stream stream,
                                         const std::shared_ptr<DeviceBatch>& batch) {
  require_usable();
  if (wanted.num_attention_ranks > max_peers_) {
    throw Error(Failure::kArgument, "attention_ranks: " + std::to_string(wanted.num_attention_ranks) +
                                        " ranks, but max_peers is " + std::to_string(max_peers_));
  }
  while (true) {
    const Received received = receive(wanted, is_peek, deadline_ns, stream, batch);
    add_relaxed(&stats_.messages_received, uint64_t{received.num_arrived});
    add_relaxed(&stats_.messages_sent, uint64_t{received.num_answered});
    if (received.violation.breach != Breach::kNone) {
      raise_violation(received.violation.peer_idx, describe(received.violation, received.violation_layer));
    }
    if (received.is_batch) return received;
    raise_if_lost(wanted);
    if (now_ns() >= deadline_ns) return received;
    if (on_sleep != nullptr) on_sleep();
  }
}

std::shared_ptr<DeviceBatch> DeviceExpertComm::dispatch_recv(const Wanted& wanted, int64_t deadline_ns, Stream stream) {
  const auto batch = std::make_shared<DeviceBatch>();
  const Received received = receive_until(wanted, /*is_peek=*/false, deadline_ns, stream, batch);
  if (!received.is_batch) {
    if (received.is_started && wanted.is_strict()) raise_timeout(received.missing_rank);
    return nullptr;  // what has arrived stays, and goes on lingering from when it came
  }
  batch->owner = this;
  batch->layer = received.layer;
  batch->microbatch = received.microbatch;
  batch->num_messages = received.num_messages;
  batch->num_rows = received.num_rows;
  batch->num_pairs = received.num_pairs;
  batch->num_local_experts = num_local_experts_;
  batch->device = memory_.device();
  batch->lists = slots_[received.microbatch].lists;
  batch->memory = list_memory_[received.microbatch];
  count_batch(received.num_messages, received.num_rows);
  return batch;
}

std::optional<Work> DeviceExpertComm::wait_work(int64_t deadline_ns, Stream stream) {
  const Received received = receive_until(Wanted{}, /*is_peek=*/true, deadline_ns, stream, nullptr);
  if (!received.is_batch) return std::nullopt;
  return Work{received.layer, received.microbatch};
}

void DeviceExpertComm::combine_send(DeviceBatch& batch, const unsigned char* y, uint64_t y_stride_bytes, DType y_dtype,
                                    bool is_reduced, Stream stream) {
  require_unanswered(batch.owner, batch.is_answered);
  batch.is_answered = true;
  const CombineSendVerb verb{view_, batch.microbatch, batch.layer, batch.num_messages,
                             y,     y_stride_bytes,   y_dtype,     is_reduced};
  memory_.machine().launch(verb, stream);
  memory_.machine().record(sent_[batch.microbatch].get(), stream);
  {
    std::lock_guard lock(open_mutex_);
    open_slots_ &= ~(uint64_t{1} << batch.microbatch);
  }
  count_sent(batch.num_messages, shape_.reduce_at == ReduceAt::kExpert ? batch.num_rows : batch.num_pairs);
}

void DeviceExpertComm::close() {
  if (is_own_process() && !is_closed()) {
    store_release(&memory_.control()->abort, 1u);  // SYNC: verb-abort
    for (const auto& sent : sent_) memory_.machine().synchronize(sent.get());
  }
  Comm::close();
}

}  // namespace m2n
