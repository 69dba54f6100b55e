// SPDX-License-Identifier: Apache-2.0
// How a rank sends and waits, and what ends every wait: its own end, or that it belongs to a forked child's parent.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "core/error.h"
#include "transport/choice.h"
#include "transport/host_exec.h"
#include "transport/transport.h"

namespace m2n {

class Waiting {
 public:
  bool is_closed() const { return load_seq_cst(&is_closed_) != 0; }  // SYNC: comm-closed

 protected:
  // `own_name`: the rank's in messages, as in "expert rank 3".
  explicit Waiting(std::string own_name) : own_name_(std::move(own_name)) {}

  const std::string& own_name() const { return own_name_; }
  // False in a child after fork().
  bool is_own_process() const { return fork_count_ == m2n::fork_count(); }
  void require_usable() const {
    if (!is_own_process()) {
      throw Error(Failure::kSetup, own_name_ +
                                       ": this comm was made before fork() and cannot be used in the child; make a "
                                       "comm in the child, or start processes with 'spawn'");
    }
    if (is_closed()) throw Error(Failure::kSetup, own_name_ + ": the comm is closed");
  }
  // Every wait ends, once it is woken.
  void set_closed() { store_seq_cst(&is_closed_, 1u); }  // SYNC: comm-closed
  // Time in waits, behind some microseconds of spinning.
  uint64_t waited_ns() const { return load_relaxed(&waited_ns_); }  // relaxed: a counter

  // What arrives over a network arrives while somebody looks.
  void look_at_network() {
    if (Network* network = network_.get(); network != nullptr) network->look();
  }
  // Calls send(exec) with an Exec that can send to any peer, one message after another. `is_free_after`: what rows are
  // put from is the caller's again when this returns.
  template <class Send>
  auto with_sender(Send&& send, bool is_free_after = false) {
    Network* network = network_.get();
    if (network == nullptr) return send(exec_);
    OutgoingMessage outgoing(*network, is_free_after);
    HostExec exec(exec_, &outgoing);
    return send(exec);
  }

  // Waits for ready() with the comm's own ending conditions; throws when the comm is closed meanwhile. A short wait
  // reads no clock.
  template <class Ready>
  WaitResult wait(Ready&& ready, int64_t deadline_ns) {
    require_usable();
    if (Network* network = network_.get(); network != nullptr) return wait_on_network(*network, ready, deadline_ns);
    if (deadline_ns == kNoWait) return ready() ? WaitResult::kReady : WaitResult::kTimeout;
    return wait_until([&] { return ready() || is_closed(); }, deadline_ns);
  }

  const std::unique_ptr<Transport> host_transport_ = make_host_transport();
  const std::shared_ptr<Window> wake_window_ = host_transport_->make_window(kPageBytes, kPageBytes, 1);
  const Handle wake_handle_ = wake_window_->add_object(0);
  WakeWord* const own_wake_ = reinterpret_cast<WakeWord*>(wake_window_->data());
  NetworkSlot network_;  // empty: peers share memory, all that have come so far
  HostExec exec_{own_wake_, nullptr, &network_};

 private:
  template <class IsOver>
  WaitResult wait_until(IsOver&& is_over, int64_t deadline_ns) {
    WaitResult result = WaitResult::kReady;
    if (!exec_.spin(is_over)) {
      const int64_t began_ns = now_ns();
      result = exec_.wait(is_over, deadline_ns);
      add_relaxed(&waited_ns_, static_cast<uint64_t>(now_ns() - began_ns));
    }
    require_usable();
    return result;
  }
  // Whoever waits makes the network's progress.
  template <class Ready>
  WaitResult wait_on_network(Network& network, Ready&& ready, int64_t deadline_ns) {
    const auto is_over = [&] {
      network.look();
      return ready() || is_closed();
    };
    if (deadline_ns == kNoWait) return is_over() ? WaitResult::kReady : WaitResult::kTimeout;
    struct Driver {
      Network& network;
      explicit Driver(Network& of) : network(of) { network.enter(); }
      ~Driver() { network.leave(); }
    };
    const Driver driver(network);
    return wait_until(is_over, deadline_ns);
  }

  const std::string own_name_;
  const uint32_t fork_count_ = m2n::fork_count();
  uint32_t is_closed_ = 0;
  uint64_t waited_ns_ = 0;
};

}  // namespace m2n
