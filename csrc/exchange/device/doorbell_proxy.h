// SPDX-License-Identifier: Apache-2.0
// The thread of a device's rank that sends over a network what its verbs have rung for.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "core/doorbell.h"
#include "core/wire.h"
#include "transport/host_exec.h"

namespace m2n {

class DoorbellProxy {
 public:
  // `list_pieces`: what the message with this word and value is, by pieces of the send area. `exec`: how the rank's own
  // threads wait, asleep too: what arrives, and kick(), wake this one.
  using ListPieces = std::function<void(const Signal* word, Signal value, std::vector<Piece>& pieces)>;
  DoorbellProxy(const Doorbell& bell, Network& network, const HostExec& exec, ListPieces list_pieces);
  ~DoorbellProxy() { stop(); }
  DoorbellProxy(const DoorbellProxy&) = delete;
  DoorbellProxy& operator=(const DoorbellProxy&) = delete;

  // Sends what was rung before, and ends the thread. Once; calls of kick() may go on.
  void stop();
  // A verb was launched that may ring soon.
  void kick() { exec_.wake_own(); }
  // Was everything sent that was rung for?
  bool is_drained() {
    const std::lock_guard lock(sending_mutex_);
    return word_ == nullptr && !reader_.is_rung();
  }

 private:
  void run();
  void send_rung();

  DoorbellReader reader_;
  Network& network_;
  HostExec exec_;
  ListPieces list_pieces_;
  const Signal* word_ = nullptr;  // of the message that was taken and not sent
  Signal value_ = 0;
  std::vector<Piece> pieces_;
  std::mutex sending_mutex_;
  uint32_t is_stopped_ = 0;
  std::thread thread_;
};

}  // namespace m2n
