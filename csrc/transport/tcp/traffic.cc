// SPDX-License-Identifier: Apache-2.0
// Messages over the sockets of links. No call waits for a peer: what a socket does not take stays here, and goes on
// when somebody makes progress.
#include <sched.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>

#include "core/atomic.h"
#include "core/error.h"
#include "transport/host_exec.h"
#include "transport/tcp/links.h"

namespace m2n::tcp {
namespace {

// Who must have its rows back waits for a peer that takes them, which a copy does not make faster: as long as it takes
// some now and then, and not for ever.
constexpr int64_t kTakesNs = 200'000;
constexpr int64_t kTakenNs = 10'000'000;
// Up to so many sockets are asked one by one: for more it takes less time to ask which of them have something.
constexpr size_t kFewLinks = 4;
constexpr int kMaxEvents = 64;
// What is taken with the header of a message that is likely long.
constexpr size_t kFirstBytes = 512;
constexpr int kSettleRounds = 64;  // of one call, while each finds something

bool is_for_later(int error_number) {
  // The last two: the system is short of memory for a moment, and the connection lives.
  return error_number == EAGAIN || error_number == EWOULDBLOCK || error_number == ENOBUFS || error_number == ENOMEM;
}

// Takes bytes off the front of a list, from entry `first` on; the new first entry.
size_t advance(iovec* list, size_t first, size_t count, size_t num_bytes) {
  while (first < count && num_bytes >= list[first].iov_len) num_bytes -= list[first++].iov_len;
  if (num_bytes != 0) {
    list[first].iov_base = static_cast<unsigned char*>(list[first].iov_base) + num_bytes;
    list[first].iov_len -= num_bytes;
  }
  return first;
}

}  // namespace

void Links::send(const std::vector<Piece>& pieces, const Signal* word, Signal value, bool is_free_after) {
  std::lock_guard lock(mutex_);
  Link* link = find(areas_.place_of(word).peer_idx);
  // To a peer that is gone nothing is sent; its state says so.
  if (is_closed_ || link == nullptr || !link->is_open) return;
  std::unique_ptr<Sending> owner = take_idle();
  Sending& sending = *owner;
  sending.word = word;
  write_message(*link, sending, pieces, value);
  if (!link->sending.empty() || !push(*link, sending)) {
    if (!link->is_open) return idle_.push_back(std::move(owner));
    link->sending.push_back(std::move(owner));
    store_release(&num_sending_, num_sending_ + 1);  // SYNC: network-sending
    watch_socket(*link, EPOLL_CTL_MOD);
    if (is_free_after) wait_until_taken(*link, sending);
    if (is_free_after && !sending.is_done()) copy_to_area(sending, pieces);
    return;
  }
  idle_.push_back(std::move(owner));
}

std::unique_ptr<Links::Sending> Links::take_idle() {
  if (idle_.empty()) return std::make_unique<Sending>();
  std::unique_ptr<Sending> one = std::move(idle_.back());  // used again for the sake of its memory
  idle_.pop_back();
  return one;
}

void Links::write_message(const Link& link, Sending& sending, const std::vector<Piece>& pieces, Signal value) {
  MessageHead head{link.peer_key, 0, 0, 0, areas_.place_of(sending.word).offset, value};
  MessagePart parts[kMaxParts];
  sending.first = 0;
  sending.rest.resize(1);
  for (const Piece& piece : pieces) {
    areas_.add_part(head, parts, 0, piece.to, piece.num_bytes);
    sending.rest.push_back({const_cast<unsigned char*>(piece.from), piece.num_bytes});
  }
  const size_t parts_bytes = head.num_parts * sizeof(MessagePart);
  std::memcpy(sending.header, &head, sizeof head);
  std::memcpy(sending.header + sizeof head, parts, parts_bytes);
  sending.rest[0] = {sending.header, sizeof head + parts_bytes};
}

bool Links::push(Link& link, Sending& sending) {
  while (!sending.is_done()) {
    msghdr message{};
    message.msg_iov = sending.rest.data() + sending.first;
    message.msg_iovlen = std::min<size_t>(sending.rest.size() - sending.first, IOV_MAX);
    const bool is_all = sending.first + message.msg_iovlen == sending.rest.size();
    const ssize_t taken = sendmsg(link.socket.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL | (is_all ? 0 : MSG_MORE));
    if (taken < 0 && errno == EINTR) continue;
    if (taken < 0 && is_for_later(errno)) return false;
    if (taken < 0) {
      // What has arrived counts, though nothing leaves any more.
      while (receive(link)) {
      }
      lose(link);
      return false;
    }
    num_moved_ += static_cast<uint64_t>(taken);
    sending.first = advance(sending.rest.data(), sending.first, sending.rest.size(), static_cast<size_t>(taken));
  }
  return true;
}

void Links::push_all(Link& link) {
  if (link.sending.empty()) return;
  while (link.is_open && !link.sending.empty() && push(link, *link.sending.front())) {
    idle_.push_back(std::move(link.sending.front()));
    link.sending.erase(link.sending.begin());
    store_release(&num_sending_, num_sending_ - 1);  // SYNC: network-sending
  }
  if (link.is_open && link.sending.empty()) watch_socket(link, EPOLL_CTL_MOD);
}

void Links::forget_sending(Link& link) {
  store_release(&num_sending_, num_sending_ - static_cast<uint32_t>(link.sending.size()));  // SYNC: network-sending
  for (auto& one : link.sending) idle_.push_back(std::move(one));
  link.sending.clear();
}

void Links::wait_until_taken(Link& link, Sending& sending) {
  const int64_t began_ns = now_ns();
  const auto is_under_way = [&] {
    return std::any_of(link.sending.begin(), link.sending.end(),
                       [&](const auto& one) { return one.get() == &sending; });
  };
  for (int64_t last_ns = began_ns; is_under_way();) {
    // Receiving too: the peer may be in the same place.
    const int64_t now = now_ns();
    if (progress()) last_ns = now;
    if (now - last_ns > kTakesNs || now - began_ns > kTakenNs) return;
  }
  sending.first = sending.rest.size();
}

void Links::copy_to_area(Sending& sending, const std::vector<Piece>& pieces) {
  for (size_t i = std::max<size_t>(sending.first, 1); i < sending.rest.size(); ++i) {
    iovec& rest = sending.rest[i];
    const Piece& piece = pieces[i - 1];
    unsigned char* to = piece.to + (piece.num_bytes - rest.iov_len);
    if (rest.iov_base != to) std::memcpy(to, rest.iov_base, rest.iov_len);
    rest.iov_base = to;
  }
}

void Links::finish(const Signal* word) {
  const int64_t until_ns = now_ns() + kFinishNs;
  while (num_sending() != 0) {
    std::lock_guard lock(mutex_);
    Link* link = find(areas_.place_of(word).peer_idx);
    if (is_closed_ || link == nullptr) return;
    const auto is_it = [word](const auto& one) { return one->word == word; };
    if (std::none_of(link->sending.begin(), link->sending.end(), is_it)) return;
    if (now_ns() > until_ns) return lose(*link);
    if (!progress()) sched_yield();
  }
}

bool Links::receive(Link& link) {
  bool has_delivered = false;
  while (link.is_open) {
    if (!link.is_in_message && !begin_message(link)) {
      if (!link.is_open || has_delivered || !receive_staged(link)) break;
      continue;
    }
    take_staged(link);
    if (link.next_place != link.num_places && (has_delivered || !receive_rest(link))) break;
    deliver(link);
    has_delivered = true;
  }
  return has_delivered;
}

bool Links::begin_message(Link& link) {
  const size_t num_bytes = link.staged_end - link.staged_begin;
  const unsigned char* at = link.staged.get() + link.staged_begin;
  if (!read_head(at, num_bytes, &link.head)) return false;
  if (link.head.key != link.key || link.head.link != 0 || link.head.num_inline != 0) {
    lose(link, "it sent bytes that begin no message");
    return false;
  }
  if (link.head.num_parts > kMaxParts) {
    lose(link, "it sent a message with " + std::to_string(link.head.num_parts) + " parts");
    return false;
  }
  const size_t header_bytes = sizeof link.head + link.head.num_parts * sizeof(MessagePart);
  if (num_bytes < header_bytes) return false;
  Message message;
  uint64_t data_bytes = 0;
  std::memcpy(message.parts, at + sizeof link.head, link.head.num_parts * sizeof(MessagePart));
  for (uint32_t i = 0; i < link.head.num_parts; ++i)
    data_bytes += message.parts[i].num_bytes;  // may wrap: not yet read
  const std::string wrong =
      read_message(at, header_bytes, data_bytes, {link.own.rows_bytes, link.own.meta_bytes}, &message);
  if (!wrong.empty()) {
    lose(link, "it sent a message with " + wrong);
    return false;
  }
  link.staged_begin += header_bytes;
  link.next_place = link.num_places = 0;
  for (uint32_t i = 0; i < link.head.num_parts; ++i) {
    const MessagePart& part = message.parts[i];
    if (part.num_bytes == 0) continue;
    link.places[link.num_places++] = {data_of(link.own, part.area) + part.offset, part.num_bytes};
  }
  link.is_in_message = true;
  link.is_long = data_bytes > kStagedBytes - kMaxHeaderBytes;
  return true;
}

void Links::take_staged(Link& link) {
  while (link.next_place != link.num_places && link.staged_begin != link.staged_end) {
    const iovec& place = link.places[link.next_place];
    const size_t num_bytes = std::min(place.iov_len, link.staged_end - link.staged_begin);
    std::memcpy(place.iov_base, link.staged.get() + link.staged_begin, num_bytes);
    link.staged_begin += num_bytes;
    link.next_place = static_cast<uint32_t>(advance(link.places, link.next_place, link.num_places, num_bytes));
  }
}

bool Links::receive_staged(Link& link) {
  const size_t left = link.staged_end - link.staged_begin;  // less than a header
  if (left != 0) std::memmove(link.staged.get(), link.staged.get() + link.staged_begin, left);
  link.staged_begin = 0;
  link.staged_end = left;
  const size_t room = (link.is_long ? kFirstBytes : kStagedBytes) - left;
  while (true) {
    const ssize_t num_bytes = recv(link.socket.get(), link.staged.get() + left, room, MSG_DONTWAIT);
    if (num_bytes > 0) {
      link.staged_end += static_cast<size_t>(num_bytes);
      num_moved_ += static_cast<uint64_t>(num_bytes);
      return true;
    }
    if (num_bytes < 0 && errno == EINTR) continue;
    if (num_bytes == 0 || !is_for_later(errno)) lose(link);
    return false;
  }
}

bool Links::receive_rest(Link& link) {
  while (link.next_place != link.num_places) {
    msghdr message{};
    message.msg_iov = link.places + link.next_place;
    message.msg_iovlen = link.num_places - link.next_place;
    const ssize_t num_bytes = recvmsg(link.socket.get(), &message, MSG_DONTWAIT);
    if (num_bytes < 0 && errno == EINTR) continue;
    if (num_bytes == 0 || (num_bytes < 0 && !is_for_later(errno))) lose(link);
    if (num_bytes <= 0) return false;
    num_moved_ += static_cast<uint64_t>(num_bytes);
    link.next_place =
        static_cast<uint32_t>(advance(link.places, link.next_place, link.num_places, static_cast<size_t>(num_bytes)));
  }
  return true;
}

void Links::deliver(Link& link) {
  link.is_in_message = false;
  store_signal(reinterpret_cast<Signal*>(link.own.meta + link.head.word_offset),
               link.head.value);  // SYNC: slot-signal
  on_signal_();
}

bool Links::progress() {
  const uint64_t moved = num_moved_;
  const auto progress_of = [this](Link& link) {
    push_all(link);
    receive(link);
  };
  if (open_links_.size() <= kFewLinks) {
    // From the last on: one that is lost goes out of the list.
    for (size_t i = open_links_.size(); i-- > 0;) progress_of(*open_links_[i]);
    return num_moved_ != moved;
  }
  epoll_event events[kMaxEvents];
  const int num_events = epoll_wait(epoll_.get(), events, kMaxEvents, 0);
  for (int i = 0; i < num_events; ++i) {
    Link* link = find(events[i].data.u32);
    if (link != nullptr && link->is_open) progress_of(*link);
  }
  return num_moved_ != moved;
}

void Links::look() {
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (lock.owns_lock() && !is_closed_) progress();
}

bool Links::settle_and_arm() {
  std::lock_guard lock(mutex_);
  if (is_closed_) return true;
  for (int round = 0; round < kSettleRounds; ++round) {
    if (!progress()) return true;
  }
  return false;
}

}  // namespace m2n::tcp
