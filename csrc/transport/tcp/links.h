// SPDX-License-Identifier: Apache-2.0
// Links over connected stream sockets, one each, that came out of the handshake: nobody else can write to them.
//
// A message is a header (network_message.h), without bytes of its own, and behind it the bytes of its parts. It is sent
// from where it lies. The receiver reads the header, checks it, and only then takes the rest, which the kernel copies
// to where it belongs; what is short comes with the header, and is copied once more.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/atomic.h"
#include "transport/network/areas.h"
#include "transport/network/links.h"

namespace m2n::tcp {

class Links final : public NetworkLinks {
 public:
  Links();
  ~Links() override { close(); }
  Links(const Links&) = delete;
  Links& operator=(const Links&) = delete;

  void open(const Network::Peers& peers, std::shared_ptr<Window> rows_areas, std::function<void()> on_signal,
            std::function<void()> on_report) override;
  std::string make_door(uint32_t peer_idx, const Areas& own) override;
  Areas connect(uint32_t peer_idx, const std::string& door, Fd data, bool* wakes) override;
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
  int event_fd() const override { return epoll_.get(); }
  int64_t report(LinkListener& listener) override;

 private:
  static constexpr size_t kMaxHeaderBytes = sizeof(MessageHead) + kMaxParts * sizeof(MessagePart);
  // Room for a header and what comes with it by one call. Up to here to copy takes less time than a second call.
  static constexpr size_t kStagedBytes = 68 << 10;

  // A message of which the socket has not taken all yet: the header, then the pieces.
  struct Sending {
    const Signal* word = nullptr;
    unsigned char header[kMaxHeaderBytes];
    std::vector<iovec> rest;
    size_t first = 0;  // those before it have left
    bool is_done() const { return first == rest.size(); }
  };
  struct Link {
    uint32_t peer_idx = 0;
    uint64_t key = 0, peer_key = 0;  // with which messages begin: from the peer, and to it
    Areas own;
    Fd socket;
    bool is_open = false;  // more may arrive
    // Bytes that were received before it was known where they go.
    std::unique_ptr<unsigned char[]> staged;
    size_t staged_begin = 0, staged_end = 0;
    bool is_long = false;  // the last message: likely the next one too, which is not to be staged then
    // The message whose rest is on its way, if there is any.
    MessageHead head{};
    iovec places[kMaxParts] = {};
    uint32_t num_places = 0, next_place = 0;
    bool is_in_message = false;
    std::vector<std::unique_ptr<Sending>> sending;  // the oldest first
    // Its end.
    bool is_broken = false, is_told = false, is_ended = false;
    int64_t tell_ns = 0;     // when to tell that it broke
    int64_t ending_ns = -1;  // since when it ends
    std::string violation;
  };

  Link* find(uint32_t peer_idx) { return peer_idx < links_.size() ? links_[peer_idx].get() : nullptr; }
  void watch_socket(const Link& link, int operation);
  void write_message(const Link& link, Sending& sending, const std::vector<Piece>& pieces, Signal value);
  // What the socket takes now; true: all.
  bool push(Link& link, Sending& sending);
  void push_all(Link& link);
  void wait_until_taken(Link& link, Sending& sending);
  static void copy_to_area(Sending& sending, const std::vector<Piece>& pieces);
  std::unique_ptr<Sending> take_idle();
  void forget_sending(Link& link);
  // What has arrived, up to a message that has come whole and those that came with it; true: there was one.
  bool receive(Link& link);
  bool begin_message(Link& link);
  void take_staged(Link& link);
  bool receive_staged(Link& link);
  bool receive_rest(Link& link);
  void deliver(Link& link);
  // One moment of all links; true: something has arrived or was taken.
  bool progress();
  void lose(Link& link, const std::string& violation = "");
  void stop(Link& link);

  Fd epoll_;
  std::mutex mutex_;  // of all below
  bool is_closed_ = false;
  SendAreas areas_;
  std::vector<std::unique_ptr<Link>> links_;  // by peer index
  std::vector<Link*> open_links_;
  std::vector<std::unique_ptr<Sending>> idle_;
  uint32_t num_sending_ = 0;
  bool is_reporting_ = false;  // the listener is being told of links by their indices
  uint64_t num_moved_ = 0;     // bytes, both ways
  std::function<void()> on_signal_, on_report_;
};

// Throws Error(kSetup), of this transport.
[[noreturn]] void fail(const std::string& text);

}  // namespace m2n::tcp
