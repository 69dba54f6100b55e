// SPDX-License-Identifier: Apache-2.0
// Waits for the doorbell as verbs on a CPU wait for signals, and so makes the network's progress meanwhile.
#include "exchange/device/doorbell_proxy.h"

#include "transport/own_thread.h"

namespace m2n {
namespace {

constexpr int64_t kWaitNs = 1'000'000'000;

}  // namespace

DoorbellProxy::DoorbellProxy(const Doorbell& bell, Network& network, const HostExec& exec, ListPieces list_pieces)
    : reader_(bell), network_(network), exec_(exec), list_pieces_(std::move(list_pieces)) {
  exec_.look_often();  // a device wakes nobody
  exec_.ignore_interrupts();
  thread_ = start_own_thread("m2n-doorbell", [this] { run(); });
}

void DoorbellProxy::stop() {
  if (!thread_.joinable()) return;
  store_seq_cst(&is_stopped_, 1u);  // SYNC: doorbell-stopped
  kick();
  thread_.join();
}

void DoorbellProxy::run() {
  const auto is_over = [this] {
    network_.look();
    return reader_.is_rung() || load_seq_cst(&is_stopped_) != 0;  // SYNC: doorbell-stopped
  };
  while (true) {
    // Before the last look for what was rung.
    const bool is_stopped = load_seq_cst(&is_stopped_) != 0;  // SYNC: doorbell-stopped
    send_rung();
    if (is_stopped) return;
    network_.enter();
    if (!exec_.spin(is_over)) exec_.wait(is_over, now_ns() + kWaitNs);
    network_.leave();
  }
}

void DoorbellProxy::send_rung() {
  const std::lock_guard lock(sending_mutex_);
  while (word_ != nullptr || reader_.is_rung()) {
    if (word_ == nullptr) value_ = reader_.take(&word_);
    pieces_.clear();
    list_pieces_(word_, value_, pieces_);
    network_.send(pieces_, word_, value_, /*is_free_after=*/false);
    word_ = nullptr;  // what could not be sent, for want of memory, is tried again
  }
}

}  // namespace m2n
