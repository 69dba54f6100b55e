// SPDX-License-Identifier: Apache-2.0
// Two ranks with one link over a transport, as a comm makes them: windows, a wake word, and a network where memory is
// not shared.
#pragma once

#include <sys/socket.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/peer.h"
#include "transport/host_exec.h"
#include "transport/transport.h"

namespace m2n::conformance {

using Make = std::function<std::unique_ptr<Transport>()>;

constexpr uint32_t kMaxPeers = 3, kPeer = 1;  // the link has the index in the middle
constexpr int64_t kSoonNs = 20'000'000'000;

// A sentence that says nothing about this transport.
struct NotHere : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void require(bool is_so, const std::string& what) {
  if (!is_so) throw std::runtime_error(what);
}

// Looks until it is so, and not for ever.
template <class Ready>
void await(Ready&& ready, const std::string& what) {
  for (const int64_t until_ns = now_ns() + kSoonNs; !ready(); usleep(200)) require(now_ns() < until_ns, what);
}

inline uint64_t sum(const unsigned char* bytes, uint64_t num_bytes) {
  uint64_t total = 0;
  for (uint64_t i = 0; i < num_bytes; ++i) total += bytes[i];
  return total;
}

class Rank final : public LinkListener {
 public:
  explicit Rank(const Make& make)
      : transport(make()),
        object_bytes(round_up(64 << 10, transport->page_bytes())),
        stride_bytes(2 * object_bytes),
        rows(transport->make_rows_window(object_bytes, stride_bytes, kMaxPeers)),
        meta(transport->make_window(object_bytes, stride_bytes, kMaxPeers)),
        relay(transport->make_relay(0)),
        exec_(&wake, relay.get(), &slot_) {
    if (transport->shares_memory()) return;
    network = transport->make_network();
    require(network != nullptr, "peers that share no memory are reached over a network");
    network->open(this, &wake, {kMaxPeers, object_bytes, object_bytes});
    slot_.set(network.get());
  }
  ~Rank() override {
    exposed.reset();
    if (network != nullptr) network->close();
  }

  bool is_on_host() const { return transport->origin().device.empty(); }
  void require_host() const {
    if (!is_on_host()) throw NotHere("the host cannot touch its memory");
  }

  std::vector<Handle> add_objects(uint32_t peer_idx = kPeer) {
    std::vector<Handle> handles;
    handles.push_back(rows->add_object(peer_idx));
    handles.push_back(meta->add_object(peer_idx));
    return handles;
  }
  // Over a network: what the peer needs of this rank.
  std::string address(uint32_t peer_idx = kPeer) {
    (void)add_objects(peer_idx);
    return network->make_address(peer_idx, {rows_of(peer_idx), object_bytes, meta_of(peer_idx), object_bytes});
  }
  void connect(const std::string& peers_door, Fd data, uint32_t peer_idx = kPeer) {
    const Areas send = network->connect(peer_idx, peers_door, std::move(data), &is_woken);
    exposed = transport->expose(send);
    view = {send.rows, send.meta, nullptr, nullptr};
  }
  void attach(std::vector<Handle> handles, const Origin& origin, WakeWord* peers_wake) {
    mappings.clear();
    for (Handle& handle : handles) mappings.push_back(transport->attach(std::move(handle), origin));
    view = {mappings[0]->data(), mappings[1]->data(), peers_wake, nullptr};
  }

  unsigned char* rows_of(uint32_t peer_idx = kPeer) const { return rows->data() + peer_idx * stride_bytes; }
  unsigned char* meta_of(uint32_t peer_idx = kPeer) const { return meta->data() + peer_idx * stride_bytes; }
  const Signal* word() const { return reinterpret_cast<const Signal*>(meta_of()); }

  // One message: rows from the beginning of the peer's object on, and a signal.
  void send(const std::vector<unsigned char>& bytes, Signal value) {
    auto* peers_word = reinterpret_cast<Signal*>(view.meta);
    const auto write = [&](HostExec exec) {
      flush(exec, peers_word);
      put(exec, view.rows, bytes.data(), bytes.size());
      require(drain(exec, nullptr), "a block alone is the last one");
      signal(exec, view, peers_word, value);
    };
    if (network == nullptr) return write(exec_);
    OutgoingMessage outgoing(*network, /*is_free_after=*/true);
    write(HostExec(exec_, &outgoing));
  }
  // Waits as a verb does.
  bool receive(Signal value) {
    const auto has_come = [&] {
      if (network != nullptr) network->look();
      return load_signal(word()) == value;
    };
    if (exec_.spin(has_come)) return true;
    if (network != nullptr) network->enter();
    const WaitResult result = exec_.wait(has_come, now_ns() + kSoonNs);
    if (network != nullptr) network->leave();
    return result == WaitResult::kReady;
  }

  void link_broke(uint32_t, const std::string& violation) override {
    is_violated = !violation.empty();
    is_broken = true;
  }
  void link_ended(uint32_t) override { is_ended = true; }

  const std::unique_ptr<Transport> transport;
  const uint64_t object_bytes, stride_bytes;
  std::shared_ptr<Window> rows, meta;
  WakeWord wake{};
  std::unique_ptr<Network> network;
  std::vector<std::shared_ptr<Mapping>> mappings;
  std::shared_ptr<void> exposed;
  const std::unique_ptr<SignalRelay> relay;  // ends before the mappings, into which it writes
  PeerView view;
  bool is_woken = true;  // by the peer's signals
  std::atomic<bool> is_broken = false, is_violated = false, is_ended = false;

 private:
  NetworkSlot slot_;
  HostExec exec_;
};

// Who made it, as another process would say.
inline Origin elsewhere(const Rank& rank) {
  Origin origin = rank.transport->origin();
  ++origin.process;
  return origin;
}

inline void link(Rank& one, Rank& other) {
  if (one.network == nullptr) {
    one.attach(other.add_objects(), other.transport->origin(), &other.wake);
    return other.attach(one.add_objects(), one.transport->origin(), &one.wake);
  }
  int ends[2];
  require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0, "a pair of sockets");
  Fd first(ends[0]), second(ends[1]);
  const std::string ones = one.address(), others = other.address();
  one.connect(others, std::move(first));
  other.connect(ones, std::move(second));
}

struct Pair {
  explicit Pair(const Make& make) : writer(make), owner(make) {
    writer.require_host();
    link(writer, owner);
  }
  Rank writer, owner;
};

}  // namespace m2n::conformance
