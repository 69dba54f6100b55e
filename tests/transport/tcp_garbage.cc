// SPDX-License-Identifier: Apache-2.0
// What a peer may send over its socket, which is anything: messages that are right arrive whatever pieces they come in,
// what is wrong breaks its link in words, and neither touches a byte outside the link's objects or holds up another
// link. Usage: tcp_garbage SEED ROUNDS. Under AddressSanitizer and UndefinedBehaviorSanitizer.
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "core/error.h"
#include "transport/host_exec.h"
#include "transport/tcp/links.h"

namespace {

using namespace m2n;

constexpr uint64_t kRowsBytes = 256 << 10, kMetaBytes = 4096, kGuardBytes = 4096;
constexpr unsigned char kGuard = 0xA5;
std::mt19937_64 g_random;

void require(bool is_so, const std::string& what) {
  if (is_so) return;
  std::printf("failed: %s\n", what.c_str());
  std::exit(1);
}

uint64_t pick(std::initializer_list<uint64_t> values) { return values.begin()[g_random() % values.size()]; }

// A rank with two links; at the other ends of their sockets is this program.
struct Rank : LinkListener {
  struct Peer {
    std::vector<unsigned char> memory = std::vector<unsigned char>(kRowsBytes + kMetaBytes + 3 * kGuardBytes, kGuard);
    std::vector<unsigned char> expected;
    uint64_t key = 0;
    int socket = -1;
    std::string violation;
    bool is_broken = false;
    uint32_t num_refusals = 1;  // how many times there is no memory to take the news with
    unsigned char* rows() { return memory.data() + kGuardBytes; }
    unsigned char* meta() { return rows() + kRowsBytes + kGuardBytes; }
    uint64_t word() { return load_signal(reinterpret_cast<const Signal*>(meta())); }
  };
  Rank() {
    links.open({2, kRowsBytes, kMetaBytes}, nullptr, [] {}, [] {});
    for (uint32_t i = 0; i < 2; ++i) {
      Peer& peer = peers[i];
      std::memset(peer.rows(), 0, kRowsBytes);
      std::memset(peer.meta(), 0, kMetaBytes);
      const std::string address = links.make_address(i, {peer.rows(), kRowsBytes, peer.meta(), kMetaBytes});
      std::memcpy(&peer.key, address.data() + sizeof(uint64_t), sizeof peer.key);
      int ends[2];
      require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0, "socketpair");
      bool wakes = false;
      links.connect(i, address, Fd(ends[0]), &wakes);
      peer.socket = ends[1];
      peer.expected = peer.memory;
    }
  }
  ~Rank() override {
    for (Peer& peer : peers) close(peer.socket);
  }
  void link_broke(uint32_t peer_idx, const std::string& violation) override {
    if (peers[peer_idx].num_refusals-- != 0) throw std::bad_alloc();
    peers[peer_idx].is_broken = true;
    peers[peer_idx].violation = violation;
  }
  void link_ended(uint32_t) override {}
  void progress() {
    for (int i = 0; i < 4; ++i) links.look();
    try {
      links.report(*this);
    } catch (const std::bad_alloc&) {  // as the network's thread: it comes again
      links.report(*this);
    }
  }
  // In pieces of any size, or what of it fits.
  void send(uint32_t peer_idx, const std::vector<unsigned char>& bytes) {
    for (size_t sent = 0; sent < bytes.size();) {
      const size_t most = pick({1, 7, 40, 300, 5000, 100'000, 1'000'000});
      const ssize_t count = ::send(peers[peer_idx].socket, bytes.data() + sent, std::min(most, bytes.size() - sent),
                                   MSG_NOSIGNAL | MSG_DONTWAIT);
      if (count > 0) sent += static_cast<size_t>(count);
      progress();
      if (peers[peer_idx].is_broken) return;
    }
  }

  tcp::Links links;
  Peer peers[2];
};

struct Sent {
  MessageHead head{};
  std::vector<MessagePart> parts;
  std::vector<unsigned char> data;
  std::vector<unsigned char> bytes() const {
    std::vector<unsigned char> all(sizeof head + parts.size() * sizeof(MessagePart));
    std::memcpy(all.data(), &head, sizeof head);
    if (!parts.empty()) std::memcpy(all.data() + sizeof head, parts.data(), parts.size() * sizeof(MessagePart));
    all.insert(all.end(), data.begin(), data.end());
    return all;
  }
};

Sent good_message(Rank::Peer& peer, uint64_t value) {
  Sent sent;
  sent.head = {peer.key, 0, static_cast<uint16_t>(g_random() % (kMaxParts + 1)), 0, 0, value};
  for (uint32_t i = 0; i < sent.head.num_parts; ++i) {
    const uint64_t area_bytes = i % 2 == 0 ? kRowsBytes : kMetaBytes - 64;
    const uint64_t num_bytes = g_random() % (pick({1, 100, 5000, area_bytes}) % area_bytes + 1);
    const uint64_t offset = g_random() % (area_bytes - num_bytes + 1);
    sent.parts.push_back({i % 2, 0, offset + (i % 2) * 64, num_bytes});  // not over the signal
    unsigned char* to = peer.expected.data() + ((i % 2 == 0 ? peer.rows() : peer.meta()) - peer.memory.data());
    for (uint64_t j = 0; j < num_bytes; ++j) {
      sent.data.push_back(static_cast<unsigned char>(g_random()));
      to[sent.parts.back().offset + j] = sent.data.back();
    }
  }
  std::memcpy(peer.expected.data() + (peer.meta() - peer.memory.data()), &value, sizeof value);
  return sent;
}

// One after another, several on their way at once.
void check_good() {
  Rank rank;
  std::vector<unsigned char> bytes;
  const uint64_t count = 1 + g_random() % 6;
  for (uint64_t value = 1; value <= count; ++value) {
    const std::vector<unsigned char> one = good_message(rank.peers[0], value).bytes();
    bytes.insert(bytes.end(), one.begin(), one.end());
  }
  rank.send(0, bytes);
  for (int i = 0; i < 1000 && rank.peers[0].word() != count; ++i) rank.progress();
  require(rank.peers[0].word() == count && !rank.peers[0].is_broken, "good messages arrive");
  require(rank.peers[0].memory == rank.peers[0].expected, "where they belong, and nowhere else");
  require(rank.peers[1].memory == rank.peers[1].expected, "in this link alone");
}

Sent bad_message(Rank::Peer& peer) {
  Sent sent = good_message(peer, 7);
  peer.expected = peer.memory;  // nothing of it may arrive
  MessageHead& head = sent.head;
  if (sent.parts.empty()) {
    sent.parts.push_back({0, 0, 0, 8});
    sent.data.resize(8);
    head.num_parts = 1;
  }
  MessagePart& part = sent.parts[g_random() % sent.parts.size()];
  switch (g_random() % 7) {
    case 0:
      head.key ^= uint64_t{1} << (g_random() % 64);
      break;
    case 1:
      head.num_parts = static_cast<uint16_t>(kMaxParts + 1 + g_random() % 60000);
      break;
    case 2:
      head.word_offset = pick({kMetaBytes, kMetaBytes - 7, 4, ~uint64_t{7}, ~uint64_t{0}, uint64_t{1} << 63});
      break;
    case 3:
      part.area = static_cast<uint32_t>(pick({2, 3, 0x80000000u, 0xFFFFFFFFu}));
      break;
    case 4:
      part.num_bytes = std::max<uint64_t>(part.num_bytes, 1);
      part.offset = pick({kRowsBytes, ~uint64_t{0}, ~uint64_t{0} - part.num_bytes + 1, uint64_t{1} << 63});
      part.num_bytes += 1;
      break;
    case 5:
      part.num_bytes = pick({kRowsBytes + 1, ~uint64_t{0}, uint64_t{1} << 63, uint64_t{1} << 32});
      break;
    default:
      head.num_inline = 1;
  }
  return sent;
}

void check_bad() {
  Rank rank;
  Rank::Peer &bad = rank.peers[0], &good = rank.peers[1];
  std::vector<unsigned char> bytes = bad_message(bad).bytes();
  if (g_random() % 4 == 0) {
    for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(g_random());
  }
  rank.send(0, bytes);
  for (int i = 0; i < 1000 && !bad.is_broken; ++i) rank.progress();
  require(bad.is_broken && bad.violation.find("it sent ") == 0,
          "a bad message breaks its link in words, not: " + bad.violation);
  require(bad.memory == bad.expected, "a bad message changes nothing");
  rank.send(1, good_message(good, 1).bytes());
  for (int i = 0; i < 1000 && good.word() != 1; ++i) rank.progress();
  require(good.word() == 1 && good.memory == good.expected, "the other link goes on");
}

// A peer that stops in the middle, for ever or by closing: its signal never comes, the others' do.
void check_stop() {
  Rank rank;
  Rank::Peer &stops = rank.peers[0], &good = rank.peers[1];
  std::vector<unsigned char> bytes = good_message(stops, 1).bytes();
  bytes.resize(g_random() % bytes.size());
  rank.send(0, bytes);
  if (g_random() % 2 == 0) shutdown(stops.socket, SHUT_RDWR);
  rank.send(1, good_message(good, 1).bytes());
  for (int i = 0; i < 1000 && good.word() != 1; ++i) rank.progress();
  require(good.word() == 1 && good.memory == good.expected, "the other link goes on beside one that stopped");
  require(stops.word() == 0, "half a message is none");
  rank.links.end_now(0);
}

}  // namespace

int main(int, char** arguments) {
  g_random.seed(std::strtoull(arguments[1], nullptr, 10));
  const long rounds = std::atol(arguments[2]);
  for (long i = 0; i < rounds; ++i) {
    check_good();
    check_bad();
    check_stop();
  }
  std::printf("%ld rounds\n", rounds);
}
