// SPDX-License-Identifier: Apache-2.0
// Routes in device memory: whose memory they have, and the launch that builds one.
#include "exchange/device/attention.h"

namespace m2n {

DeviceRoute::~DeviceRoute() { pool_->give(std::move(memory_)); }

void DeviceRoute::wait_built() const {
  if (!is_captured) machine_->synchronize(memory_.last_use.get());
}

uint32_t DeviceRoute::num_rows() const {
  wait_built();
  return outcome->num_rows;
}

std::vector<uint32_t> DeviceRoute::read_rows_per_rank() const {
  wait_built();
  return {rows_per_rank, rows_per_rank + view.num_ranks};
}

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

DeviceRoute::Memory DeviceAttentionComm::make_route_memory() {
  DeviceRoute::Memory memory;
  if (pool_->take(memory)) return memory;
  const uint64_t num_pairs = uint64_t{shape_.max_tokens} * shape_.top_k;
  const uint64_t num_counts = tally_words(2 * uint64_t{num_ranks_});
  const uint64_t words = 3 * uint64_t{num_ranks_} + 1 + num_counts + num_pairs * (8 + 2 * uint64_t{shape_.top_k});
  memory.device = memory_.machine().allocate(words * sizeof(uint32_t));
  memory.host = transport_->make_words(sizeof(RouteOutcome) + (2 * uint64_t{num_ranks_} + 1) * sizeof(uint32_t));
  memory.last_use = memory_.machine().make_event();
  return memory;
}

RouteVerb DeviceAttentionComm::route_verb(DeviceRoute& route, const TopKView& topk) const {
  RouteVerb verb{};
  auto* words = static_cast<uint32_t*>(route.memory().device.get());
  const auto take = [&]<class T>(T*& array, uint64_t count) {
    array = reinterpret_cast<T*>(words);
    words += count;
  };
  const uint64_t num_pairs = uint64_t{shape_.max_tokens} * shape_.top_k;  // rows <= pairs
  RouteView& view = route.view;
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
  take(verb.pair_ranks, num_pairs);
  take(verb.pair_opens, num_pairs);
  take(verb.counts, tally_words(2 * uint64_t{num_ranks_}));
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
  verb.num_tokens = topk.num_so_far;
  verb.num_tokens_type = topk.num_type;
  verb.rank_offsets = rank_offsets_;
  verb.ranks = ranks_;
  verb.own_rank = rank_;
  verb.trouble = route_trouble_;
  verb.outcome = static_cast<RouteOutcome*>(route.memory().host.get());
  verb.rows_per_rank = reinterpret_cast<uint32_t*>(verb.outcome + 1);
  route.outcome = verb.outcome;
  route.rows_per_rank = verb.rows_per_rank;
  return verb;
}

std::shared_ptr<DeviceRoute> DeviceAttentionComm::make_route(const TopKView& topk, const std::vector<uint32_t>& splits,
                                                             std::shared_ptr<DeviceRoute> into, Stream stream) {
  require_usable();
  Machine& machine = memory_.machine();
  const bool is_captured = machine.is_capturing(stream);
  if (!splits.empty() && splits.size() != num_ranks_) {
    throw Error(Failure::kArgument, "splits: expected one number of rows for each of " + std::to_string(num_ranks_) +
                                        " expert ranks, got " + std::to_string(splits.size()));
  }
  if (into != nullptr && into->owner != this) throw Error(Failure::kArgument, "out: it was made by another comm");
  if (is_captured && into == nullptr) {
    throw Error(
        Failure::kSetup,
        "route: memory cannot be allocated while a graph is captured; make a route before, and pass it as out=");
  }
  if (is_captured && !splits.empty()) {
    throw Error(Failure::kSetup, "route: ready-made splits are read when they are launched; a graph needs comm.route");
  }
  raise_trouble();
  if (into == nullptr) into = std::make_shared<DeviceRoute>(pool_, machine, make_route_memory());
  into->owner = this;
  into->is_captured = is_captured;
  RouteVerb verb = route_verb(*into, topk);
  void* event = into->memory().last_use.get();
  if (!splits.empty()) {
    machine.synchronize(event);  // whoever used the memory last may still read these
    uint32_t* offsets = verb.rows_per_rank + num_ranks_;
    offsets[0] = 0;
    for (uint32_t rank = 0; rank < num_ranks_; ++rank) offsets[rank + 1] = offsets[rank] + splits[rank];
    verb.split_offsets = offsets;
  }
  if (!is_captured) machine.wait(stream, event);
  machine.launch(verb, stream);
  if (!is_captured) machine.record(event, stream);
  raise_trouble();
  if (!splits.empty()) require_full_splits(topk.num_tokens, into->num_rows());
  return into;
}

std::shared_ptr<DeviceRoute> DeviceAttentionComm::make_empty_route(uint32_t num_tokens, Stream stream) {
  require_usable();
  if (num_tokens > shape_.max_tokens) {
    throw Error(Failure::kArgument, "num_tokens: at most max_tokens=" + std::to_string(shape_.max_tokens) + ", got " +
                                        std::to_string(num_tokens));
  }
  const auto route = std::make_shared<DeviceRoute>(pool_, memory_.machine(), make_route_memory());
  route->owner = this;
  TopKView topk{};
  topk.num_tokens = num_tokens;
  route_verb(*route, topk);
  memory_.machine().wait(stream, route->memory().last_use.get());
  return route;
}

}  // namespace m2n
