// SPDX-License-Identifier: Apache-2.0
// The expert rank's half of the exchange: dispatch_recv and combine_send on CPU threads.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "exchange/combine.h"
#include "exchange/dispatch.h"
#include "exchange/inbox.h"
#include "exchange/sides.h"

namespace m2n {

// One layer of one microbatch, from one or more attention ranks. Its rows lie in the window.
struct Batch {
  struct Message {
    ArrivedMessage arrived;
    uint32_t seq;
    uint32_t first_row;  // of the batch, in wire order
  };

  const void* owner = nullptr;  // the comm that received it; only compared
  uint32_t layer = 0;
  uint32_t microbatch = 0;
  std::vector<Message> messages;  // ascending peer index
  std::vector<uint32_t> ranks;    // of the attention ranks, message by message
  std::vector<int32_t> pair_begin, pair_position, row_index_by_expert, expert_offsets;
  std::vector<float> weights;
  bool is_answered = false;

  uint32_t num_rows() const { return static_cast<uint32_t>(pair_begin.size()) - 1; }
  uint32_t num_pairs() const { return static_cast<uint32_t>(row_index_by_expert.size()); }
};

struct Work {
  uint32_t layer;
  uint32_t microbatch;
};

class ExpertComm final : public ExpertSide {
 public:
  // `local_experts`: the global ids hosted here, ascending.
  ExpertComm(const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport,
             const std::vector<uint32_t>& local_experts);

  // nullptr when no batch was ready by the deadline.
  std::shared_ptr<Batch> dispatch_recv(const Wanted& wanted, int64_t deadline_ns);
  // The (layer, microbatch) of the first message that waits to be received.
  std::optional<Work> wait_work(int64_t deadline_ns);
  // y: [P][hidden] expert-major, or with is_reduced [R][hidden] in wire order, already weighted and summed.
  void combine_send(Batch& batch, const unsigned char* y, uint64_t y_stride_bytes, DType y_dtype, bool is_reduced);
  // Gives up an attention rank that is lost or has left: nothing of it is waited for or served.
  void recover(uint32_t attention_rank);

 private:
  Inbox& inbox(uint32_t peer_idx, uint32_t slot) { return inboxes_[peer_idx * layout_.num_slots + slot]; }
  // Notes what has arrived; throws for a violation.
  void look_around();
  std::shared_ptr<Batch> collect(uint32_t layer, uint32_t microbatch, const Wanted& wanted);
  bool take_message(Batch& batch, uint32_t peer_idx, uint32_t slot);
  void build_lists(Batch& batch);
  [[noreturn]] void raise_breach(const Violation& violation);

  std::vector<Inbox> inboxes_;  // [peer][slot]
  const InboxView inbox_view_;
  // Held while looking and collecting, never while waiting: several threads may receive at once.
  std::mutex inbox_mutex_;
  std::vector<int32_t> ids_, next_;  // scratch of collect()
  std::vector<float> row_weights_;
};

}  // namespace m2n
