// SPDX-License-Identifier: Apache-2.0
// What all kinds of networks share: the thread that makes their progress, and where windows lie.
#include <algorithm>

#include "core/error.h"
#include "transport/host_exec.h"
#include "transport/network/proxy.h"
#include "transport/own_thread.h"

namespace m2n {
namespace {

class NetworkOfLinks final : public Network {
 public:
  // `rows`: what makes send areas for rows that do not lie in memory of the host; nullptr: they do.
  NetworkOfLinks(std::unique_ptr<NetworkLinks> links, std::shared_ptr<Transport> rows)
      : rows_(std::move(rows)), shared_(std::make_shared<Shared>(std::move(links))) {}
  // In a forked child nothing of it may be touched; there the thread's share, which never ends, keeps it.
  ~NetworkOfLinks() override {
    if (fork_count_ == fork_count()) close();
  }

  void open(LinkListener* listener, WakeWord* own_wake, const Peers& peers) override {
    own_wake_ = own_wake;
    const auto areas =
        rows_ == nullptr ? nullptr : rows_->make_window(peers.rows_bytes, peers.rows_bytes, peers.max_peers);
    links().open(peers, areas, [this] { wake_sleepers(own_wake_, this); }, [this] { shared_->proxy.kick(false); });
    start_own_thread("m2n-network", [shared = shared_, listener] { shared->proxy.run(*listener); }).detach();
    is_running_ = true;
  }

  std::string make_address(uint32_t peer_idx, const Areas& own) override { return links().make_address(peer_idx, own); }
  Areas connect(uint32_t peer_idx, const std::string& address, Fd data, bool* wakes) override {
    return links().connect(peer_idx, address, std::move(data), wakes);
  }
  void send(const std::vector<Piece>& pieces, const Signal* word, Signal value, bool is_free_after) override {
    links().send(pieces, word, value, is_free_after);
    shared_->proxy.sent();
  }
  bool covers(const void* at) const override { return links().covers(at); }
  void finish(const Signal* word) override { links().finish(word); }
  void end(uint32_t peer_idx) override { links().end(peer_idx); }
  void end_now(uint32_t peer_idx) override { links().end_now(peer_idx); }
  bool release(uint32_t peer_idx) override { return links().release(peer_idx); }
  void drain() override { links().drain(); }
  void close() override {
    if (std::exchange(is_running_, false)) shared_->proxy.stop();
    links().close();
  }

  void look() override { links().look(); }
  void enter() override { shared_->proxy.enter(); }
  void leave() override { shared_->proxy.leave(own_wake_, this); }
  bool sleep(const uint32_t* events, uint32_t seen, int64_t most_ns) override {
    return shared_->proxy.sleep(events, seen, most_ns);
  }
  void interrupt() override { shared_->proxy.interrupt(); }

 private:
  struct Shared {
    explicit Shared(std::unique_ptr<NetworkLinks> made) : links(std::move(made)), proxy(*links) {}
    const std::unique_ptr<NetworkLinks> links;
    NetworkProxy proxy;
  };
  NetworkLinks& links() const { return *shared_->links; }

  const uint32_t fork_count_ = fork_count();
  const std::shared_ptr<Transport> rows_;
  const std::shared_ptr<Shared> shared_;
  WakeWord* own_wake_ = nullptr;
  bool is_running_ = false;
};

class NetworkTransport final : public Transport {
 public:
  NetworkTransport(const Choice& choice, std::function<std::unique_ptr<NetworkLinks>()> make_links)
      : shares_memory_(choice.kind == Choice::Kind::kAuto),
        host_(choice.device.empty() ? make_host_transport() : make_transport({Choice::Kind::kPinned, choice.device})),
        rows_(choice.inner == nullptr ? nullptr : make_transport(*choice.inner)),
        make_links_(std::move(make_links)) {}
  bool shares_memory() const override { return shares_memory_; }
  uint64_t page_bytes() const override {
    return rows_ == nullptr ? host_->page_bytes() : std::max(host_->page_bytes(), rows_->page_bytes());
  }
  std::shared_ptr<void> make_words(uint64_t bytes) override { return host_->make_words(bytes); }
  std::shared_ptr<Window> make_window(uint64_t object_bytes, uint64_t stride_bytes, uint32_t max_peers) override {
    return host_->make_window(object_bytes, stride_bytes, max_peers);
  }
  std::shared_ptr<Window> make_rows_window(uint64_t object_bytes, uint64_t stride_bytes, uint32_t max_peers) override {
    return (rows_ == nullptr ? *host_ : *rows_).make_window(object_bytes, stride_bytes, max_peers);
  }
  std::shared_ptr<Mapping> attach(Handle handle, const Origin& origin) override {
    if (!shares_memory_) throw Error(Failure::kSetup, "network: the memory of a peer cannot be mapped");
    return host_->attach(std::move(handle), origin);
  }
  std::shared_ptr<void> expose(const Areas& send) override {
    return host_->expose(rows_ == nullptr ? send : Areas{nullptr, 0, send.meta, send.meta_bytes});
  }
  std::unique_ptr<Network> make_network() override { return std::make_unique<NetworkOfLinks>(make_links_(), rows_); }

 private:
  const bool shares_memory_;
  const std::unique_ptr<Transport> host_;
  const std::shared_ptr<Transport> rows_;  // nullptr: rows lie in memory of the host too
  const std::function<std::unique_ptr<NetworkLinks>()> make_links_;
};

}  // namespace

std::unique_ptr<Transport> make_network_transport(const Choice& choice,
                                                  std::function<std::unique_ptr<NetworkLinks>()> make_links) {
  return std::make_unique<NetworkTransport>(choice, std::move(make_links));
}

}  // namespace m2n
