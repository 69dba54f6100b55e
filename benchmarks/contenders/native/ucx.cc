// SPDX-License-Identifier: Apache-2.0
// UCX through its C API: "ucx-shm" puts rows and then a flag into memory of the peer, "ucx-tcp" sends tagged messages.
//
// Favourable to UCX: both sides know all row counts, so no counts are exchanged, and receives are posted before the
// clock starts.
#include <ucp/api/ucp.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <utility>

#include "contender.h"

namespace m2n::bench {
namespace {

using Settings = std::vector<std::pair<const char*, const char*>>;

constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kLeastRunBytes = 2048;  // of a put straight from x, on average

uint64_t round_up(uint64_t bytes, uint64_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

void require(ucs_status_t status, const char* call) {
  if (status != UCS_OK) throw std::runtime_error(std::string("UCX: ") + call + ": " + ucs_status_string(status));
}

struct Cleanup {
  void operator()(ucp_context* context) const { ucp_cleanup(context); }
  void operator()(ucp_worker* worker) const { ucp_worker_destroy(worker); }  // and its endpoints
  void operator()(ucp_rkey* rkey) const { ucp_rkey_destroy(rkey); }
};

std::unique_ptr<ucp_context, Cleanup> make_context(uint64_t features, const Settings& settings) {
  ucp_config_t* config = nullptr;
  require(ucp_config_read(nullptr, nullptr, &config), "ucp_config_read");
  for (const auto& [key, value] : settings) require(ucp_config_modify(config, key, value), key);
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = features;
  ucp_context_h context = nullptr;
  const ucs_status_t status = ucp_init(&params, config, &context);
  ucp_config_release(config);
  require(status, "ucp_init");
  return std::unique_ptr<ucp_context, Cleanup>(context);
}

std::unique_ptr<ucp_worker, Cleanup> make_worker(ucp_context_h context) {
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SINGLE;
  ucp_worker_h worker = nullptr;
  require(ucp_worker_create(context, &params, &worker), "ucp_worker_create");
  return std::unique_ptr<ucp_worker, Cleanup>(worker);
}

// What both have: a worker, an endpoint to every peer, and requests that go on.
class Ucx : public Contender {
 public:
  void settle() override {
    finish(requests_);
    meet();
  }

 protected:
  Ucx(const std::string& name, const Traffic& traffic, const Services& services, uint64_t features,
      const Settings& settings)
      : name_(name),
        traffic_(traffic),
        services_(services),
        context_(make_context(features, settings)),
        worker_(make_worker(context_.get())),
        arrived_(static_cast<uint64_t*>(
            services.shared_memory(name + ".arrived", traffic.num_processes() * sizeof(uint64_t)))) {
    ucp_address_t* address = nullptr;
    size_t num_bytes = 0;
    require(ucp_worker_get_address(worker_.get(), &address, &num_bytes), "ucp_worker_get_address");
    publish("address", std::string(reinterpret_cast<const char*>(address), num_bytes));
    ucp_worker_release_address(worker_.get(), address);
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      const std::string of_peer = look_up("address", peer);
      ucp_ep_params_t params{};
      params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS;
      params.address = reinterpret_cast<const ucp_address_t*>(of_peer.data());
      endpoints_.emplace_back();
      require(ucp_ep_create(worker_.get(), &params, &endpoints_.back()), "ucp_ep_create");
    }
  }

  void publish(const std::string& what, const std::string& bytes) const {
    services_.publish(name_ + "." + what + "." + std::to_string(traffic_.process), bytes);
  }
  std::string look_up(const std::string& what, uint32_t peer) const {
    return services_.look_up(name_ + "." + what + "." + std::to_string(traffic_.process_of_peer(peer)));
  }

  template <class Ready>
  void wait(Ready&& ready) const {
    services_.wait([&] {
      if (ready()) return true;
      ucp_worker_progress(worker_.get());
      return false;
    });
  }

  // Takes what a call with _nbx returned: done, an error, or a request that goes on.
  static void keep(ucs_status_ptr_t request, const char* call, std::vector<void*>& requests) {
    if (UCS_PTR_IS_ERR(request)) require(UCS_PTR_STATUS(request), call);
    if (request != nullptr) requests.push_back(request);
  }

  void finish(std::vector<void*>& requests) const {
    for (void* request : requests) {
      wait([&] { return ucp_request_check_status(request) != UCS_INPROGRESS; });
      require(ucp_request_check_status(request), "transfer");
      ucp_request_free(request);
    }
    requests.clear();
  }

  void connect() {
    const ucp_request_param_t param{};
    keep(ucp_worker_flush_nbx(worker_.get(), &param), "ucp_worker_flush_nbx", requests_);
    Ucx::settle();
  }

  // Everybody gets here before anybody goes on, and makes progress meanwhile: what one has sent may need that of its
  // receiver to come to an end.
  void meet() {
    std::atomic_ref(arrived_[traffic_.process]).store(++meeting_);
    for (uint32_t process = 0; process < traffic_.num_processes(); ++process) {
      wait([&] { return std::atomic_ref(arrived_[process]).load() >= meeting_; });
    }
  }

  // What comes from a peer (replies at attention ranks, rows at expert ranks), and what goes to it.
  uint64_t bytes_from(uint32_t peer) const { return traffic_.is_attention() ? reply_bytes(peer) : row_bytes(peer); }
  uint64_t bytes_to(uint32_t peer) const { return traffic_.is_attention() ? row_bytes(peer) : reply_bytes(peer); }

  const std::string name_;
  const Traffic& traffic_;
  const Services services_;
  const std::unique_ptr<ucp_context, Cleanup> context_;
  const std::unique_ptr<ucp_worker, Cleanup> worker_;
  std::vector<ucp_ep_h> endpoints_;  // by peer
  std::vector<void*> requests_;      // of what was sent

 private:
  uint64_t row_bytes(uint32_t peer) const { return traffic_.rows[peer] * traffic_.row_bytes; }
  uint64_t reply_bytes(uint32_t peer) const { return traffic_.reply_rows[peer] * traffic_.reply_row_bytes; }

  uint64_t* const arrived_;  // by process: the last meeting it came to
  uint64_t meeting_ = 0;
};

// Memory that UCX has allocated, open to the peers' puts: for each of them a flag, and its bytes from the next page on.
class Put final : public Ucx {
 public:
  Put(const std::string& name, const Traffic& traffic, const Services& services)
      : Ucx(name, traffic, services, UCP_FEATURE_RMA, {{"TLS", "posix,self"}}) {
    map_window();
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) remotes_.push_back(open_window(peer));
    if (traffic_.is_attention()) choose_gathers();
    connect();
  }
  ~Put() override {
    remotes_.clear();
    ucp_mem_unmap(context_.get(), window_);
  }

