// SPDX-License-Identifier: Apache-2.0
// Controls for the sanitizer tests: the slot protocol, which must be clean, and mistakes that must be
// reported. Usage: sanitizer_control protocol|race|overrun|overflow
#include <atomic>
#include <climits>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "core/peer.h"
#include "explorer/one_thread.h"

namespace {

constexpr uint32_t kRounds = 2000;
constexpr uint64_t kRowBytes = 512;

struct ThreadExec : OneThread {
  void wake(m2n::WakeWord*) {}
};

struct Area {
  alignas(m2n::kLineBytes) m2n::Signal signal = 0;
  alignas(m2n::kLineBytes) unsigned char rows[kRowBytes] = {};
};

void await(const Area& area, uint32_t seq) {
  while (m2n::signal_seq(m2n::poll_signal(&area.signal)) != seq) std::this_thread::yield();
}

void send(Area& area, uint32_t seq, const unsigned char* rows) {
  ThreadExec exec;
  m2n::put(exec, area.rows, rows, kRowBytes);
  if (m2n::drain(exec, nullptr)) m2n::signal(exec, m2n::PeerView{}, &area.signal, m2n::make_signal(1, seq));
}

// One slot, two threads: a message, and its reply as the credit for the next one.
int protocol() {
  Area dispatch, combine;
  std::thread expert([&] {
    for (uint32_t seq = 1; seq <= kRounds; ++seq) {
      await(dispatch, seq);
      send(combine, seq, dispatch.rows);
    }
  });
  uint32_t wrong = 0;
  unsigned char rows[kRowBytes];
  for (uint32_t seq = 1; seq <= kRounds; ++seq) {
    std::memset(rows, static_cast<int>(seq & 0xFF), sizeof rows);
    send(dispatch, seq, rows);
    await(combine, seq);
    if (std::memcmp(rows, combine.rows, sizeof rows) != 0) ++wrong;
  }
  expert.join();
  return wrong == 0 ? 0 : 1;
}

int race() {
  int shared = 0;
  std::thread other([&] { ++shared; });
  ++shared;
  other.join();
  return shared == 0;
}

int overrun(int one) {
  std::vector<char> bytes(16);
  volatile char* end = bytes.data() + bytes.size() - 1;
  end[one] = 1;
  return 0;
}

int overflow(int one) {
  volatile int largest = INT_MAX;
  volatile int sum = largest + one;
  return sum == 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc == 2 ? argv[1] : "";
  if (what == "protocol") return protocol();
  if (what == "race") return race();
  if (what == "overrun") return overrun(argc - 1);
  if (what == "overflow") return overflow(argc - 1);
  std::fputs("usage: sanitizer_control protocol|race|overrun|overflow\n", stderr);
  return 2;
}
