// SPDX-License-Identifier: Apache-2.0
// dispatch_send and combine_recv as launches: what the host checks before one, and what it raises after one.
#include "exchange/device/attention.h"

#include <algorithm>

namespace m2n {
namespace {

std::vector<uint32_t> hosting_ranks(const std::vector<int32_t>& ranks, uint32_t num_ranks) {
  std::vector<uint32_t> hosts(num_ranks);
  for (int32_t rank : ranks) hosts.at(static_cast<size_t>(rank)) = 1;
  return hosts;
}

}  // namespace

DeviceAttentionComm::DeviceAttentionComm(const Shape& shape, uint32_t rank, uint32_t max_peers,
                                         const std::string& transport, const std::string& device,
                                         const std::vector<int32_t>& rank_offsets, const std::vector<int32_t>& ranks,
                                         uint32_t num_ranks, uint32_t placement_version)
    : DeviceComm(device, shape, rank, max_peers, transport),
      num_ranks_(num_ranks),
      route_trouble_(memory_.on_host<uint64_t>(1)),
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
  view_.placement_version = placement_version;
  view_.peers = memory_.mirror(peers_, max_peers);
  view_.watched = view_.peers.on_host;
  view_.rows = rows_window()->data();
  view_.meta = meta_window()->data();
  view_.seqs = memory_.uploaded(std::vector<SendSeq>(per_slot, SendSeq{first_seq_, first_seq_, 0}));
  view_.slots = memory_.on_device<SlotState>(layout_.num_slots);
  view_.peers_of_ranks = memory_.on_device<int32_t>(per_slot);
  view_.sources_of_ranks = memory_.on_device<int32_t>(per_slot);
  view_.hosts = memory_.uploaded(hosting_ranks(ranks, num_ranks));
  view_.num_ranks = num_ranks;
  view_.control = memory_.control();
  view_.counters = memory_.counters();
  view_.status = memory_.on_host<uint64_t>(max_peers);
  no_rows_.num_ranks = num_ranks;
  no_rows_.row_offsets = memory_.on_device<uint32_t>(num_ranks + 1);
  no_rows_.pair_counts = memory_.on_device<uint32_t>(num_ranks);
  // One in flight for each slot, one that the caller keeps for its graphs, and one that is being built: to allocate
  // later may have to wait for kernels that wait.
  std::vector<DeviceRoute::Memory> routes(2 * layout_.num_slots + 1);
  for (DeviceRoute::Memory& memory : routes) memory = make_route_memory();
  for (DeviceRoute::Memory& memory : routes) pool_->give(std::move(memory));
}

bool DeviceAttentionComm::is_between_rounds() {
  return std::none_of(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.is_busy; }) &&
         memory_.machine().is_passed(poll_event_.get());
}