  void dispatch_send(const unsigned char* x) override {
    ++seq_;
    uint32_t first_row = 0;
    unsigned char* to = gathered_.data();
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      if (is_gathered_[peer]) {
        gather_rows(traffic_, x, first_row, traffic_.rows[peer], to, std::memcpy);
        put(peer, to, bytes_to(peer), kPageBytes);
      } else {
        const auto put_run = [&](unsigned char* at, const unsigned char* from, uint64_t num_bytes) {
          put(peer, from, num_bytes, kPageBytes + static_cast<uint64_t>(at - to));
        };
        gather_rows(traffic_, x, first_row, traffic_.rows[peer], to, put_run);
      }
      first_row += traffic_.rows[peer];
      to += bytes_to(peer);
      ring(peer);
    }
  }
  void combine_recv(unsigned char*) override { wait_for_flags(); }
  const unsigned char* replies_from(uint32_t peer) override { return slot_of(peer) + kPageBytes; }

  void dispatch_recv() override {
    ++seq_;
    wait_for_flags();
  }
  const unsigned char* rows_from(uint32_t peer) override { return slot_of(peer) + kPageBytes; }
  void combine_send(const unsigned char* y) override {
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      put(peer, y, bytes_to(peer), kPageBytes);
      y += bytes_to(peer);
      ring(peer);
    }
  }

 private:
  struct Remote {
    uint64_t address = 0;
    std::unique_ptr<ucp_rkey, Cleanup> rkey;
  };

  void map_window() {
    uint64_t num_bytes = 0;
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      offsets_.push_back(num_bytes);
      num_bytes += kPageBytes + round_up(bytes_from(peer), kPageBytes);
    }
    ucp_mem_map_params_t params{};
    params.field_mask = UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_FLAGS;
    params.length = num_bytes;
    params.flags = UCP_MEM_MAP_ALLOCATE;
    require(ucp_mem_map(context_.get(), &params, &window_), "ucp_mem_map");
    ucp_mem_attr_t attributes{};
    attributes.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS;
    require(ucp_mem_query(window_, &attributes), "ucp_mem_query");
    base_ = static_cast<unsigned char*>(attributes.address);
    std::memset(base_, 0, num_bytes);
    void* key = nullptr;
    size_t num_key_bytes = 0;
    require(ucp_rkey_pack(context_.get(), window_, &key, &num_key_bytes), "ucp_rkey_pack");
    std::string offer;
    for (uint64_t offset : offsets_) {
      const uint64_t address = reinterpret_cast<uint64_t>(base_) + offset;
      offer.append(reinterpret_cast<const char*>(&address), sizeof address);
    }
    offer.append(static_cast<const char*>(key), num_key_bytes);
    ucp_rkey_buffer_release(key);
    publish("window", offer);
  }

  // This rank's slot at a peer, whose offer is one address for each process of this side, and the key.
  Remote open_window(uint32_t peer) const {
    const std::string offer = look_up("window", peer);
    const uint64_t num_here = traffic_.is_attention() ? traffic_.num_attention : traffic_.num_expert;
    Remote remote;
    std::memcpy(&remote.address, offer.data() + traffic_.rank() * sizeof(uint64_t), sizeof remote.address);
    ucp_rkey_h rkey = nullptr;
    require(ucp_ep_rkey_unpack(endpoints_[peer], offer.data() + num_here * sizeof(uint64_t), &rkey),
            "ucp_ep_rkey_unpack");
    remote.rkey.reset(rkey);
    return remote;
  }

  // A put for each run of neighbouring rows, straight from x, saves a copy but costs 50 ns. Measured at 256 KB, where a
  // memcpy takes 23 us or, in other runs, 116 us: runs of 8 KB are faster put by put than gathered (by 4 us in both),
  // of 4 KB likewise (5 and 1 us), of 2 KB at the first (25 and 27 us) and not at the second (123 and 120 us), of 1 KB
  // about the same.
  void choose_gathers() {
    uint64_t first_row = 0;
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      uint64_t num_runs = 0;
      for (uint32_t row = 0; row < traffic_.rows[peer]; ++row) {
        num_runs += row == 0 || !is_neighbour(traffic_, first_row + row);
      }
      is_gathered_.push_back(bytes_to(peer) < num_runs * kLeastRunBytes);
      first_row += traffic_.rows[peer];
    }
    gathered_.resize(traffic_.token_of_row.size() * traffic_.row_bytes);
  }

  unsigned char* slot_of(uint32_t peer) const { return base_ + offsets_[peer]; }

  void put(uint32_t peer, const void* from, uint64_t num_bytes, uint64_t offset) {
    if (num_bytes == 0) return;
    const ucp_request_param_t param{};
    const Remote& remote = remotes_[peer];
    keep(ucp_put_nbx(endpoints_[peer], from, num_bytes, remote.address + offset, remote.rkey.get(), &param),
         "ucp_put_nbx", requests_);
  }
  void ring(uint32_t peer) {
    require(ucp_worker_fence(worker_.get()), "ucp_worker_fence");
    put(peer, &seq_, sizeof seq_, 0);
  }
  void wait_for_flags() {
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      std::atomic_ref flag(*reinterpret_cast<uint64_t*>(slot_of(peer)));
      wait([&] { return flag.load() == seq_; });
    }
  }

  std::vector<uint64_t> offsets_;  // of the slots of the peers, in the window
  ucp_mem_h window_ = nullptr;
  unsigned char* base_ = nullptr;
  std::vector<Remote> remotes_;  // this rank's slot at each peer
  uint64_t seq_ = 0;
  std::vector<unsigned char> gathered_;  // rows of x for peer 0, then 1, ...
  std::vector<bool> is_gathered_;        // by peer
};

