// SPDX-License-Identifier: Apache-2.0
// Verbs ring for messages in a send area, and one thread takes them: core/doorbell.h, through core/peer.h.
//
// Each sender has a slot of its own, and sends again when its reply was seen. The ring is as small as it may be: one
// entry for each slot.
#include M2N_EXPLORER  // explore.h or with_relacy.h

#include "core/peer.h"
#include "one_thread.h"

namespace {

using explorer::await;
using explorer::check;

constexpr size_t kSenders = 2;
constexpr size_t kNumRings = 2;
constexpr uint32_t kLaps = 2;

struct Shared {
  m2n::Signal words[kSenders];  // of the send area: never stored, they only name a message
  m2n::Signal replies[kSenders];
  unsigned char rows[kSenders];
  m2n::Ring rings[kNumRings];
  uint64_t next_ticket;
} shared;

const m2n::Doorbell bell{shared.rings, &shared.next_ticket, kNumRings};

struct Exec : OneThread {
  void wake(m2n::WakeWord*) {}
};

unsigned char row_of(size_t sender, uint32_t seq) { return static_cast<unsigned char>(16 * sender + seq); }

void send(size_t sender) {
  Exec exec;
  const m2n::PeerView peer{nullptr, nullptr, nullptr, &bell};
  for (uint32_t seq = 1; seq <= kLaps; ++seq) {
    const unsigned char row = row_of(sender, seq);
    m2n::put(exec, &shared.rows[sender], &row, 1);
    if (m2n::drain(exec, nullptr)) m2n::signal(exec, peer, &shared.words[sender], m2n::make_signal(1, seq));
    await([&] { return m2n::look_for(&shared.replies[sender], seq - 1, [] { return true; }) == m2n::Look::kArrived; });
  }
}

void take() {
  m2n::DoorbellReader reader(bell);
  uint32_t last[kSenders] = {};
  for (uint32_t i = 0; i < kSenders * kLaps; ++i) {
    await([&] { return reader.is_rung(); });
    const m2n::Signal* word = nullptr;
    const m2n::Signal value = reader.take(&word);
    const auto sender = static_cast<size_t>(word - shared.words);
    check(sender < kSenders && value == m2n::make_signal(1, last[sender] + 1), "a message that nobody rang for");
    const uint32_t seq = ++last[sender];
    check(explorer::read_byte(&shared.rows[sender]) == row_of(sender, seq), "the row of another message");
    m2n::store_signal(&shared.replies[sender], m2n::make_signal(0, seq));
  }
  check(!reader.is_rung(), "a message that nobody rang for");
}

void body(size_t thread) { thread < kSenders ? send(thread) : take(); }

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || std::string(argv[1]) != "two_ringers") return 2;
  explorer::search.run(kSenders + 1, body, shared);
  return 0;
}