void DeviceAttentionComm::reset_peer(uint32_t peer_idx) {
  const std::vector<SendSeq> fresh(layout_.num_slots, SendSeq{first_seq_, first_seq_, 0});
  memory_.machine().copy(&view_.seqs[peer_idx * layout_.num_slots], fresh.data(), fresh.size() * sizeof(SendSeq));
  store_release(view_.status + peer_idx, uint64_t{0});  // SYNC: verb-status
  if (waits_ != nullptr) waits_->forget(peer_idx);
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

void DeviceAttentionComm::wait_slot(uint32_t microbatch, Stream stream) {
  Machine& machine = memory_.machine();
  Slot& slot = slots_[microbatch];
  if (slot.stream == stream || machine.is_capturing(stream)) return;  // in a capture the graph's own edges order it
  machine.wait(stream, last_launch_[microbatch].get());
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

DispatchVerb DeviceAttentionComm::prepare_dispatch(std::shared_ptr<const DeviceRoute> route, uint32_t microbatch,
                                                   uint32_t layer, int64_t timeout_ns, Stream stream) {
  require_microbatch(microbatch);
  raise_trouble();
  if (has_gone()) return_gone();
  const auto launching = this->launching();
  if (route->owner != this) throw Error(Failure::kArgument, "route: it was made by another comm");
  Slot& slot = slots_[microbatch];
  if (slot.is_busy) raise_slot_busy(microbatch, slot.layer);
  DispatchVerb verb = dispatch_verb(microbatch, layer, timeout_ns);
  verb.route = route->view;
  slot_routes_[microbatch] = route->view;
  slot.route = std::move(route);
  slot.layer = layer;
  slot.is_busy = true;
  slot.sent_ns = give_up_ns_ == kForeverNs || is_capturing(stream) ? kForeverNs : now_ns();
  wait_slot(microbatch, stream);
  begin_round(microbatch, stream, [&](uint32_t rank) { return rank < num_ranks_; });
  return verb;
}

void DeviceAttentionComm::note_dispatch(uint32_t microbatch, Stream stream) { note_launch(microbatch, stream); }

void DeviceAttentionComm::dispatch_send(const unsigned char* x, uint64_t x_stride_bytes, DType x_dtype,
                                        std::shared_ptr<const DeviceRoute> route, uint32_t microbatch, uint32_t layer,
                                        int64_t timeout_ns, uint32_t num_sms, Stream stream) {
  require_x_dtype(x_dtype);
  DispatchVerb verb = prepare_dispatch(std::move(route), microbatch, layer, timeout_ns, stream);
  verb.x = x;
  verb.x_stride_bytes = x_stride_bytes;
  verb.x_dtype = x_dtype;
  const auto launching = this->launching();
  const uint64_t most_rows = uint64_t{verb.route.num_tokens} * std::min(shape_.top_k, num_ranks_);
  memory_.machine().launch(verb, num_sms, most_rows * layout_.dispatch_rows.row_bytes, stream);
  note_dispatch(microbatch, stream);
}

void DeviceAttentionComm::combine_recv(unsigned char* y, uint64_t y_stride_bytes, uint32_t microbatch,
                                       int64_t timeout_ns, uint32_t num_sms, Stream stream, bool takes_nan) {
  num_tokens(microbatch);  // something must be in flight
  raise_trouble();
  const auto launching = this->launching();
  Machine& machine = memory_.machine();
  Slot& slot = slots_[microbatch];
  const RouteView& route = slot.route->view;
  const uint64_t num_bytes = route.num_tokens * layout_.combine_rows.row_bytes * std::min(shape_.top_k, num_ranks_);
  wait_slot(microbatch, stream);
  const StreamWait stream_wait = wait_on_stream(microbatch, timeout_ns, stream);
  machine.launch(AwaitVerb{view_, route, microbatch, timeout_ns, stream_wait, takes_nan}, stream);
  machine.launch(CombineRecvVerb{view_, route, y, y_stride_bytes, microbatch}, num_sms, num_bytes, stream);
  if (!machine.is_capturing(stream)) machine.record(slot.route->memory().last_use.get(), stream);
  note_launch(microbatch, stream);
  slot.is_busy = false;
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
    {
      const auto launching = this->launching();
      machine.launch(verb, stream);
      machine.record(poll_event_.get(), stream);
    }
    machine.synchronize(poll_event_.get());
    if (*poll_found_ >= 0) return positions[static_cast<size_t>(*poll_found_)];
    if (first_free >= 0 || now_ns() >= deadline_ns) return first_free;
    if (on_sleep != nullptr) on_sleep();
  }
}

void DeviceAttentionComm::idle(int64_t timeout_ns, Stream stream) {
  require_usable();
  raise_trouble();
  const auto launching = this->launching();
  for (uint32_t microbatch = 0; microbatch < shape_.microbatches; ++microbatch) {
    if (slots_[microbatch].is_busy) continue;
    DispatchVerb verb = dispatch_verb(microbatch, 0, timeout_ns);
    verb.flags = kFlagIdleNext;
    wait_slot(microbatch, stream);
    memory_.machine().launch(verb, 1, 0, stream);
    note_launch(microbatch, stream);
  }
}

void DeviceAttentionComm::use_stream_waits() {
  wait_on_streams([status = view_.status, max_peers = max_peers_](uint32_t slot) {
    return std::any_of(status, status + max_peers, [slot](const uint64_t& at) {
      const uint64_t word = load_acquire(&at);  // SYNC: verb-status
      return word != 0 && unpack(word).slot == slot;
    });
  });
}

void DeviceAttentionComm::raise_trouble() {
  if (const uint64_t word = load_acquire(route_trouble_); word != 0) {  // SYNC: verb-status
    store_release(route_trouble_, uint64_t{0});                         // SYNC: verb-status
    require_built(unpack_route(word), shape_);
  }
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
  doubt_rounds(status.slot);
  const std::string verb =
      (status.verb == Verb::kDispatchSend ? "dispatch_send(microbatch=" : "combine_recv(microbatch=") +
      std::to_string(status.slot) + ")";
  switch (status.trouble) {
    case Trouble::kNone:
      return;
    case Trouble::kGone:
      raise_lost(peer_idx, verb + ", rows of the result are NaN");
    case Trouble::kViolation:
      raise_violation(peer_idx, verb + ": expected a reply of the rows that were sent, saw " +
                                    std::to_string(status.detail) + "; rows of its result are NaN");
    case Trouble::kWrongBatch:
      raise_violation(peer_idx, verb + ": expected a reply to layer " + std::to_string(slot.layer) +
                                    " of this microbatch, saw one to another, with " + std::to_string(status.detail) +
                                    "; rows of its result are NaN");
    case Trouble::kRefused:
      raise_refused(peer_rank, status.detail, slot.layer, status.slot);
    case Trouble::kTimeout:
      if (give_up_ns_ == kForeverNs || slot.sent_ns == kForeverNs || now_ns() - slot.sent_ns < give_up_ns_) break;
      give_up_late(peer_idx);
      raise_lost(peer_idx, verb + ", rows of the result are NaN");
  }
  if (status.verb == Verb::kDispatchSend) {
    throw Error(Failure::kTimeout,
                verb + ": " + peer_name(peer_rank) +
                    " has not answered the last message on this slot; nothing was sent, and combine_recv will give NaN",
                static_cast<int>(peer_rank));
  }
  mark_late_slots();
  throw Error(Failure::kTimeout,
              verb + ": " + peer_name(peer_rank) + " is alive but had not replied to layer " +
                  std::to_string(slot.layer) + " in time, the rows of its result are NaN; call again to go on waiting",
              static_cast<int>(peer_rank));
}

void DeviceAttentionComm::mark_late_slots() {
  std::vector<SlotState> states(layout_.num_slots);
  memory_.machine().copy(states.data(), view_.slots, states.size() * sizeof(SlotState));
  for (uint32_t slot = 0; slot < layout_.num_slots; ++slot) {
    slots_[slot].is_busy |= states[slot].is_late != 0 && states[slot].is_failed == 0;
  }
}

}  // namespace m2n
