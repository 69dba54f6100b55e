// SPDX-License-Identifier: Apache-2.0
// Across hosts: windows in this host's memory, which peers reach through UCX, loaded when it is asked for. A GPU may
// use that memory too, and have rows in its own, where NICs reach it (GPUDirect).
#include <algorithm>

#include "core/error.h"
#include "transport/host_exec.h"
#include "transport/own_thread.h"
#include "transport/transport.h"
#include "transport/ucx_links.h"
#include "transport/ucx_proxy.h"

namespace m2n {
namespace {

// "ucx;way=auto;library=/a/libucp.so.0;TLS=tcp,self": names of UCX's own variables have capitals. With "auto" in the
// place of "ucx" peers of this host share memory, and UCX is loaded for the first one that does not.
ucx::Settings parse_settings(const std::string& name) {
  const auto refuse = [&](const std::string& part) {
    throw Error(Failure::kSetup,
                "transport: expected 'ucx' or 'auto' and ';key=value' for way (auto, message, put), library, "
                "beside, device, rows or a variable of UCX, got '" +
                    part + "' in '" + name + "'");
  };
  ucx::Settings settings;
  for (size_t begin = name.find(';'), end = begin; begin != std::string::npos; begin = end) {
    end = name.find(';', begin + 1);
    const std::string part = name.substr(begin + 1, end == std::string::npos ? end : end - begin - 1);
    const size_t equals = part.find('=');
    const std::string key = part.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : part.substr(equals + 1);
    if (key == "library") {
      settings.library = value;
    } else if (key == "beside") {
      settings.beside = value;
    } else if (key == "device") {
      settings.device = value;
    } else if (key == "rows") {
      settings.rows = value;
    } else if (key == "way" && (value == "auto" || value == "message" || value == "put")) {
      settings.way = value == "auto" ? ucx::Way::kAuto : value == "put" ? ucx::Way::kPut : ucx::Way::kMessage;
    } else if (!key.empty() && key[0] >= 'A' && key[0] <= 'Z' && equals != std::string::npos) {
      settings.variables.emplace_back(key, value);
    } else {
      refuse(part);
    }
  }
  const size_t first = name.find(';');
  const std::string kind = name.substr(0, first);
  if (kind != "ucx" && kind != "auto") refuse(kind);
  settings.shares_memory = kind == "auto";
  return settings;
}

class UcxNetwork final : public Network {
 public:
  // `rows`: what makes send areas for rows that do not lie in memory of the host; nullptr: they do.
  UcxNetwork(const ucx::Settings& settings, std::shared_ptr<Transport> rows)
      : rows_(std::move(rows)), shared_(std::make_shared<Shared>(settings)) {}
  // In a forked child nothing of it may be touched; there the thread's share, which never ends, keeps it.
  ~UcxNetwork() override {
    if (fork_count_ == fork_count()) close();
  }

  void open(LinkListener* listener, WakeWord* own_wake, const Peers& peers) override {
    own_wake_ = own_wake;
    const auto areas =
        rows_ == nullptr ? nullptr : rows_->make_window(peers.rows_bytes, peers.rows_bytes, peers.max_peers);
    shared_->links.open(
        peers, areas, [this] { wake_sleepers(own_wake_, this); }, [this] { shared_->proxy.kick(false); });
    start_own_thread("m2n-ucx", [shared = shared_, listener] { shared->proxy.run(*listener); }).detach();
    is_running_ = true;
  }

  std::string make_door(uint32_t peer_idx, const Areas& own) override {
    return shared_->links.make_door(peer_idx, own);
  }
  Areas connect(uint32_t peer_idx, const std::string& door, bool* wakes) override {
    return shared_->links.connect(peer_idx, door, wakes);
  }
  void send(const std::vector<Piece>& pieces, const Signal* word, Signal value, bool is_free_after) override {
    shared_->links.send(pieces, word, value, is_free_after);
    shared_->proxy.sent();
  }
  bool covers(const void* at) const override { return shared_->links.covers(at); }
  void finish(const Signal* word) override { shared_->links.finish(word); }
  void end(uint32_t peer_idx) override { shared_->links.end(peer_idx); }
  void end_now(uint32_t peer_idx) override { shared_->links.end_now(peer_idx); }
  bool release(uint32_t peer_idx) override { return shared_->links.release(peer_idx); }
  void drain() override { shared_->links.drain(); }
  void close() override {
    if (std::exchange(is_running_, false)) shared_->proxy.stop();
    shared_->links.close();
  }

  void look() override { shared_->links.look(); }
  void enter() override { shared_->proxy.enter(); }
  void leave() override { shared_->proxy.leave(own_wake_, this); }
  bool sleep(const uint32_t* events, uint32_t seen, int64_t most_ns) override {
    return shared_->proxy.sleep(events, seen, most_ns);
  }
  void interrupt() override { shared_->proxy.interrupt(); }

 private:
  struct Shared {
    explicit Shared(const ucx::Settings& settings) : links(settings), proxy(links) {}
    ucx::Links links;
    ucx::Proxy proxy;
  };

  const uint32_t fork_count_ = fork_count();
  const std::shared_ptr<Transport> rows_;
  const std::shared_ptr<Shared> shared_;
  WakeWord* own_wake_ = nullptr;
  bool is_running_ = false;
};

class UcxTransport final : public Transport {
 public:
  explicit UcxTransport(const std::string& name)
      : settings_(parse_settings(name)),
        host_(settings_.device.empty() ? make_host_transport() : make_transport("pinned:" + settings_.device)),
        rows_(settings_.rows.empty() ? nullptr : make_transport(settings_.rows)) {
    if (!settings_.shares_memory) ucx::load(settings_.library, settings_.beside);
  }
  bool shares_memory() const override { return settings_.shares_memory; }
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
    if (!settings_.shares_memory) throw Error(Failure::kSetup, "ucx: the memory of a peer cannot be mapped");
    return host_->attach(std::move(handle), origin);
  }
  std::shared_ptr<void> expose(const Areas& send) override {
    return host_->expose(rows_ == nullptr ? send : Areas{nullptr, 0, send.small, send.small_bytes});
  }
  std::unique_ptr<Network> make_network() override { return std::make_unique<UcxNetwork>(settings_, rows_); }

 private:
  const ucx::Settings settings_;
  const std::unique_ptr<Transport> host_;
  const std::shared_ptr<Transport> rows_;  // nullptr: rows lie in memory of the host too
};

}  // namespace

std::unique_ptr<Transport> make_ucx_transport(const std::string& name) { return std::make_unique<UcxTransport>(name); }

std::string describe_ucx(const std::string& name) {
  const ucx::Settings settings = parse_settings(name);
  return ucx::load(settings.library, settings.beside).where;
}

}  // namespace m2n
