// SPDX-License-Identifier: Apache-2.0
// What a peer may say over a control connection, and a listener that fails. watcher_words SEED ROUNDS
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <new>
#include <random>
#include <string>

#include "transport/control.h"
#include "transport/host_exec.h"
#include "transport/own_thread.h"
#include "transport/process.h"

namespace m2n {
uint32_t fork_count() { return 0; }
}  // namespace m2n

namespace {

using namespace m2n;

void require(bool is_so, const char* what) {
  if (is_so) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::exit(1);
}

bool is_printable(const std::string& text) {
  for (unsigned char byte : text) {
    if (byte < 0x20 || byte == 0x7F) return false;
  }
  return printable(text.data(), text.size()) == text;
}

// What is said does not depend on the pieces that it comes in.
void say_in_pieces(std::mt19937& random, const std::string& bytes) {
  Control whole, pieces;
  const Control::Said said = whole.take(bytes.data(), bytes.size(), 1);
  Control::Said last = Control::Said::kNothingMore;
  for (size_t at = 0; at < bytes.size() && last == Control::Said::kNothingMore;) {
    const size_t length = std::min<size_t>(1 + random() % 40, bytes.size() - at);
    const std::string piece = bytes.substr(at, length);  // memory of its own: a read behind it is found
    last = pieces.take(piece.data(), piece.size(), 1);
    at += length;
  }
  require(said == last && whole.reason() == pieces.reason(), "the same in pieces");
  require(is_printable(whole.reason()), "a reason can be printed");
  require((said == Control::Said::kDropped) || whole.reason().empty(), "only who drops has a reason");
}

void talk(std::mt19937& random) {
  std::string bytes;
  const auto any = [&] { return static_cast<char>(random() % 4 != 0 ? 0x20 + random() % 0x5F : random()); };
  for (uint32_t i = random() % 4; i > 0; --i) {
    const auto beat = pack(Heartbeat{static_cast<int64_t>(random()), static_cast<int64_t>(random()), 0});
    bytes.append(beat.data(), beat.size());
  }
  std::string reason(random() % 700, ' ');
  for (char& byte : reason) byte = any();
  if (random() % 2 == 0) {
    const std::string message = pack_drop(reason);
    require(message.size() <= kDropHeadBytes + kMostReasonBytes, "a message has its most");
    bytes += message;
  } else {
    bytes += random() % 2 == 0 ? "D" : "";
    bytes += reason;
  }
  if (random() % 3 == 0) bytes.resize(random() % (bytes.size() + 1));
  say_in_pieces(random, bytes);
}

void drop_in_words() {
  const std::string words = "f\xC3\xBCr \xE2\x82\xAC \xF0\x9F\x98\x80";
  require(printable(words.data(), words.size()) == words, "characters stay");
  for (const std::string bad : {"\xC0\xAF", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\x9B", "\xC2\x9B", "\xE2\x80\xAE"}) {
    require(printable(bad.data(), bad.size()) == std::string(bad.size(), '?'), "what is none becomes '?'");
  }
  const std::string message = pack_drop(std::string(kMostReasonBytes - 1, 'a') + "\xC3\xBC");
  require(message.size() == kDropHeadBytes + kMostReasonBytes - 1, "not cut within a character");
  Control control;
  require(control.take(message.data(), message.size(), 1) == Control::Said::kDropped, "it is understood");
}

// No memory, twice; then it can take the news.
struct Failing : PeerListener {
  uint32_t num_calls = 0, is_told = 0;
  std::string heard;
  void peer_gone(uint32_t, PeerState state, LossCause cause, const std::string& reason) override {
    if (add_relaxed(&num_calls, 1u) < 2) throw std::bad_alloc();
    require(state == PeerState::kLost && cause == LossCause::kDropped, "why it is gone");
    heard = reason;
    store_release(&is_told, 1u);
  }
};

void survive_a_listener_that_throws() {
  const auto listener = std::make_shared<Failing>();
  int ends[2];
  require(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0, "socketpair");
  watch_peer(listener, 0, ends[1], -1, {});
  const std::string message = pack_drop("enough");
  require(send(ends[0], message.data(), message.size(), 0) == static_cast<ssize_t>(message.size()), "send");
  const int64_t deadline_ns = now_ns() + 10'000'000'000;
  while (load_acquire(&listener->is_told) == 0) {
    require(now_ns() < deadline_ns, "it is told again");
    usleep(100);
  }
  require(listener->heard == "enough" && load_relaxed(&listener->num_calls) == 3, "until it can take it");
  close(ends[0]);
}

// A thread of the library's own goes on, whatever its work throws.
void survive_work_that_throws() {
  uint32_t num_calls = 0;
  start_own_thread("m2n-test", [&num_calls] {
    if (++num_calls == 1) throw std::bad_alloc();
    if (num_calls == 2) throw Error(Failure::kSetup, "a listener failed");
  }).join();
  require(num_calls == 3, "until it returns");
}

}  // namespace

int main(int, char** arguments) {
  std::mt19937 random(static_cast<uint32_t>(std::atoi(arguments[1])));
  drop_in_words();
  for (int i = std::atoi(arguments[2]); i > 0; --i) talk(random);
  survive_a_listener_that_throws();
  survive_work_that_throws();
}
