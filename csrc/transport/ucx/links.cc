// SPDX-License-Identifier: Apache-2.0
// Making and ending links: the worker, what a peer must know to reach it, and its endpoint.
#include "transport/ucx/links.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "core/error.h"
#include "transport/host_exec.h"
#include "transport/ucx/tls.h"

namespace m2n::ucx {
namespace {

// A link that is down for a moment makes a peer "unreachable".
constexpr int64_t kConnectNs = 5'000'000'000;
constexpr useconds_t kAgainUs = 250'000;  // UCX itself says each failure on stderr
constexpr int64_t kCloseNs = 1'000'000'000;

// What m2n chooses where neither the user's settings nor the environment do. Up to 512 KB a message is one segment over
// TCP, from there on UCX's rendezvous.
constexpr const char* kVariables[][2] = {
    {"TCP_TX_SEG_SIZE", "1m"}, {"TCP_RX_SEG_SIZE", "1m"}, {"RNDV_THRESH", "512k"}, {"TCP_MAX_IOV", "256"}};

// UCX has threads and locks of its own, which a forked child gets in whatever state they were.
void require_same_process() {
  static const uint32_t used_at = fork_count();
  if (used_at != fork_count()) {
    fail("it was used before fork(), and cannot be used in the child; start processes with 'spawn' or 'forkserver'");
  }
}

// Settings that another try does not mend.
[[noreturn]] void refuse(const std::string& text) { throw Error(Failure::kArgument, "ucx: " + text); }

void require(const Api& api, Status status, const std::string& call) {
  if (status != Status::kOk) fail(call + ": " + api.status_string(status));
}

}  // namespace

Links::Links(const Choice& choice)
    : NetworkLinks("ucx"), api_(load(choice.ucx.library, choice.ucx.beside)), way_(choice.ucx.way) {
  require_same_process();
  try {
    make_worker(choice);
  } catch (...) {
    close();
    throw;
  }
}

void Links::make_worker(const Choice& choice) {
  const UcxOptions& options = choice.ucx;
  Config* config = nullptr;
  require(api_, api_.config_read(nullptr, nullptr, &config), "ucp_config_read");
  const std::unique_ptr<Config, void (*)(Config*)> config_owner(config, api_.config_release);
  for (const auto& [name, value] : kVariables) {
    // Some versions do not know all of them.
    if (std::getenv((std::string("UCX_") + name).c_str()) == nullptr) (void)api_.config_modify(config, name, value);
  }
  for (const auto& [name, value] : options.variables) {
    require(api_, api_.config_modify(config, name.c_str(), value.c_str()), "setting " + name + "=" + value);
  }
  const std::string transports = tls_of(options.variables);
  if (transports.empty() && !options.is_insecure) {
    require(api_, api_.config_modify(config, "TLS", kWithoutTcp), std::string("setting TLS=") + kWithoutTcp);
  }
  tells_of_ends_ = !is_within_host(transports);  // those of shared memory do not
  has_tcp_ = lets_tcp_in(transports) && options.is_insecure;
  Params params;
  params.features = Params::kAm | Params::kRma | Params::kWakeup;
  require(api_, api_.init_version(kMajor, kMinor, &params, config, &context_), "ucp_init");
  if (!choice.device.empty() && choice.inner != nullptr) require_cuda();
  require(api_, api_.worker_create(context_, std::make_unique<WorkerParams>().get(), &worker_), "ucp_worker_create");
  require(api_, api_.worker_get_efd(worker_, &event_fd_), "ucp_worker_get_efd");
  AmHandler handler;
  handler.callback = &on_message;
  handler.arg = this;
  require(api_, api_.worker_set_am_recv_handler(worker_, &handler), "ucp_worker_set_am_recv_handler");
  WorkerAttributes attributes;
  require(api_, api_.worker_query(worker_, &attributes), "ucp_worker_query");
  constexpr uint64_t kFixedBytes = sizeof(MessageHead) + kMaxParts * sizeof(MessagePart);
  if (attributes.max_header_bytes < kFixedBytes) fail("this network has no room for the headers of messages");
  max_inline_bytes_ = std::min<uint64_t>(kMaxInlineBytes, attributes.max_header_bytes - kFixedBytes);
  Address* address = nullptr;
  size_t num_bytes = 0;
  require(api_, api_.worker_get_address(worker_, &address, &num_bytes), "ucp_worker_get_address");
  address_.assign(reinterpret_cast<const char*>(address), num_bytes);
  api_.worker_release_address(worker_, address);
}

void Links::require_cuda() {
  ContextAttributes attributes;
  require(api_, api_.context_query(context_, &attributes), "ucp_context_query");
  if ((attributes.memory_types & ContextAttributes::kCuda) != 0) return;
  refuse("gpu_direct needs a UCX that knows the memory of GPUs, and " + api_.where +
         " was built without CUDA, finds no GPU, or has a UCX_TLS without cuda_copy; "
         "pip install libucx-cu12 and name it by ucx_library, or leave out gpu_direct");
}

std::string Links::write_door_of(NetworkLink& made) {
  auto& link = static_cast<Link&>(made);
  link.links = this;
  LinkAddress address;
  address.link = link.peer_idx;
  address.key = link.key;
  address.way = static_cast<uint32_t>(way_);
  address.worker = address_;
  const std::pair<unsigned char*, uint64_t> areas[] = {{link.own.rows, link.own.rows_bytes},
                                                       {link.own.meta, link.own.meta_bytes}};
  for (uint32_t i = 0; i < kNumAreas; ++i) {
    MapParams params;
    params.address = areas[i].first;
    params.length = areas[i].second;
    require(api_, api_.mem_map(context_, &params, &link.own_memory[i]), "ucp_mem_map");
    void* packed = nullptr;
    size_t num_bytes = 0;
    require(api_, api_.rkey_pack(context_, link.own_memory[i], &packed, &num_bytes), "ucp_rkey_pack");
    address.objects[i] = {reinterpret_cast<uint64_t>(areas[i].first), {static_cast<const char*>(packed), num_bytes}};
    api_.rkey_buffer_release(packed);
  }
  return write_address(address);
}

Areas Links::connect(uint32_t peer_idx, const std::string& bytes, Fd /*data*/, bool* wakes) {
  LinkAddress address;
  if (!read_address(bytes, &address) || address.way > static_cast<uint32_t>(Way::kPut)) {
    fail("the peer's address is none of this version, on a machine of this byte order");
  }
  std::unique_lock lock(mutex_);
  Link& link = static_cast<Link&>(*links_.at(peer_idx));
  const int64_t until_ns = now_ns() + kConnectNs;
  while (true) {
    require_open();
    try {
      make_endpoint(link, address.worker);
      break;
    } catch (const Error&) {
      if (now_ns() > until_ns) throw;
    }
    lock.unlock();
    usleep(kAgainUs);
    lock.lock();
  }
  link.peer_key = address.key;
  link.peer_link = address.link;
  link.is_put = puts(link, way_);
  *wakes = !puts(link, static_cast<Way>(address.way));
  if (areas_.has_rows_apart() && (!link.is_put || *wakes)) {
    refuse(
        "gpu_direct needs puts in both directions, and this link would carry messages (ucx_way, or a network without "
        "remote memory access); leave it out, or use ucx_way='put' on both sides");
  }
  for (uint32_t i = 0; i < kNumAreas; ++i) {
    link.remote[i] = address.objects[i].address;
    if (!link.is_put) continue;
    require(api_, api_.ep_rkey_unpack(link.endpoint, address.objects[i].key.data(), &link.remote_keys[i]),
            "ucp_ep_rkey_unpack: the peer's memory cannot be reached by puts");
  }
  return areas_.add(peer_idx);
}

void Links::make_endpoint(Link& link, const std::string& address) {
  EndpointParams params;
  params.field_mask = EndpointParams::kAddress | EndpointParams::kErrorMode | EndpointParams::kErrorHandler;
  params.address = reinterpret_cast<const Address*>(address.data());
  params.error_mode = EndpointParams::kPeerErrors;
  params.error_callback = &on_error;
  params.error_arg = &link;
  if (!tells_of_ends_) params.field_mask = EndpointParams::kAddress;
  const Status status = api_.ep_create(worker_, &params, &link.endpoint);
  if (status != Status::kOk) {
    link.endpoint = nullptr;
    fail(std::string("no connection to the peer: ") + api_.status_string(status) +
         "; do both sides have the same UCX_TLS and a network in common?" +
         (has_tcp_ ? "" : " Without Config(insecure=True) UCX gets no TCP: transport='tcp' needs no UCX"));
  }
}

std::vector<std::string> Links::transports_of(const Link& link) const {
  Transport transports[16];
  EndpointAttributes attributes;
  attributes.transports = transports;
  attributes.num_transports = std::size(transports);
  std::vector<std::string> names;
  if (api_.ep_query(link.endpoint, &attributes) != Status::kOk) return names;
  for (const Transport& transport : transports) {
    if (transport.name != nullptr) names.emplace_back(transport.name);
  }
  return names;
}

bool Links::puts(const Link& link, Way way) const {
  // Those that reach memory which they have not allocated; the first two without the processors of the other host.
  constexpr std::string_view kReal[] = {"rc", "dc", "cma", "xpmem", "knem"};
  const auto names = transports_of(link);
  const auto has_one_of = [&](size_t count) {
    return std::any_of(kReal, kReal + count, [&](std::string_view real) {
      return std::any_of(names.begin(), names.end(), [&](const auto& name) { return name.starts_with(real); });
    });
  };
  if (way == Way::kPut && !names.empty() && !has_one_of(std::size(kReal))) {
    refuse("ucx_way='put' needs real remote memory access, which " + names[0] +
           " only emulates: it would wait for the peer to make progress; use 'auto'");
  }
  return way == Way::kPut || (way == Way::kAuto && has_one_of(2));
}

bool Links::progress_until(const std::function<bool()>& is_done, int64_t most_ns) {
  const int64_t until_ns = now_ns() + most_ns;
  while (!is_done()) {
    if (now_ns() > until_ns) return false;
    if (api_.worker_progress(worker_) == 0) sched_yield();
  }
  return true;
}

void Links::close_endpoint(Link& link, bool by_force) {
  if (link.endpoint == nullptr) return;
  for (RemoteKey*& key : link.remote_keys) {
    if (key != nullptr) api_.rkey_destroy(std::exchange(key, nullptr));
  }
  RequestParam param;
  param.field_mask = RequestParam::kFlags;
  param.flags = by_force && tells_of_ends_ ? RequestParam::kForceClose : 0;
  const Request request = api_.ep_close_nbx(std::exchange(link.endpoint, nullptr), &param);
  if (request == nullptr || is_error(request)) return;
  progress_until([&] { return api_.request_check_status(request) != Status::kInProgress; }, kCloseNs);
  api_.request_free(request);
}

void Links::end_link(NetworkLink& ending) {
  auto& link = static_cast<Link&>(ending);
  while (api_.worker_progress(worker_) != 0) {  // what has arrived still counts
  }
  link.is_ended = true;
  close_endpoint(link, true);
  progress_until([&] { return link.num_sending == 0 && link.num_receiving == 0; }, kCloseNs);
}

bool Links::let_go(NetworkLink& ended) {
  auto& link = static_cast<Link&>(ended);
  if (!link.is_ended) {  // its handshake came to nothing
    link.is_ended = true;
    close_endpoint(link, true);
  }
  if (link.num_sending != 0 || link.num_receiving != 0) return false;
  unmap(link);
  return true;
}

void Links::unmap(Link& link) {
  for (Memory*& memory : link.own_memory) {
    if (memory != nullptr) (void)api_.mem_unmap(context_, std::exchange(memory, nullptr));
  }
}

void Links::close() {
  std::lock_guard lock(mutex_);
  if (is_closed_) return;
  is_closed_ = true;
  for (uint32_t i = 0; i < links_.size(); ++i) {
    Link* link = find(i);
    if (link == nullptr) continue;
    close_endpoint(*link, link->is_broken || link->num_sending != 0);
    link->is_ended = true;
    unmap(*link);
  }
  if (worker_ != nullptr) api_.worker_destroy(worker_);
  if (context_ != nullptr) api_.cleanup(context_);
}

}  // namespace m2n::ucx
