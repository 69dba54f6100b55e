// SPDX-License-Identifier: Apache-2.0
// The headers alone: two ranks, a thread each, that put rows into each other's memory, signal, and wait. The same lines
// work between processes that map each other's memory, and in kernels.
#include <m2n/core/peer.h>
#include <m2n/core/wait.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>

namespace {

using namespace m2n;

constexpr uint32_t kNumMessages = 10'000, kNumRows = 4, kRowBytes = 256;
constexpr int64_t kTimeoutNs = 10'000'000'000;

// What put, drain, signal and wait ask of whoever runs them: here one thread, that is one block of one thread. Nobody
// sleeps, so nobody is woken.
struct Exec {
  uint32_t thread() const { return 0; }
  uint32_t num_blocks() const { return 1; }
  void sync() {}
  void pause() { std::this_thread::yield(); }
  int64_t now_ns() const {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
  void wake(WakeWord*) {}
};

// What a rank lets its peer write. The signal lies alone on its line.
struct Window {
  alignas(kLineBytes) Signal signal = make_signal(0, 0);
  WakeWord wake{};
  alignas(kLineBytes) unsigned char rows[kNumRows * kRowBytes] = {};
};

PeerView view_of(Window& window) {
  return {window.rows, reinterpret_cast<unsigned char*>(&window.signal), &window.wake};
}

void send(const PeerView& peer, const unsigned char* rows, uint32_t seq) {
  Exec exec;
  put(exec, peer.rows, rows, kNumRows * kRowBytes);
  if (!drain(exec, nullptr)) return;  // with several blocks, all but the last to get here
  signal(exec, peer, reinterpret_cast<Signal*>(peer.meta), make_signal(kNumRows, seq));
}

uint32_t abort_word = 0;  // not 0: all waits end

// Returns when message `seq` has arrived whole.
void wait_for_message(const Window& own, uint32_t seq) {
  Exec exec;
  const Look look = wait(exec, &own.signal, seq - 1, &abort_word, kTimeoutNs);
  if (look == Look::kPending) throw std::runtime_error("no message has come in time");
  const bool is_whole = signal_rows(poll_signal(&own.signal)) == kNumRows;
  if (look != Look::kArrived || !is_whole) throw std::runtime_error("a signal that the peer must not send");
}

// Sends back what arrives, each byte plus one. The answer also says: your next message may overwrite this one.
void answer(const Window& own, const PeerView& peer) {
  unsigned char rows[sizeof own.rows];
  for (uint32_t seq = 1; seq <= kNumMessages; ++seq) {
    wait_for_message(own, seq);
    for (size_t i = 0; i < sizeof rows; ++i) rows[i] = static_cast<unsigned char>(own.rows[i] + 1);
    send(peer, rows, seq);
  }
}

void ask(const Window& own, const PeerView& peer) {
  unsigned char rows[sizeof own.rows];
  for (uint32_t seq = 1; seq <= kNumMessages; ++seq) {
    std::memset(rows, static_cast<int>(seq % 256), sizeof rows);
    send(peer, rows, seq);
    wait_for_message(own, seq);
    for (const unsigned char byte : own.rows) {
      if (byte != (seq + 1) % 256) throw std::runtime_error("a wrong byte arrived");
    }
  }
}

int guarded(const char* name, void (*body)(const Window&, const PeerView&), const Window& own, const PeerView& peer) {
  try {
    body(own, peer);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", name, error.what());
    store_release(&abort_word, 1u);  // SYNC: verb-abort
    return 1;
  }
}

}  // namespace

int main() {
  static Window asking, answering;
  int status = 0;
  std::thread other([&] { status = guarded("answer", answer, answering, view_of(asking)); });
  const int own_status = guarded("ask", ask, asking, view_of(answering));
  other.join();
  if (own_status != 0 || status != 0) return 1;
  std::printf("%u messages of %u rows, and their answers: as expected\n", kNumMessages, kNumRows);
  return 0;
}
