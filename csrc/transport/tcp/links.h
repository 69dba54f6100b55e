// SPDX-License-Identifier: Apache-2.0
// Links over connected stream sockets, one each, that came out of the handshake: nobody else can write to them.
//
// A message is a header (network/message.h), without bytes of its own, and behind it the bytes of its parts. It is sent
// from where it lies. The receiver reads the header, checks it, and only then takes the rest, which the kernel copies
// to where it belongs; what is short comes with the header, and is copied once more.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "transport/network/links.h"

namespace m2n::tcp {

class Links final : public NetworkLinks {
 public:
  Links();
  ~Links() override { close(); }
  Areas connect(uint32_t peer_idx, const std::string& address, Fd data, bool* wakes) override;
  void drain() override;
  void close() override;

  void send(const std::vector<Piece>& pieces, const Signal* word, Signal value, bool is_free_after) override;
  void finish(const Signal* word) override;

  void look() override;
  bool settle_and_arm() override;
  int event_fd() const override { return epoll_.get(); }

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
  struct Link final : NetworkLink {
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
  };

  std::unique_ptr<NetworkLink> make_link() override { return std::make_unique<Link>(); }
  std::string write_door_of(NetworkLink& link) override;
  void end_link(NetworkLink& link) override;
  bool let_go(NetworkLink& link) override;
  Link* find(uint32_t peer_idx) const { return static_cast<Link*>(NetworkLinks::find(peer_idx)); }
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
  // Under the lock that all kinds have.
  std::vector<Link*> open_links_;
  std::vector<std::unique_ptr<Sending>> idle_;
  uint64_t num_moved_ = 0;  // bytes, both ways
};

}  // namespace m2n::tcp
