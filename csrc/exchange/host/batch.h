// SPDX-License-Identifier: Apache-2.0
// What dispatch_recv gives on the host. The memory of a batch that is gone is used again.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "exchange/bodies/dispatch.h"

namespace m2n {

// One layer of one microbatch, from one or more attention ranks. Its rows lie in the window.
struct Batch {
  const void* owner = nullptr;  // the comm that received it; only compared
  uint32_t layer = 0;
  uint32_t microbatch = 0;
  uint32_t hosting = 0;  // which of the comm's sets of hosted experts its local indices mean: 0 the first one
  std::vector<BatchMessage> messages;  // ascending peer index
  std::vector<uint32_t> ranks;         // of the attention ranks, message by message
  std::vector<int32_t> pair_begin, pair_position, row_index_by_expert, expert_offsets;
  std::vector<float> weights;
  bool is_answered = false;
  std::shared_ptr<uint32_t[]> holds;  // of its comm, [peer][slot]: each message has one until the batch is answered
  uint32_t num_slots = 0;

  // A batch that nobody will answer lets go of its peers, too.
  void drop_holds();

  uint32_t num_rows() const { return static_cast<uint32_t>(pair_begin.size()) - 1; }
  uint32_t num_pairs() const { return static_cast<uint32_t>(row_index_by_expert.size()); }
};

// An empty one. In the steady state nothing is allocated: a thread keeps a few of the batches it drops, with the
// capacity of their lists.
std::shared_ptr<Batch> make_batch();

}  // namespace m2n
