// SPDX-License-Identifier: Apache-2.0
// What the comms of both roles share whose verbs run on a device. Role: AttentionRole or ExpertRole.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <utility>
#include <vector>

#include "exchange/device/doorbell_proxy.h"
#include "exchange/device/memory.h"
#include "exchange/device/stream_waits.h"
#include "exchange/links/roles.h"

namespace m2n {

template <class Role>
class DeviceComm : public Role {
 public:
  ~DeviceComm() override {
    if (this->is_own_process()) return;
    proxy_.release();  // its thread is the parent's
    waits_.release();
  }
  const std::string& device() const { return memory_.device(); }
  bool is_capturing(Stream stream) { return memory_.machine().is_capturing(stream); }
  // Of launches that were given kTimeoutOfComm, those of graphs among them.
  void set_timeout(int64_t timeout_ns) { memory_.set_timeout(timeout_ns); }

  void check() override {
    this->require_usable();
    raise_trouble();
    Comm::check();
  }
  void abort() override {
    if (this->is_own_process()) memory_.abort();
    close();
  }
  void close() override {
    if (!this->is_own_process() || this->is_closed()) return Comm::close();
    // What was launched has its deadlines, and ends by itself; only then what waits in a call is ended.
    for (const auto& event : last_launch_) memory_.machine().synchronize(event.get());
    memory_.abort();
    if (waits_ != nullptr) waits_->stop();
    if (proxy_ != nullptr) proxy_->stop();
    Comm::close();
    // Graphs that still run use memory of this comm. Behind the goodbye: this may wait for kernels of other ranks of
    // the process, and they for this one as long as it has not left.
    if (was_captured_) memory_.machine().synchronize_all();
  }
  Stats stats() const override {
    const Counters moved = memory_.read_counters();
    Stats stats = Comm::stats();
    stats.messages_sent = moved.messages_sent;
    stats.rows_sent = moved.rows_sent;
    stats.bytes_sent = this->counters_.bytes_sent(moved.messages_sent, moved.rows_sent);
    stats.messages_received = moved.messages_received;
    stats.rows_received = moved.rows_received;
    stats.bytes_received = this->counters_.bytes_received(moved.messages_received, moved.rows_received);
    if (waits_ != nullptr) {
      const StreamWaits::Counts counts = waits_->counts();
      stats.stream_waits = counts.launched;
      stats.stream_waits_ended = counts.ended;
    }
    return stats;
  }

 protected:
  template <class... Args>
  explicit DeviceComm(const std::string& device, Args&&... args)
      : Role(std::forward<Args>(args)...), memory_(device, *this->transport_) {
    for (uint32_t slot = 0; slot < this->layout_.num_slots; ++slot) {
      last_launch_.push_back(memory_.machine().make_event());
    }
    if (Network* network = this->network_.get(); network != nullptr) {
      const uint64_t num_rings = uint64_t{this->max_peers_} * this->layout_.num_slots;
      const Doorbell bell{memory_.template on_host<Ring>(num_rings), memory_.template on_device<uint64_t>(1),
                          num_rings};
      doorbell_ = memory_.uploaded(std::vector<Doorbell>{bell});
      const auto list_pieces = [this](const Signal* word, Signal value, std::vector<Piece>& pieces) {
        this->list_pieces(word, value, pieces);
      };
      proxy_ = std::make_unique<DoorbellProxy>(bell, *network, this->exec_, list_pieces);
    }
  }

  // An index returns at a moment when nothing that was launched may look at its peer.
  void keep_verbs_out(const std::function<void()>& body) override {
    const std::unique_lock lock(launching_, std::try_to_lock);
    if (!lock.owns_lock() || was_captured_) return;
    memory_.update_mirror();  // verbs that are launched from here on know who is gone
    const auto is_passed = [this](const auto& event) { return memory_.machine().is_passed(event.get()); };
    const bool is_quiet = is_between_rounds() && std::all_of(last_launch_.begin(), last_launch_.end(), is_passed) &&
                          (waits_ == nullptr || waits_->is_idle()) && (proxy_ == nullptr || proxy_->is_drained());
    if (is_quiet) body();
  }
  bool is_held(uint32_t) override { return false; }
  std::string why_held() const override {
    return was_captured_ ? "may be in use by graphs that were captured: make a new comm"
                         : "may be in use by verbs that are in flight";
  }
  // Is nothing in flight, on any slot, that the role knows of?
  virtual bool is_between_rounds() = 0;
  // Held while something is launched.
  std::shared_lock<std::shared_mutex> launching() { return std::shared_lock(launching_); }

  const Doorbell* doorbell() const override { return doorbell_; }
  bool wakes_peers() const override { return false; }
  void peers_changed() override { memory_.update_mirror(); }

  // Raises the first trouble that a launch has reported, once.
  virtual void raise_trouble() = 0;

  // Streams wait for signals by themselves, ahead of the verbs. `is_troubled`: see StreamWaits.
  void wait_on_streams(std::function<bool(uint32_t slot)> is_troubled) {
    const auto signal = [this](uint32_t peer_idx, uint32_t slot) {
      return const_cast<Signal*>(this->own_signal(peer_idx, slot));
    };
    const auto is_live = [this](uint32_t peer_idx) { return this->peers_.is_live(peer_idx); };
    waits_ = std::make_unique<StreamWaits>(memory_, this->layout_.num_slots, this->max_peers_, this->first_seq_,
                                           StreamWaits::Sight{signal, is_live, std::move(is_troubled)});
  }
  // A round of the slot begins, with the live peers whose rank takes_part(rank).
  template <class TakesPart>
  void begin_round(uint32_t slot, Stream stream, TakesPart&& takes_part) {
    if (waits_ == nullptr || memory_.machine().is_capturing(stream)) return;
    std::vector<uint32_t> peers = memory_.live_peers();
    std::erase_if(peers, [&](uint32_t peer_idx) { return !takes_part(this->rank_of(peer_idx)); });
    waits_->begin_round(slot, std::move(peers));
  }
  // Ahead of the verb that waits for what the round's peers send.
  StreamWait wait_on_stream(uint32_t slot, int64_t timeout_ns, Stream stream) {
    if (waits_ == nullptr || memory_.machine().is_capturing(stream)) return {};
    return waits_->launch(slot, timeout_ns, stream);
  }

  // Trouble on a slot is told to the caller, and so no longer to the thread that ends waits.
  void doubt_rounds(uint32_t slot) {
    if (waits_ != nullptr) waits_->doubt(slot);
  }

  // To be called behind each launch on a slot.
  void note_launch(uint32_t slot, Stream stream) {
    if (memory_.machine().is_capturing(stream)) {
      was_captured_ = true;
    } else {
      memory_.machine().record(last_launch_[slot].get(), stream);
    }
    if (proxy_ != nullptr) proxy_->kick();
  }

  mutable DeviceMemory memory_;
  std::vector<std::shared_ptr<void>> last_launch_;  // events, by slot
  std::unique_ptr<StreamWaits> waits_;

 private:
  std::shared_mutex launching_;
  bool was_captured_ = false;
  const Doorbell* doorbell_ = nullptr;
  std::unique_ptr<DoorbellProxy> proxy_;
};

}  // namespace m2n
