// SPDX-License-Identifier: Apache-2.0
// Who makes progress: whoever waits in a verb, also asleep; the proxy's thread only while nobody does.
#pragma once

#include <cstdint>

#include "core/wake.h"
#include "transport/network/links.h"

namespace m2n {

class NetworkProxy {
 public:
  explicit NetworkProxy(NetworkLinks& links);

  // The thread: until stop(), which returns when it has ended.
  void run(LinkListener& listener);
  void stop();

  // See Network.
  void enter();
  void leave(WakeWord* own_wake, Network* network);
  bool sleep(const uint32_t* events, uint32_t seen, int64_t most_ns);
  void interrupt();

  // The thread looks around: at once for itself, or (`urgent`) also makes progress though somebody may be about to.
  void kick(bool urgent);
  // After something was sent by a thread that does not wait.
  void sent();

 private:
  void rest(bool is_idle, int64_t most_ns);

  NetworkLinks& links_;
  Fd kick_fd_, interrupt_fd_, ended_fd_;
  uint32_t num_drivers_ = 0;  // threads in a wait
  uint32_t num_entries_ = 0;  // how many waits there have been
  uint32_t rests_long_ = 0;   // the thread is to be woken when the last of them leaves
  uint32_t is_urgent_ = 0;
  uint32_t is_stopped_ = 0;
  uint32_t is_sleeper_ = 0;  // a waiting thread sleeps on the network's events
};

}  // namespace m2n
