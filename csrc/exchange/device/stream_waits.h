// SPDX-License-Identifier: Apache-2.0
// Waits of streams for signals, by operations that hold no multiprocessor (cuStreamWaitValue), the paper's mechanism
// (section 5). A choice: without it the verb's kernel waits.
//
// Such a wait ends with the word that it waits for, and nothing else. So the host ends it where the peer is gone, the
// time is over, or a verb has told of trouble: it puts the seq that the stream waits for into its own signal's word, in
// place of the peer's, together with how far that is ahead (slot.h), and whoever reads the word finds the peer's signal
// unchanged. That needs windows in memory of the host.
//
// Which seq comes next only the verbs know. They tell it round by round, and the host adds the rounds that it has
// launched since. Too low a guess lets the stream pass at once, and the verb behind it waits as ever; too high a one is
// ended like a peer that is late.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "core/slot.h"
#include "exchange/device/memory.h"
#include "exchange/device/verbs/stream_wait.h"

namespace m2n {

class StreamWaits {
 public:
  // Called by a thread of its own.
  struct Sight {
    std::function<Signal*(uint32_t peer_idx, uint32_t slot)> signal;
    std::function<bool(uint32_t peer_idx)> is_live;
    std::function<bool(uint32_t slot)> is_troubled;  // has a verb on the slot told of trouble?
  };
  StreamWaits(DeviceMemory& memory, uint32_t num_slots, uint32_t max_peers, uint32_t first_seq, Sight sight);
  ~StreamWaits() { stop(); }
  StreamWaits(const StreamWaits&) = delete;
  StreamWaits& operator=(const StreamWaits&) = delete;

  // A round of the slot begins, in which each of these peers sends one message (and no other does, for sure).
  void begin_round(uint32_t slot, std::vector<uint32_t> peers);
  // Lets the stream wait for the messages of the last round begun; for the verb that is launched next.
  StreamWait launch(uint32_t slot, int64_t timeout_ns, Stream stream);

  // Is no stream waiting, and nothing looked after?
  bool is_idle() const {
    const std::lock_guard lock(mutex_);
    return pending_.empty();
  }
  // A peer's index will serve another life.
  void forget(uint32_t peer_idx);

  // A round of the slot may have failed: no stream waits until the verbs have told of all that were launched.
  void doubt(uint32_t slot);

  struct Counts {
    uint64_t launched;  // waits of streams
    uint64_t ended;     // words that the host wrote in place of a peer
  };
  Counts counts() const {
    const std::lock_guard lock(mutex_);
    return counts_;
  }

  // To be called when no stream waits any more, or after abort.
  void stop();

 private:
  struct Awaited {
    Signal* word;
    uint32_t peer_idx;
    uint32_t seq;
  };
  struct Pending {
    uint32_t slot;
    uint32_t ticket;
    int64_t timeout_ns;
    std::vector<Awaited> awaited;
    int64_t begun_ns = 0;
  };
  struct Slot {
    std::vector<uint32_t> peers;  // of the last round
    uint32_t rounds = 0;          // launched
    uint32_t first_alike = 0;     // since this round the peers are the same
    uint32_t tickets = 0;
  };

  std::vector<Awaited> guess(const Slot& state, uint32_t slot) const;
  void run();
  // False: there is nothing to look after any more.
  bool look_after(Pending& pending);

  DeviceMemory& memory_;
  const uint32_t max_peers_;
  const uint32_t first_seq_;
  const Sight sight_;
  WaitWords* words_;  // [slot]
  uint32_t* seqs_;    // [slot][peer]
  mutable std::mutex mutex_;
  std::condition_variable is_changed_;
  std::vector<Slot> slots_;
  std::vector<Pending> pending_;
  Counts counts_{};
  bool is_stopped_ = false;
  std::thread thread_;
};

}  // namespace m2n
