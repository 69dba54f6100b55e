// SPDX-License-Identifier: Apache-2.0
// What both device comms hold: the machine, and the memory that their launches share.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "exchange/device/machines/machine.h"
#include "exchange/device/verbs/wait.h"
#include "transport/transport.h"

namespace m2n {

// How long one launch of a receive or a poll may wait before the host looks at what only it can see.
inline constexpr int64_t kSliceNs = 20'000'000;

class DeviceMemory {
 public:
  DeviceMemory(const std::string& device, Transport& transport)
      : device_(device),
        transport_(&transport),
        machine_(make_machine(device)),
        control_(on_host<Control>(1)),
        counters_(on_device<Counters>(1)) {}

  const std::string& device() const { return device_; }
  Machine& machine() { return *machine_; }
  Control* control() { return control_; }
  Counters* counters() { return counters_; }
  Counters read_counters() {
    Counters copy{};
    machine_->copy(&copy, counters_, sizeof copy);
    return copy;
  }
  void set_timeout(int64_t timeout_ns) { store_relaxed(&control_->timeout_ns, timeout_ns); }
  // Every wait of a verb ends.
  void abort() { store_release(&control_->abort, 1u); }  // SYNC: verb-abort

  // Zeroed arrays, kept as long as this lives.
  template <class T>
  T* on_device(uint64_t count) {
    kept_.push_back(machine_->allocate(count * sizeof(T)));
    return static_cast<T*>(kept_.back().get());
  }
  template <class T>
  T* on_host(uint64_t count) {
    kept_.push_back(transport_->make_words(count * sizeof(T)));
    return static_cast<T*>(kept_.back().get());
  }
  template <class T>
  T* uploaded(const std::vector<T>& values) {
    T* array = on_device<T>(values.size());
    machine_->copy(array, values.data(), values.size() * sizeof(T));
    return array;
  }

  // The table of peers for verbs; `on_host` is the one that the watcher writes.
  Peers mirror(const PeerTable& on_host, uint32_t max_peers) {
    peers_ = {{on_device<PeerEntry>(max_peers), on_device<uint32_t>(1)},
              on_host,
              uploaded(std::vector<int32_t>(max_peers, -1))};
    max_peers_ = max_peers;
    return peers_;
  }
  // Brings peers that have joined, and states that have changed, to the verbs: of a new peer rank, view, state, in the
  // order in which a verb may read them.
  void update_mirror() {
    const std::lock_guard lock(mirror_mutex_);
    const uint32_t count = peers_.on_host.size();
    for (uint32_t i = 0; i < count; ++i) {
      PeerState state = peers_.on_host.state(i);
      if (i == mirrored_.size()) {
        mirrored_.push_back({PeerState::kUnused, 0, 0});
        const uint32_t num_known = i + 1;
        machine_->copy(peers_.table.count, &num_known, sizeof num_known);
      }
      Mirrored& known = mirrored_[i];
      PeerEntry* mirror = &peers_.table.entries[i];
      if (const uint32_t given_up = peers_.on_host.is_given_up(i); known.is_given_up != given_up) {
        machine_->copy(&mirror->is_given_up, &given_up, sizeof given_up);
        known.is_given_up = given_up;
      }
      if (known.state == state) continue;
      const PeerEntry& entry = peers_.on_host.entries[i];
      const bool is_new = known.state == PeerState::kUnused, is_over = state == PeerState::kUnused;
      if (is_new) {
        known.rank = entry.rank;
        machine_->copy(&mirror->rank, &entry.rank, sizeof entry.rank);
        machine_->copy(&mirror->joined, &entry.joined, sizeof entry.joined);
        machine_->copy(&mirror->view, &entry.view, sizeof entry.view);
      }
      // Until both agree: the watcher may have found the end while LIVE was on its way, and a verb told it before.
      while (known.state != state) {
        machine_->copy(&mirror->state, &state, sizeof state);  // SYNC: peer-mirror
        known.state = state;
        state = peers_.on_host.state(i);
      }
      if ((!is_new && !is_over) || known.rank >= max_peers_) continue;
      const int32_t newest = peers_.on_host.find(known.rank);
      machine_->copy(&peers_.newest[known.rank], &newest, sizeof newest);
    }
  }

  // Peers that the verbs know, the newest life of each rank, and that are live.
  std::vector<uint32_t> live_peers() {
    const std::lock_guard lock(mirror_mutex_);
    const PeerTable& on_host = peers_.on_host;
    std::vector<uint32_t> live;
    for (uint32_t i = 0; i < mirrored_.size(); ++i) {
      const bool is_newest = on_host.find(on_host.entries[i].rank) == static_cast<int32_t>(i);
      if (is_newest && mirrored_[i].state == PeerState::kLive && on_host.is_live(i)) live.push_back(i);
    }
    return live;
  }

 private:
  std::string device_;
  Transport* transport_;
  std::unique_ptr<Machine> machine_;
  std::vector<std::shared_ptr<void>> kept_;
  Control* control_;
  Counters* counters_;
  Peers peers_{};
  uint32_t max_peers_ = 0;
  std::mutex mirror_mutex_;
  struct Mirrored {
    PeerState state;  // verbs may have seen a later one
    uint32_t rank;
    uint32_t is_given_up;
  };
  std::vector<Mirrored> mirrored_;  // by peer index
};

}  // namespace m2n
