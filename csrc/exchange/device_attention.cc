// SPDX-License-Identifier: Apache-2.0
// dispatch_send and combine_recv as launches: what the host checks before one, and what it raises after one.
#include "exchange/device_attention.h"

#include <algorithm>

namespace m2n {

DeviceRoute::~DeviceRoute() { pool_->give(std::move(memory_)); }

bool RoutePool::take(DeviceRoute::Memory& memory) {
  std::lock_guard lock(mutex_);
  if (free_.empty()) return false;
  memory = std::move(free_.back());
  free_.pop_back();
  return true;
}

void RoutePool::give(DeviceRoute::Memory memory) {
  std::lock_guard lock(mutex_);
  free_.push_back(std::move(memory));
}

DeviceAttentionComm::DeviceAttentionComm(const Shape& shape, uint32_t rank, uint32_t max_peers,
                                         const std::string& transport, const std::string& device,
                                         const std::vector<int32_t>& rank_offsets, const std::vector<int32_t>& ranks,
                                         uint32_t num_ranks)
    : AttentionSide(shape, rank, max_peers, transport),
      num_ranks_(num_ranks),
      memory_(device, *transport_),
      rank_offsets_(memory_.uploaded(rank_offsets)),
      ranks_(memory_.uploaded(ranks)),
      slot_routes_(memory_.on_host<RouteView>(layout_.num_slots)),
      poll_microbatches_(memory_.on_host<uint32_t>(layout_.num_slots)),
      poll_found_(memory_.on_host<int32_t>(1)),
      poll_event_(memory_.machine().make_event()),
      slots_(layout_.num_slots) {
  if (num_ranks > max_peers) {
    throw Error(Failure::kArgument, "max_peers: the placement has " + std::to_string(num_ranks) +
                                        " expert ranks, max_peers is " + std::to_string(max_peers));
  }
  const uint64_t per_slot = uint64_t{layout_.num_slots} * max_peers;
  view_.layout = layout_;
  view_.shape = shape_;
  view_.max_peers = max_peers;
  view_.peers = peers_;
  view_.rows = rows_window()->data();
  view_.small = small_window()->data();
  view_.seqs = memory_.uploaded(std::vector<SendSeq>(per_slot, SendSeq{first_seq_, first_seq_, 0}));
  view_.slots = memory_.on_device<SlotState>(layout_.num_slots);
  view_.peers_of_ranks = memory_.on_device<int32_t>(per_slot);
  view_.sources_of_ranks = memory_.on_device<int32_t>(per_slot);
  view_.arrivals = memory_.on_device<uint32_t>(per_slot);
  view_.control = memory_.control();
  view_.status = memory_.on_host<uint64_t>(max_peers);
  no_rows_.num_ranks = num_ranks;
  no_rows_.row_offsets = memory_.on_device<uint32_t>(num_ranks + 1);
  no_rows_.pair_counts = memory_.on_device<uint32_t>(num_ranks);
  for (Slot& slot : slots_) slot.last_launch = memory_.machine().make_event();
}

bool DeviceAttentionComm::is_busy(uint32_t microbatch) const {
  require_microbatch(microbatch);
  return slots_[microbatch].is_busy;
}

uint32_t DeviceAttentionComm::num_tokens(uint32_t microbatch) {
  if (!is_busy(microbatch)) {
    raise_trouble();  // it may be why
    raise_nothing_sent(microbatch);
  }
  return slots_[microbatch].route->view.num_tokens;
}

DeviceRoute::Memory DeviceAttentionComm::make_route_memory() {
  DeviceRoute::Memory memory;
  if (pool_->take(memory)) return memory;
  const uint64_t num_pairs = uint64_t{shape_.max_tokens} * shape_.top_k;
  const uint64_t words = 3 * uint64_t{num_ranks_} + 1 + num_pairs * (6 + 2 * uint64_t{shape_.top_k});
  memory.device = memory_.machine().allocate(words * sizeof(uint32_t));
  memory.host = transport_->make_words(sizeof(RouteOutcome) + (2 * uint64_t{num_ranks_} + 1) * sizeof(uint32_t));
  memory.last_use = memory_.machine().make_event();
  return memory;
}

std::shared_ptr<DeviceRoute> DeviceAttentionComm::make_route(const TopKView& topk, const std::vector<uint32_t>& splits,
                                                             Stream stream) {
  require_usable();
  if (!splits.empty() && splits.size() != num_ranks_) {
    throw Error(Failure::kArgument, "splits: expected one number of rows for each of " + std::to_string(num_ranks_) +
                                        " expert ranks, got " + std::to_string(splits.size()));
  }
  const auto route = std::make_shared<DeviceRoute>(pool_, make_route_memory());
  route->owner = this;
  RouteVerb verb{};
  auto* words = static_cast<uint32_t*>(route->memory().device.get());
  const auto take = [&]<class T>(T*& array, uint64_t count) {
    array = reinterpret_cast<T*>(words);
    words += count;
  };
  const uint64_t num_pairs = uint64_t{shape_.max_tokens} * shape_.top_k;  // rows <= pairs
  RouteView& view = route->view;
  view.num_tokens = topk.num_tokens;
  view.num_ranks = num_ranks_;
  take(view.row_offsets, num_ranks_ + 1);
  take(view.next_row, num_ranks_);
  take(view.pair_counts, num_ranks_);
  take(view.token_of_row, num_pairs);
  take(view.source_rank, num_pairs);
  take(view.source_row, num_pairs);
  take(view.source_weight, num_pairs);
  take(view.ids, num_pairs * shape_.top_k);
  take(view.weights, num_pairs * shape_.top_k);
  take(verb.ids, num_pairs);
  take(verb.weights, num_pairs);
  verb.route = view;
  verb.shape = shape_;
  verb.topk_ids = topk.ids;
  verb.id_type = topk.id_type;
  verb.ids_stride = topk.ids_stride;
  verb.ids_step = topk.ids_step;
  verb.topk_weights = topk.weights;
  verb.weight_type = topk.weight_type;
  verb.weights_stride = topk.weights_stride;
  verb.weights_step = topk.weights_step;
  verb.rank_offsets = rank_offsets_;
  verb.ranks = ranks_;
  verb.own_rank = rank_;
  verb.outcome = static_cast<RouteOutcome*>(route->memory().host.get());
  verb.rows_per_rank = reinterpret_cast<uint32_t*>(verb.outcome + 1);
  if (!splits.empty()) {
    uint32_t* offsets = verb.rows_per_rank + num_ranks_;
    offsets[0] = 0;
    for (uint32_t rank = 0; rank < num_ranks_; ++rank) offsets[rank + 1] = offsets[rank] + splits[rank];
    verb.split_offsets = offsets;
  }
  Machine& machine = memory_.machine();
  void* event = route->memory().last_use.get();
  machine.wait(stream, event);
  machine.launch(verb, stream);
  machine.record(event, stream);
  machine.synchronize(event);
  require_built(verb.outcome->result, shape_);
  route->num_rows = verb.outcome->num_rows;
  route->num_pairs = verb.outcome->num_pairs;
  route->rows_per_rank.assign(verb.rows_per_rank, verb.rows_per_rank + num_ranks_);
  if (!splits.empty()) require_full_splits(topk.num_tokens, route->num_rows);
  return route;
}

template <class V>
void DeviceAttentionComm::launch_on_slot(Slot& slot, const V& verb, Stream stream) {
  Machine& machine = memory_.machine();
  if (slot.stream != stream) machine.wait(stream, slot.last_launch.get());
  machine.launch(verb, stream);
  machine.record(slot.last_launch.get(), stream);
  slot.stream = stream;
}

DispatchVerb DeviceAttentionComm::dispatch_verb(uint32_t microbatch, uint32_t layer, int64_t timeout_ns) const {
  DispatchVerb verb{};
  verb.view = view_;
  verb.route = no_rows_;
  verb.slot = microbatch;
  verb.layer = layer;
  verb.first_rank = rank_ % num_ranks_;
  verb.timeout_ns = timeout_ns;
  return verb;
}

void DeviceAttentionComm::dispatch_send(const unsigned char* x, uint64_t x_stride_bytes,
                                        std::shared_ptr<const DeviceRoute> route, uint32_t microbatch, uint32_t layer,
                                        int64_t timeout_ns, Stream stream) {
  require_microbatch(microbatch);
  raise_trouble();
  if (route->owner != this) throw Error(Failure::kArgument, "route: it was made by another comm");
  Slot& slot = slots_[microbatch];
  if (slot.is_busy) raise_slot_busy(microbatch, slot.layer);
  for (uint32_t expert_rank = 0; expert_rank < num_ranks_; ++expert_rank) {
    if (route->rows_per_rank[expert_rank] != 0) require_live(expert_rank);
  }
  DispatchVerb verb = dispatch_verb(microbatch, layer, timeout_ns);
  verb.route = route->view;
  verb.x = x;
  verb.x_stride_bytes = x_stride_bytes;
  slot_routes_[microbatch] = route->view;
  slot.route = std::move(route);
  slot.layer = layer;
  slot.is_busy = true;
  launch_on_slot(slot, verb, stream);
  count_sent(num_ranks_, slot.route->num_rows);
}

void DeviceAttentionComm::combine_recv(unsigned char* y, uint64_t y_stride_bytes, uint32_t microbatch,
                                       int64_t timeout_ns, Stream stream) {
  num_tokens(microbatch);  // something must be in flight
  raise_trouble();
  Slot& slot = slots_[microbatch];
  const CombineRecvVerb verb{view_, slot.route->view, y, y_stride_bytes, microbatch, timeout_ns};
  launch_on_slot(slot, verb, stream);
  memory_.machine().record(slot.route->memory().last_use.get(), stream);
  slot.is_busy = false;
  const auto num_messages = std::count_if(slot.route->rows_per_rank.begin(), slot.route->rows_per_rank.end(),
                                          [](uint32_t num_rows) { return num_rows != 0; });
  const bool is_reduced = shape_.reduce_at == ReduceAt::kExpert;
  count_received(static_cast<uint64_t>(num_messages), is_reduced ? slot.route->num_rows : slot.route->num_pairs);
}

int DeviceAttentionComm::wait_ready(const std::vector<uint32_t>& microbatches, int64_t deadline_ns, Stream stream) {
  std::lock_guard lock(poll_mutex_);
  Machine& machine = memory_.machine();
  while (true) {
    PollVerb verb{view_, slot_routes_, poll_microbatches_, 0, 0, poll_found_};
    std::vector<int> positions;
    int first_free = -1;
    for (size_t i = 0; i < microbatches.size(); ++i) {
      if (!is_busy(microbatches[i])) {
        if (first_free < 0) first_free = static_cast<int>(i);
      } else if (first_free < 0) {  // those behind it need not be asked for
        poll_microbatches_[verb.count++] = microbatches[i];
        positions.push_back(static_cast<int>(i));
      }
    }
    raise_trouble();
    if (first_free == 0) return 0;
    verb.timeout_ns = first_free < 0 ? std::clamp<int64_t>(deadline_ns - now_ns(), 0, kSliceNs) : 0;
    machine.launch(verb, stream);
    machine.record(poll_event_.get(), stream);
    machine.synchronize(poll_event_.get());
    if (*poll_found_ >= 0) return positions[static_cast<size_t>(*poll_found_)];
    if (first_free >= 0 || now_ns() >= deadline_ns) return first_free;
    if (on_sleep != nullptr) on_sleep();
  }
}

void DeviceAttentionComm::idle(int64_t timeout_ns, Stream stream) {
  require_usable();
  raise_trouble();
  for (uint32_t microbatch = 0; microbatch < shape_.microbatches; ++microbatch) {
    if (slots_[microbatch].is_busy) continue;
    DispatchVerb verb = dispatch_verb(microbatch, 0, timeout_ns);
    verb.flags = kFlagIdleNext;
    launch_on_slot(slots_[microbatch], verb, stream);
    count_sent(num_ranks_, 0);
  }
}

void DeviceAttentionComm::raise_trouble() {
  for (uint32_t peer_idx = 0; peer_idx < peers_.size(); ++peer_idx) {
    const uint64_t word = load_acquire(view_.status + peer_idx);  // SYNC: verb-status
    if (word == 0) continue;
    store_release(view_.status + peer_idx, uint64_t{0});  // SYNC: verb-status
    raise_trouble(peer_idx, unpack(word));
  }
}

void DeviceAttentionComm::raise_trouble(uint32_t peer_idx, const Status& status) {
  const uint32_t peer_rank = rank_of(peer_idx);
  Slot& slot = slots_.at(status.slot);
  const std::string verb =
      (status.verb == Verb::kDispatchSend ? "dispatch_send(microbatch=" : "combine_recv(microbatch=") +
      std::to_string(status.slot) + ")";
  switch (status.trouble) {
    case Trouble::kNone:
      return;
    case Trouble::kGone:
      raise_lost(peer_idx, verb + ", rows of its result are NaN");
    case Trouble::kViolation:
      raise_violation(peer_idx, verb + ": expected a reply of the rows that were sent, saw " +
                                    std::to_string(status.detail) + "; rows of its result are NaN");
    case Trouble::kRefused:
      raise_refused(peer_rank, status.detail, slot.layer, status.slot);
    case Trouble::kTimeout:
      break;
  }
  if (status.verb == Verb::kDispatchSend) {
    throw Error(Failure::kTimeout,
                verb + ": " + peer_name(peer_rank) +
                    " has not answered the last message on this slot; nothing was sent, and combine_recv will give NaN",
                static_cast<int>(peer_rank));
  }
  slot.is_busy = true;  // nothing was consumed
  throw Error(Failure::kTimeout,
              verb + ": " + peer_name(peer_rank) + " is alive but had not replied to layer " +
                  std::to_string(slot.layer) + " in time, the rows of its result are NaN; call again to go on waiting",
              static_cast<int>(peer_rank));
}

void DeviceAttentionComm::check() {
  require_usable();
  raise_trouble();
  Comm::check();
}

void DeviceAttentionComm::close() {
  if (is_own_process() && !is_closed()) {
    store_release(&memory_.control()->abort, 1u);  // SYNC: verb-abort
    for (const Slot& slot : slots_) memory_.machine().synchronize(slot.last_launch.get());
  }
  Comm::close();
}

}  // namespace m2n
