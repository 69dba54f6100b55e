// SPDX-License-Identifier: Apache-2.0
// The expert rank's half of the exchange: dispatch_recv and combine_send on CPU threads.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "core/hold.h"
#include "exchange/bodies/combine.h"
#include "exchange/bodies/dispatch.h"
#include "exchange/bodies/inbox.h"
#include "exchange/host/batch.h"
#include "exchange/host/write_choice.h"
#include "exchange/links/roles.h"

namespace m2n {

class ExpertComm final : public ExpertRole {
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
  // Nothing of such a life is waited for or served any more.
  void recover(uint32_t attention_rank) override;
  // The global ids hosted here from now on, ascending. Batches that were received before keep their local indices.
  void set_experts(const std::vector<uint32_t>& local_experts);
  // Both look at what has arrived, received or not.
  PlacementVersions placement_versions();
  // Until every live attention rank has shown `version`; throws Timeout for the first that has not.
  void wait_placement(uint32_t version, int64_t deadline_ns);

 private:
  void keep_verbs_out(const std::function<void()>& body) override;
  bool is_held(uint32_t peer_idx) override;
  std::string why_held() const override;
  void reset_peer(uint32_t peer_idx) override;

  Inbox& inbox(uint32_t peer_idx, uint32_t slot) { return inboxes_[peer_idx * layout_.num_slots + slot]; }
  // Notes what has arrived, and how much that was; throws for a violation.
  uint32_t look_around();
  // The same where nothing is taken: what stays lingers from now on.
  void look_and_stamp();
  // Strict: until when the first message that waits for others goes on waiting for one that is alive.
  int64_t give_up_at(const Wanted& wanted);
  // Strict, and others have sent long ago: drops the first rank that has not, if it is alive. False: nobody is to
  // blame.
  bool give_up_missing(const Wanted& wanted);
  // Peers that are gone are looked at for the last time, and notes which of them have sent what is still to be served.
  void note_unserved();
  // Messages of a batch that no earlier look has seen.
  uint32_t num_just_arrived(const Batch* batch) const;
  // One look: the batch that is asked for, if it is complete.
  std::shared_ptr<Batch> look(const Wanted& wanted, Found* found);
  std::shared_ptr<Batch> collect(uint32_t layer, uint32_t microbatch, const Wanted& wanted);
  void answer(Batch& batch, const unsigned char* y, uint64_t y_stride_bytes, DType y_dtype, bool is_reduced);
  // Into the batch, or refused.
  void take_message(Batch& batch, uint32_t peer_idx, uint32_t slot);
  void build_lists(Batch& batch);
  [[noreturn]] void raise_breach(const Violation& violation);

  std::vector<Inbox> inboxes_;               // [peer][slot]
  std::vector<WriteChoice> write_choices_;   // likewise
  const std::shared_ptr<uint32_t[]> holds_;  // likewise; see Batch
  std::vector<uint32_t> unserved_;           // [peer]: as of note_unserved()
  const InboxView inbox_view_;
  uint32_t hosting_ = 0;  // how many times the hosted experts have changed
  // Held while looking and collecting, never while waiting: several threads may receive at once.
  std::mutex inbox_mutex_;
  // Scratch of collect(), which only grows.
  std::vector<int32_t> idxs_, next_;
  std::vector<float> row_weights_;
};

}  // namespace m2n