// The best of what was tried on two cores: up to 512 KB in one piece (16 KB: 17 us, by the default settings 42 us; 256
// KB: 48 and 68 us), from there on UCX's rendezvous (1 MB: 177 us, in one piece 440 us).
const Settings kTcpSettings = {
    {"TLS", "tcp,self"}, {"TCP_TX_SEG_SIZE", "1m"}, {"TCP_RX_SEG_SIZE", "1m"}, {"RNDV_THRESH", "512k"}};

// Tagged messages: over TCP a put would only be an emulated one.
class Tagged final : public Ucx {
 public:
  Tagged(const std::string& name, const Traffic& traffic, const Services& services)
      : Ucx(name, traffic, services, UCP_FEATURE_TAG, kTcpSettings) {
    uint64_t num_in = 0, num_out = 0;
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      offsets_in_.push_back(num_in);
      num_in += bytes_from(peer);
      num_out += bytes_to(peer);
    }
    received_.resize(num_in + 1);  // also without replies there is an address to give
    if (traffic_.is_attention()) gathered_.resize(num_out);
    post_receives();
    connect();
  }
  ~Tagged() override {
    for (void* receive : receives_) {
      ucp_request_cancel(worker_.get(), receive);
      ucp_request_free(receive);
    }
  }

  void dispatch_send(const unsigned char* x) override {
    unsigned char* to = gathered_.data();
    uint32_t first_row = 0;
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      gather_rows(traffic_, x, first_row, traffic_.rows[peer], to, std::memcpy);
      send(peer, to);
      to += bytes_to(peer);
      first_row += traffic_.rows[peer];
    }
  }
  void combine_recv(unsigned char*) override { finish(receives_); }
  const unsigned char* replies_from(uint32_t peer) override { return received_.data() + offsets_in_[peer]; }
  void dispatch_recv() override { finish(receives_); }
  const unsigned char* rows_from(uint32_t peer) override { return received_.data() + offsets_in_[peer]; }
  // Straight from y: the rows of one rank lie together, and y stays as it is until settle.
  void combine_send(const unsigned char* y) override {
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      send(peer, y);
      y += bytes_to(peer);
    }
  }
  void settle() override {
    Ucx::settle();
    post_receives();
  }

 private:
  // The sender's number is the tag: a rank has one message from each peer in an exchange.
  void post_receives() {
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      if (bytes_from(peer) == 0) continue;
      const ucp_request_param_t param{};
      keep(ucp_tag_recv_nbx(worker_.get(), received_.data() + offsets_in_[peer], bytes_from(peer),
                            traffic_.process_of_peer(peer), ~ucp_tag_t{0}, &param),
           "ucp_tag_recv_nbx", receives_);
    }
  }
  void send(uint32_t peer, const unsigned char* from) {
    if (bytes_to(peer) == 0) return;  // the peer knows
    const ucp_request_param_t param{};
    keep(ucp_tag_send_nbx(endpoints_[peer], from, bytes_to(peer), traffic_.process, &param), "ucp_tag_send_nbx",
         requests_);
  }

  std::vector<uint64_t> offsets_in_;  // of the bytes of each peer
  std::vector<unsigned char> received_, gathered_;
  std::vector<void*> receives_;
};

}  // namespace
}  // namespace m2n::bench

extern "C" m2n::bench::Contender* make_contender(const std::string& name, const m2n::bench::Traffic& traffic,
                                                 const m2n::bench::Services& services) {
  using namespace m2n::bench;
  if (name == "ucx-shm") return new Put(name, traffic, services);
  if (name == "ucx-tcp") return new Tagged(name, traffic, services);
  throw std::runtime_error("UCX: no contender " + name);
}
