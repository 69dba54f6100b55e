// SPDX-License-Identifier: Apache-2.0
// The attention rank's half of the exchange on a device: each verb is a launch or two, and only polls wait for the
// device. What goes wrong in a launch is raised by the next call. In a graph capture a verb is recorded; what it needs
// was allocated before.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "exchange/device/comm.h"

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
  const void* num_so_far = nullptr;  // where given, one number where the verbs run: tokens from there on are padding
  IdType num_type = IdType::kInt32;
};

class RoutePool;

// A route in device memory, at addresses that stay as long as it lives. Its memory goes back to the comm that made it.
class DeviceRoute {
 public:
  struct Memory {
    std::shared_ptr<void> device;
    std::shared_ptr<void> host;
    std::shared_ptr<void> last_use;
  };

  DeviceRoute(std::shared_ptr<RoutePool> pool, Machine& machine, Memory memory)
      : pool_(std::move(pool)), machine_(&machine), memory_(std::move(memory)) {}
  ~DeviceRoute();
  DeviceRoute(const DeviceRoute&) = delete;
  DeviceRoute& operator=(const DeviceRoute&) = delete;

  RouteView view{};
  const void* owner = nullptr;  // the comm that made it; only compared
  const RouteOutcome* outcome = nullptr;
  const uint32_t* rows_per_rank = nullptr;
  bool is_captured = false;  // built by graphs: only the caller knows when

  // These wait until it is built, but for what a graph builds.
  uint32_t num_rows() const;
  std::vector<uint32_t> read_rows_per_rank() const;

  const Memory& memory() const { return memory_; }

 private:
  void wait_built() const;

  std::shared_ptr<RoutePool> pool_;
  Machine* machine_;
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

class DeviceAttentionComm final : public DeviceComm<AttentionRole> {
 public:
  // Expert e is hosted by the expert ranks ranks[rank_offsets[e] .. rank_offsets[e + 1]), of num_ranks.
  DeviceAttentionComm(const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport,
                      const std::string& device, const std::vector<int32_t>& rank_offsets,
                      const std::vector<int32_t>& ranks, uint32_t num_ranks, uint32_t placement_version = 0);

  // `splits`: where not empty, rows are sorted by destination, splits[r] of them for rank r. `into`: a route of this
  // comm whose memory is used again; a capture needs one. Bad ids are raised by the next call.
  std::shared_ptr<DeviceRoute> make_route(const TopKView& topk, const std::vector<uint32_t>& splits,
                                          std::shared_ptr<DeviceRoute> into, Stream stream);
  // x as of AttentionComm.
  void dispatch_send(const unsigned char* x, uint64_t x_stride_bytes, DType x_dtype,
                     std::shared_ptr<const DeviceRoute> route, uint32_t microbatch, uint32_t layer, int64_t timeout_ns,
                     uint32_t num_sms, Stream stream);
  void combine_recv(unsigned char* y, uint64_t y_stride_bytes, uint32_t microbatch, int64_t timeout_ns,
                    uint32_t num_sms, Stream stream, bool takes_nan = false);

  // For a kernel of the caller's that routes and dispatches by itself (examples/cpp/gate_dispatch.h): a route that it
  // fills, and what dispatch_send would have launched. The caller launches it on `stream` next; combine_recv follows as
  // always. Throws what dispatch_send throws. What the host may ask a route (num_rows) is not known of such a one. Rows
  // of float8 are the kernel's to make (quantize.h).
  std::shared_ptr<DeviceRoute> make_empty_route(uint32_t num_tokens, Stream stream);
  DispatchVerb prepare_dispatch(std::shared_ptr<const DeviceRoute> route, uint32_t microbatch, uint32_t layer,
                                int64_t timeout_ns, Stream stream);
  // To be called once it is launched: verbs of this microbatch on other streams, and close(), wait for it.
  void note_dispatch(uint32_t microbatch, Stream stream);
  bool is_busy(uint32_t microbatch) const;
  // Of what is in flight; throws when nothing is.
  uint32_t num_tokens(uint32_t microbatch);
  // Waits for the first of `microbatches` whose next verb would not wait; its position, or -1. With nothing in flight
  // that is so at once: a launch never waits on the host.
  int wait_ready(const std::vector<uint32_t>& microbatches, int64_t deadline_ns, Stream stream);
  void idle(int64_t timeout_ns, Stream stream);
  // From now on a stream waits by itself for the replies of all expert ranks, ahead of combine_recv's launches. Needs
  // windows in memory of the host.
  void use_stream_waits();

 protected:
  void raise_trouble() override;
  bool is_between_rounds() override;
  // By the last link of a rank verbs tell that it is gone.
  bool is_held(uint32_t peer_idx) override { return peers_.find(rank_of(peer_idx)) == static_cast<int32_t>(peer_idx); }
  void reset_peer(uint32_t peer_idx) override;

 private:
  struct Slot {
    bool is_busy = false;
    uint32_t layer = 0;
    std::shared_ptr<const DeviceRoute> route;  // kept after combine_recv, which may have to be called again
    Stream stream = nullptr;                   // of the last launch
    int64_t sent_ns = kForeverNs;              // when its last dispatch was launched, where somebody may be given up
  };

  DispatchVerb dispatch_verb(uint32_t microbatch, uint32_t layer, int64_t timeout_ns) const;
  RouteVerb route_verb(DeviceRoute& route, const TopKView& topk) const;
  // What is launched on a slot goes behind everything launched on it before, on whatever stream.
  void wait_slot(uint32_t microbatch, Stream stream);
  DeviceRoute::Memory make_route_memory();
  void raise_trouble(uint32_t peer_idx, const Status& status);
  // Nothing was consumed where a combine was late: it can be called again, whichever of them the trouble was told of.
  void mark_late_slots();

  const uint32_t num_ranks_;
  uint64_t* route_trouble_;
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
