// SPDX-License-Identifier: Apache-2.0
// What the fuzz targets share: numbers out of the fuzzer's bytes, a check that ends the run, and a fake peer.
#pragma once

#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "core/atomic.h"
#include "core/peer.h"
#include "exchange/links/comm.h"
#include "transport/choice.h"
#include "transport/control.h"

namespace fuzz {

// Ends the run: libFuzzer prints the stack and keeps the input.
inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "FUZZ: does not hold: %s\n", what);
  std::abort();
}

// The fuzzer's input as a stream of numbers; zeros behind its end.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  bool is_empty() const { return left_ == 0; }
  template <class T>
  T take() {
    T value{};
    const size_t size = left_ < sizeof(T) ? left_ : sizeof(T);
    if (size != 0) std::memcpy(&value, data_, size);
    data_ += size;
    left_ -= size;
    return value;
  }
  uint32_t below(uint32_t limit) { return take<uint8_t>() % limit; }

 private:
  const uint8_t* data_;
  size_t left_;
};

// The memory of a fake peer, which the comm under test writes into. Made once and used again: that is most of the cost.
struct Desk {
  std::shared_ptr<m2n::Window> rows, meta, wake;
  std::vector<uint64_t> ids;

  Desk(const m2n::Rows& rows_layout, const m2n::Meta& meta_layout) {
    const auto transport = m2n::make_transport("shm");
    rows = transport->make_window(rows_layout.object_bytes, rows_layout.stride_bytes, 1);
    meta = transport->make_window(meta_layout.object_bytes, meta_layout.object_bytes, 1);
    wake = transport->make_window(m2n::kPageBytes, m2n::kPageBytes, 1);
    for (m2n::Window* window : {rows.get(), meta.get(), wake.get()}) {
      ids.push_back(window->add_object(0).id);
    }
  }
};

// A peer that writes what it likes: its end of a link to a comm in this process.
class FakePeer {
 public:
  FakePeer(m2n::Comm& comm, Desk& desk, uint32_t rank) : rank_(rank), desk_(desk) {
    std::memset(desk.meta->data(), 0, desk.meta->bytes());
    m2n::Comm::Offer offer = comm.offer(rank, 1);
    idx_ = offer.peer_idx;
    for (m2n::Handle& handle : offer.handles) {
      num_bytes_.push_back(handle.bytes);
      mappings_.push_back(m2n::make_transport("shm")->attach(std::move(handle), offer.origin));
    }
    std::vector<m2n::Handle> handles(desk.ids.size());  // inside one process only the ids are looked at
    for (size_t i = 0; i < handles.size(); ++i) handles[i].id = desk.ids[i];
    comm.attach(idx_, std::move(handles), {m2n::process_nonce()});
    int ends[2];
    require(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0, "socketpair");
    connection_ = ends[0];
    comm.watch(idx_, ends[1], -1);
    joined_ = comm.peer_infos().back().joined;
  }
  ~FakePeer() {
    if (connection_ >= 0) close(connection_);
  }
  FakePeer(const FakePeer&) = delete;
  FakePeer& operator=(const FakePeer&) = delete;

  uint32_t rank() const { return rank_; }
  uint32_t idx() const { return idx_; }
  m2n::PeerInfo info(const m2n::Comm& comm) const {
    for (const m2n::PeerInfo& info : comm.peer_infos()) {
      if (info.joined == joined_) return info;
    }
    require(false, "the comm remembers every link");
    return {};
  }
  // Where this peer writes: its objects in the comm's windows, or what it has left there.
  unsigned char* rows() { return has_let_go() ? left_[0].data() : mappings_[0]->data(); }
  unsigned char* meta() { return has_let_go() ? left_[1].data() : mappings_[1]->data(); }
  const unsigned char* rows() const { return const_cast<FakePeer*>(this)->rows(); }
  const unsigned char* meta() const { return const_cast<FakePeer*>(this)->meta(); }
  // It has the comm's memory no more: from now on its index may serve another one. It writes nothing any more.
  bool has_let_go() const { return mappings_.empty(); }
  void let_go() {
    for (size_t i = 0; i < 2; ++i) left_.emplace_back(mappings_[i]->data(), mappings_[i]->data() + num_bytes_[i]);
    mappings_.clear();
  }
  // Where the comm writes.
  const unsigned char* desk_rows() const { return desk_.rows->data(); }
  const unsigned char* desk_meta() const { return desk_.meta->data(); }

  // As its owner reads it: a peer that writes what only the owner may has sent nothing, or something else.
  m2n::Signal signal_at(uint64_t offset) const { return m2n::poll_signal(word(meta() + offset)); }
  m2n::Signal answer_at(uint64_t offset) const { return m2n::load_signal(word(desk_.meta->data() + offset)); }
  m2n::Header answer_header(uint64_t offset) const {
    m2n::Header header;
    std::memcpy(&header, desk_.meta->data() + offset, sizeof header);
    return header;
  }
  void ring(uint64_t offset, m2n::Signal value) { m2n::store_signal(word(meta() + offset), value); }

  // The comm has closed the connection, and said before why: the peer learns of its end.
  bool is_told() const {
    char bytes[1024];
    const bool is_reasoned = recv(connection_, bytes, sizeof bytes, MSG_DONTWAIT) > 0 && bytes[0] == m2n::kDrop;
    return is_reasoned && recv(connection_, bytes, 1, MSG_DONTWAIT) == 0;
  }

  // Ends the connection, with a goodbye or without, and waits until the comm knows.
  void hang_up(m2n::Comm& comm, bool say_goodbye) {
    if (say_goodbye) require(send(connection_, &m2n::kGoodbye, 1, 0) == 1, "send");
    close(connection_);
    connection_ = -1;
    const int64_t deadline_ns = m2n::now_ns() + 4'000'000'000;
    while (info(comm).state == m2n::PeerState::kLive) {
      require(m2n::now_ns() < deadline_ns, "the end of a connection is noticed");
      usleep(10);
    }
  }

 private:
  static m2n::Signal* word(unsigned char* at) { return reinterpret_cast<m2n::Signal*>(at); }
  static const m2n::Signal* word(const unsigned char* at) { return reinterpret_cast<const m2n::Signal*>(at); }

  uint32_t rank_;
  uint32_t idx_ = 0;
  uint32_t joined_ = 0;  // its number among the comm's links
  Desk& desk_;
  int connection_ = -1;
  std::vector<std::shared_ptr<m2n::Mapping>> mappings_;
  std::vector<uint64_t> num_bytes_;               // of the objects
  std::vector<std::vector<unsigned char>> left_;  // rows and meta, as they were when it let go
};

}  // namespace fuzz
