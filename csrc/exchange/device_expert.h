// SPDX-License-Identifier: Apache-2.0
// The expert rank's half of the exchange on a device. Receiving waits on the host for one launch after another, since
// Python is told how many rows there are; combine_send is one launch and waits for nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "exchange/device_memory.h"
#include "exchange/expert.h"
#include "exchange/sides.h"

namespace m2n {

// One layer of one microbatch. Its lists lie in device memory at fixed addresses per slot, until combine_send.
struct DeviceBatch {
  const void* owner = nullptr;  // the comm that received it; only compared
  uint32_t layer = 0;
  uint32_t microbatch = 0;
  uint32_t num_messages = 0;
  uint32_t num_rows = 0;
  uint32_t num_pairs = 0;
  std::vector<uint32_t> ranks;  // of the attention ranks, message by message
  uint32_t num_local_experts = 0;
  std::string device;
  BatchView lists{};
  std::shared_ptr<void> memory;  // of the lists
  bool is_answered = false;
};

class DeviceExpertComm final : public ExpertSide {
 public:
  // `local_experts`: the global ids hosted here, ascending.
  DeviceExpertComm(const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport,
                   const std::string& device, const std::vector<uint32_t>& local_experts);

  // nullptr when no batch was ready by the deadline.
  std::shared_ptr<DeviceBatch> dispatch_recv(const Wanted& wanted, int64_t deadline_ns, Stream stream);
  // The (layer, microbatch) of the first message that waits to be received.
  std::optional<Work> wait_work(int64_t deadline_ns, Stream stream);
  void combine_send(DeviceBatch& batch, const unsigned char* y, uint64_t y_stride_bytes, DType y_dtype, bool is_reduced,
                    Stream stream);
  void recover(uint32_t attention_rank) { give_up(attention_rank); }
  void close() override;
  const std::string& device() const { return memory_.device(); }

 private:
  SlotLists make_lists();
  // One launch that waits for a slice; throws for a violation.
  Received receive(const Wanted& wanted, bool is_peek, int64_t deadline_ns, Stream stream,
                   const std::shared_ptr<DeviceBatch>& batch);
  // Launches until there is something to tell or the deadline has passed.
  Received receive_until(const Wanted& wanted, bool is_peek, int64_t deadline_ns, Stream stream,
                         const std::shared_ptr<DeviceBatch>& batch);

  DeviceMemory memory_;
  ExpertView view_{};
  std::vector<SlotLists> slots_;
  std::vector<std::shared_ptr<void>> list_memory_;  // by slot
  Received* received_;
  uint32_t* ranks_;
  uint32_t* wanted_ranks_;
  std::shared_ptr<void> received_event_;
  std::vector<std::shared_ptr<void>> sent_;  // [slot]: its last combine_send; its lists are written again after that
  std::mutex receive_mutex_;                 // one launch that receives at a time
  std::mutex open_mutex_;                    // for open_slots_; never held while waiting
  uint64_t open_slots_ = 0;                  // bits: a batch of the slot is being served
};

}  // namespace m2n
