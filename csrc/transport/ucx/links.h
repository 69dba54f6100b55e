// SPDX-License-Identifier: Apache-2.0
// One UCX worker and the links over it: sends what was put, and lets what arrives land in the windows.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "transport/network/links.h"
#include "transport/ucx/api.h"
#include "transport/ucx/link_address.h"

namespace m2n::ucx {

using Way = UcxOptions::Way;

class Links final : public NetworkLinks {
 public:
  explicit Links(const Choice& choice);
  ~Links() override { close(); }
  // With rows elsewhere nothing here touches their bytes, so rows can only be put, in both directions.
  Areas connect(uint32_t peer_idx, const std::string& bytes, Fd data, bool* wakes) override;
  void close() override;

  void send(const std::vector<Piece>& pieces, const Signal* word, Signal value, bool is_free_after) override;
  void finish(const Signal* word) override;

  void look() override;
  bool settle_and_arm() override;
  int event_fd() const override { return event_fd_; }

 private:
  struct Link final : NetworkLink {
    Links* links = nullptr;
    // Of what the peer sends here.
    Memory* own_memory[kNumAreas] = {};
    uint32_t num_receiving = 0;
    bool was_heard = false;  // since a send that could have waited
    // Of what is sent to it.
    Endpoint* endpoint = nullptr;
    bool is_put = false;
    uint32_t peer_link = 0;
    uint64_t remote[kNumAreas] = {};
    RemoteKey* remote_keys[kNumAreas] = {};
    uint32_t num_sending = 0;
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

  void make_worker(const Choice& choice);
  void require_cuda();
  std::unique_ptr<NetworkLink> make_link() override { return std::make_unique<Link>(); }
  std::string write_door_of(NetworkLink& link) override;
  void end_link(NetworkLink& link) override;
  bool let_go(NetworkLink& link) override;
  Link* find(uint32_t peer_idx) const { return static_cast<Link*>(NetworkLinks::find(peer_idx)); }
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
  bool has_tcp_ = false;
  Context* context_ = nullptr;
  Worker* worker_ = nullptr;
  std::string address_;
  uint64_t max_inline_bytes_ = 0;
  int event_fd_ = -1;
  // Under the lock that all kinds have, as the worker is.
  std::vector<std::unique_ptr<Sending>> sending_, idle_;
  bool has_delivered_ = false;  // a message, since a look began
};

}  // namespace m2n::ucx
