// SPDX-License-Identifier: Apache-2.0
// The expert rank's half of the exchange on a device: each verb is one launch. dispatch_recv either waits on the host
// until it can say how many rows there are, or returns at once with lists at full capacity; combine_send waits for
// nothing.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "exchange/device/comm.h"

namespace m2n {

// One layer of one microbatch. Its lists lie in device memory at fixed addresses per slot, until combine_send.
struct DeviceBatch {
  const void* owner = nullptr;  // the comm that received it; only compared
  uint32_t layer = 0;
  uint32_t microbatch = 0;
  bool is_counted = false;  // else the numbers are capacities, and only the device knows how much of them is in use
  uint32_t num_rows = 0;
  uint32_t num_pairs = 0;
  std::vector<uint32_t> ranks;  // of the attention ranks, message by message
  uint32_t num_local_experts = 0;
  std::string device;
  SlotLists slot{};
  std::shared_ptr<void> memory;  // of the lists
  bool is_answered = false;
};

class DeviceExpertComm final : public DeviceComm<ExpertRole> {
 public:
  // `local_experts`: the global ids hosted here, ascending.
  DeviceExpertComm(const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport,
                   const std::string& device, const std::vector<uint32_t>& local_experts);

  // nullptr when no batch was ready by the deadline.
  std::shared_ptr<DeviceBatch> dispatch_recv(const Wanted& wanted, int64_t deadline_ns, Stream stream);
  // Only launched. `wanted` names layer and microbatch; without a batch in time its lists are empty, and the next call
  // raises why.
  std::shared_ptr<DeviceBatch> launch_recv(const Wanted& wanted, int64_t timeout_ns, Stream stream);
  // The (layer, microbatch) of the first message that waits to be received.
  std::optional<Work> wait_work(int64_t deadline_ns, Stream stream);
  void combine_send(DeviceBatch& batch, const unsigned char* y, uint64_t y_stride_bytes, DType y_dtype, bool is_reduced,
                    uint32_t num_sms, Stream stream);
  // From now on a stream waits by itself for the messages of a launched receive that names its attention ranks. Needs
  // windows in memory of the host.
  void use_stream_waits();
  // As of ExpertComm. Each look is a launch, which goes behind the receives before it.
  PlacementVersions placement_versions(Stream stream);
  void wait_placement(uint32_t version, int64_t deadline_ns, Stream stream);

 protected:
  void raise_trouble() override;
  bool is_between_rounds() override;
  // While no verb runs, it is noted who has sent what is still to be served.
  void keep_verbs_out(const std::function<void()>& body) override;
  bool is_held(uint32_t peer_idx) override { return !is_closed() && load_relaxed(&unserved_[peer_idx]) != 0; }
  bool has_unserved(uint32_t peer_idx);
  void reset_peer(uint32_t peer_idx) override;

 private:
  SlotLists make_lists();
  std::shared_ptr<DeviceBatch> make_batch(uint32_t layer, uint32_t microbatch);
  // The ranks of a strict receive, in memory that launches and graphs may read as long as this lives.
  const uint32_t* keep_ranks(const Wanted& wanted);
  void require_few_ranks(const Wanted& wanted) const;
  // One launch that waits for a slice.
  Received receive(const Wanted& wanted, bool is_peek, int64_t deadline_ns, Stream stream,
                   const std::shared_ptr<DeviceBatch>& batch, std::vector<uint32_t>* versions = nullptr);
  void raise_if_broken(const Received& received);
  // Strict: drops a rank that is alive but has not sent long after others have, and says so.
  void give_up_missing(const Received& received);
  // By peer index, after one look.
  std::vector<uint32_t> read_versions(Stream stream);
  // Launches until there is something to tell or the deadline has passed.
  Received receive_until(const Wanted& wanted, bool is_peek, int64_t deadline_ns, Stream stream,
                         const std::shared_ptr<DeviceBatch>& batch);

  ExpertView view_{};
  std::vector<uint32_t> unserved_;  // [peer]
  std::vector<SlotLists> slots_;
  std::vector<std::shared_ptr<void>> list_memory_;  // by slot
  Received* received_;
  uint32_t* ranks_;
  uint32_t* versions_;
  Received* launched_;   // [slot]: of launched receives
  uint64_t* is_unread_;  // [slot]
  std::map<std::vector<uint32_t>, uint32_t*> kept_ranks_;
  std::shared_ptr<void> received_event_;
  std::vector<std::weak_ptr<DeviceBatch>> batches_;  // [slot]: the last one that was received
  std::mutex receive_mutex_;                         // one launch that receives at a time
  int64_t waits_since_ns_ = 0;  // strict: for how long a message has waited for others; 0: none does
};

}  // namespace m2n
