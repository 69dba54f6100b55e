// SPDX-License-Identifier: Apache-2.0
// One UCX worker and the links over it: sends what was drafted, and lets what arrives land in the windows.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "transport/network/areas.h"
#include "transport/network/links.h"
#include "transport/ucx/api.h"
#include "transport/ucx/door.h"

namespace m2n::ucx {

// Puts, a fence and a put of the signal where remote memory access is real; one active message where it is emulated.
enum class Way : uint32_t { kAuto, kMessage, kPut };

struct Settings {
  std::string library, beside;  // see load()
  std::string device;           // a GPU that uses the windows too; "": none
  std::string rows;             // the transport in whose memory rows lie; "": in that of the host
  bool is_insecure = false;     // TCP may be taken, by which anybody on the network reaches this process
  Way way = Way::kAuto;
  std::vector<std::pair<std::string, std::string>> variables;  // of UCX, without their UCX_
};

class Links final : public NetworkLinks {
 public:
  explicit Links(const Settings& settings);
  ~Links() override;
  Links(const Links&) = delete;
  Links& operator=(const Links&) = delete;

  // With rows elsewhere nothing here touches their bytes, so rows can only be put, in both directions.
  void open(const Network::Peers& peers, std::shared_ptr<Window> rows_areas, std::function<void()> on_signal,
            std::function<void()> on_report) override;
  std::string make_door(uint32_t peer_idx, const Areas& own) override;
  Areas connect(uint32_t peer_idx, const std::string& bytes, Fd data, bool* wakes) override;
  void end(uint32_t peer_idx) override;
  void end_now(uint32_t peer_idx) override;
  bool release(uint32_t peer_idx) override;
  void drain() override;
  void close() override;

  bool covers(const void* at) const override { return areas_.covers(at); }
  void send(const std::vector<Piece>& pieces, const Signal* word, Signal value, bool is_free_after) override;
  void finish(const Signal* word) override;
  uint32_t num_sending() const override { return load_acquire(&num_sending_); }  // SYNC: network-sending

  void look() override;
  bool settle_and_arm() override;
  int event_fd() const override { return event_fd_; }
  int64_t report(LinkListener& listener) override;

 private:
  struct Link {
    Links* links = nullptr;
    uint32_t peer_idx = 0;
    // Of what the peer sends here.
    uint64_t key = 0;
    Areas own;
    Memory* own_memory[kNumAreas] = {};
    uint32_t num_receiving = 0;
    bool was_heard = false;  // since a send that could have waited
    // Of what is sent to it.
    Endpoint* endpoint = nullptr;
    bool has_errors = false;  // UCX tells when its connection breaks, and lets go of what it still sends
    bool is_put = false;
    uint64_t peer_key = 0;
    uint32_t peer_link = 0;
    uint64_t remote[kNumAreas] = {};
    RemoteKey* remote_keys[kNumAreas] = {};
    uint32_t num_sending = 0;
    // Its end.
    bool is_broken = false, is_told = false, is_ended = false;
    int64_t tell_ns = 0;     // when to tell that it broke
    int64_t ending_ns = -1;  // since when it ends
    std::string violation;
  };
  // Memory that UCX reads until the last request has ended.
  struct Sending {
    Link* link;
    const Signal* word;
    Signal value;
    std::vector<unsigned char> header;
    std::vector<Iov> iov;
    uint32_t num_requests = 0;
  };
  struct Receiving {
    Link* link;
    MessageHead head;
    std::vector<Iov> iov;
  };

  void make_worker(const Settings& settings);
  void require_cuda();
  Link* find(uint32_t peer_idx) { return peer_idx < links_.size() ? links_[peer_idx].get() : nullptr; }
  void make_endpoint(Link& link, const std::string& address);
  std::vector<std::string> transports_of(const Link& link) const;
  bool puts(const Link& link, Way way) const;
  void post_message(Link& link, const std::vector<Piece>& pieces, const Signal* word, Signal value, bool is_free_after);
  void post_puts(Link& link, const std::vector<Piece>& pieces, const Signal* word, Signal value, bool is_free_after);
  void write_message(Sending& sending, const std::vector<Piece>& pieces);
  Request post(Sending& sending, uint32_t flags);
  static void copy_to_area(std::vector<Piece>& pieces);
  // A message whose memory is kept until the last of its requests has ended.
  Sending& keep(Link& link, const Signal* word);
  void note_request(Sending& sending, Request request);
  void end_request(Sending& sending, Status status);
  Status receive(const void* header, size_t header_bytes, void* data, size_t num_bytes, const AmReceived& received);
  Status fetch(Link& link, const MessageHead& head, std::vector<Iov> places, void* data);
  void deliver(Link& link, const MessageHead& head);
  void break_link(Link& link, const std::string& violation);
  void close_endpoint(Link& link, bool by_force);
  void unmap(Link& link);
  // Until is_done(), or for so long; the lock is held.
  bool progress_until(const std::function<bool()>& is_done, int64_t most_ns);

  static Status on_message(void* arg, const void* header, size_t header_bytes, void* data, size_t num_bytes,
                           const AmReceived* received);
  static void on_error(void* arg, Endpoint* endpoint, Status status);
  static void on_sent(void* request, Status status, void* user_data);
  static void on_received(void* request, Status status, size_t length, void* user_data);

  const Api& api_;
  const Way way_;
  bool is_within_host_ = false;  // only transports that do not tell of errors
  bool has_tcp_ = false;
  Context* context_ = nullptr;
  Worker* worker_ = nullptr;
  std::string address_;
  uint64_t max_inline_bytes_ = 0;
  int event_fd_ = -1;
  std::mutex mutex_;  // of the worker and of all below
  bool is_closed_ = false;
  SendAreas areas_;
  std::vector<std::unique_ptr<Link>> links_;  // by peer index
  std::vector<std::unique_ptr<Sending>> sending_, idle_;
  uint32_t num_sending_ = 0;
  bool is_reporting_ = false;   // the listener is being told of links by their indices
  bool has_delivered_ = false;  // a message, since a look began
  std::function<void()> on_signal_, on_report_;
};

}  // namespace m2n::ucx
