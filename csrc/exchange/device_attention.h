// SPDX-License-Identifier: Apache-2.0
// The attention rank's half of the exchange on a device: each verb is one launch, and only route() and the polls wait
// for the device. What goes wrong in a launch is raised by the next call.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "exchange/device_memory.h"
#include "exchange/sides.h"

namespace m2n {

// The router's output, wherever the verbs run: [T][top_k] at strides in elements.
struct TopKView {
  uint32_t num_tokens;
  const void* ids;
  IdType id_type;
  int64_t ids_stride, ids_step;
  const void* weights;
  WeightType weight_type;
  int64_t weights_stride, weights_step;
};

class RoutePool;

// A route in device memory. Its memory goes back to the comm that made it.
class DeviceRoute {
 public:
  struct Memory {
    std::shared_ptr<void> device;
    std::shared_ptr<void> host;
    std::shared_ptr<void> last_use;
  };

  DeviceRoute(std::shared_ptr<RoutePool> pool, Memory memory) : pool_(std::move(pool)), memory_(std::move(memory)) {}
  ~DeviceRoute();
  DeviceRoute(const DeviceRoute&) = delete;
  DeviceRoute& operator=(const DeviceRoute&) = delete;

  RouteView view{};
  std::vector<uint32_t> rows_per_rank;
  uint32_t num_rows = 0;
  uint32_t num_pairs = 0;
  const void* owner = nullptr;  // the comm that made it; only compared

  const Memory& memory() const { return memory_; }

 private:
  std::shared_ptr<RoutePool> pool_;
  Memory memory_;
};

// Memory of routes that nobody holds any more.
class RoutePool {
 public:
  bool take(DeviceRoute::Memory& memory);
  void give(DeviceRoute::Memory memory);

 private:
  std::mutex mutex_;
  std::vector<DeviceRoute::Memory> free_;
};

class DeviceAttentionComm final : public AttentionSide {
 public:
  // Expert e is hosted by the expert ranks ranks[rank_offsets[e] .. rank_offsets[e + 1]), of num_ranks.
  DeviceAttentionComm(const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport,
                      const std::string& device, const std::vector<int32_t>& rank_offsets,
                      const std::vector<int32_t>& ranks, uint32_t num_ranks);

  // `splits`: where not empty, rows are sorted by destination, splits[r] of them for rank r.
  std::shared_ptr<DeviceRoute> make_route(const TopKView& topk, const std::vector<uint32_t>& splits, Stream stream);
  void dispatch_send(const unsigned char* x, uint64_t x_stride_bytes, std::shared_ptr<const DeviceRoute> route,
                     uint32_t microbatch, uint32_t layer, int64_t timeout_ns, Stream stream);
  void combine_recv(unsigned char* y, uint64_t y_stride_bytes, uint32_t microbatch, int64_t timeout_ns, Stream stream);
  bool is_busy(uint32_t microbatch) const;
  // Of what is in flight; throws when nothing is.
  uint32_t num_tokens(uint32_t microbatch);
  // Waits for the first of `microbatches` whose next verb would not wait; its position, or -1. With nothing in flight
  // that is so at once: a launch never waits on the host.
  int wait_ready(const std::vector<uint32_t>& microbatches, int64_t deadline_ns, Stream stream);
  void idle(int64_t timeout_ns, Stream stream);
  void recover(uint32_t expert_rank) { give_up(expert_rank); }

  const std::string& device() const { return memory_.device(); }

  void check() override;
  void close() override;

 private:
  struct Slot {
    bool is_busy = false;
    uint32_t layer = 0;
    std::shared_ptr<const DeviceRoute> route;  // kept after combine_recv, which may have to be called again
    std::shared_ptr<void> last_launch;
    Stream stream = nullptr;
  };

  DispatchVerb dispatch_verb(uint32_t microbatch, uint32_t layer, int64_t timeout_ns) const;
  // Launches a verb on a slot behind everything launched on it before, on whatever stream.
  template <class V>
  void launch_on_slot(Slot& slot, const V& verb, Stream stream);
  DeviceRoute::Memory make_route_memory();
  // Raises the first trouble that a launch has reported, once.
  void raise_trouble();
  void raise_trouble(uint32_t peer_idx, const Status& status);

  const uint32_t num_ranks_;
  DeviceMemory memory_;
  AttentionView view_{};
  RouteView no_rows_{};
  const int32_t* rank_offsets_;
  const int32_t* ranks_;
  RouteView* slot_routes_;       // host memory, for polls
  uint32_t* poll_microbatches_;  // likewise
  int32_t* poll_found_;
  std::shared_ptr<void> poll_event_;
  std::mutex poll_mutex_;
  std::shared_ptr<RoutePool> pool_ = std::make_shared<RoutePool>();
  std::vector<Slot> slots_;
};

}  // namespace m2n
