// SPDX-License-Identifier: Apache-2.0
// Links between ranks: what core/slot.h and core/peer.h promise, in every order of the steps of small cases.
//
// This folder runs the real headers of csrc/core on a model of a memory: core/atomic.h has a back end for it. Two
// explorers share the cases: explore.h looks at everything, with_relacy.h at less, by other means.
//
// Modelled: every interleaving of atomic operations; loads that return any store which coherence and happens-before
// still allow; stores that take effect in another place than at the end; release sequences; one order of all seq_cst
// operations; data races on rows; futexes; the death of a peer at each of its atomic operations.
// Not modelled: load buffering (a load that sees a store which depends on it); the weaker seq_cst of C++20 where it
// meets release and acquire on one word (here the one order agrees with happens-before, as in C++11); a copy that is
// half done when its thread dies, beyond the order of its bytes; time, so also the end of a sleep by its time limit;
// more threads, slots and laps than the cases have. The verbs of csrc/exchange are not run: the cases do what they do,
// in their order.
#include M2N_EXPLORER  // explore.h or with_relacy.h

#include "core/peer.h"
#include "one_thread.h"

namespace {

using explorer::await;
using explorer::check;

constexpr uint32_t kSlots = 2;
constexpr uint32_t kLaps = 2;
constexpr size_t kMaxLinks = 2;

struct Area {
  m2n::Signal signal;
  unsigned char row;
  unsigned char header;
};

struct Shared {
  Area dispatch[kMaxLinks][kSlots];
  Area reply[kMaxLinks][kSlots];
  m2n::PeerEntry peer;
  uint32_t num_peers;
  uint32_t is_passed;
} shared;

uint32_t first_seq = 0;

struct Exec : OneThread {
  void wake(m2n::WakeWord*) {}  // these waits do not sleep; wake.cc has those that do
};

// What a row holds tells where it belongs.
unsigned char row_of(size_t link, uint32_t slot, uint32_t seq, bool is_reply) {
  return static_cast<unsigned char>((is_reply ? 128 : 0) + link * 64 + slot * 32 + (seq - first_seq));
}

void send(Area& area, uint32_t seq, unsigned char row) {
  Exec exec;
  const auto header = static_cast<unsigned char>(row + 1);
  m2n::put(exec, &area.row, &row, 1);
  m2n::put(exec, &area.header, &header, 1);
  if (m2n::drain(exec, nullptr)) m2n::signal(exec, m2n::PeerView{}, &area.signal, m2n::make_signal(1, seq));
}

void check_rows(const Area& area, unsigned char row) {
  check(explorer::read_byte(&area.row) == row, "the row of another message");
  check(explorer::read_byte(&area.header) == static_cast<unsigned char>(row + 1), "the header of another message");
}

m2n::Look look(const Area& area, uint32_t last_seq) {
  return m2n::look_for(&area.signal, last_seq, [] { return true; });
}

void await_message(const Area& area, uint32_t last_seq) {
  await([&] {
    const m2n::Look found = look(area, last_seq);
    check(found != m2n::Look::kViolation, "a violation that nobody committed");
    return found == m2n::Look::kArrived;
  });
}

// An attention rank on some links: each slot again when its reply was consumed.
void attention(size_t begin, size_t end) {
  m2n::SendSeq seqs[kMaxLinks][kSlots];
  const auto consume = [&](size_t link, uint32_t slot) {
    m2n::SendSeq& seq = seqs[link][slot];
    if (!seq.awaits_reply()) return;
    await_message(shared.reply[link][slot], first_seq + seq.consumed);
    check_rows(shared.reply[link][slot], row_of(link, slot, first_seq + seq.sent, true));
    seq.consumed = seq.sent;
  };
  for (uint32_t lap = 0; lap < kLaps; ++lap) {
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
      for (size_t link = begin; link < end; ++link) {
        consume(link, slot);
        const uint32_t seq = first_seq + ++seqs[link][slot].sent;
        send(shared.dispatch[link][slot], seq, row_of(link, slot, seq, false));
      }
    }
  }
  for (uint32_t slot = 0; slot < kSlots; ++slot) {
    for (size_t link = begin; link < end; ++link) consume(link, slot);
  }
}

// An expert rank on some links: answers what comes, in whatever order.
void expert(size_t begin, size_t end) {
  m2n::RecvSeq seqs[kMaxLinks][kSlots];
  for (uint32_t served = 0; served < (end - begin) * kSlots * kLaps; ++served) {
    size_t link = 0;
    uint32_t slot = 0;
    await([&] {
      for (size_t i = 0; i < (end - begin) * kSlots; ++i) {
        link = begin + i / kSlots;
        slot = i % kSlots;
        if (seqs[link][slot].accepted == kLaps) continue;
        const m2n::Look found = look(shared.dispatch[link][slot], first_seq + seqs[link][slot].accepted);
        check(found != m2n::Look::kViolation, "a violation that nobody committed");
        if (found == m2n::Look::kArrived) return true;
      }
      return false;
    });
    const uint32_t seq = first_seq + ++seqs[link][slot].accepted;
    check_rows(shared.dispatch[link][slot], row_of(link, slot, seq, false));
    send(shared.reply[link][slot], seq, row_of(link, slot, seq, true));
    seqs[link][slot].replied = seqs[link][slot].accepted;
  }
}

// One link; numbers start at 0, or so that they wrap.
void one_link(size_t thread) { thread == 0 ? attention(0, 1) : expert(0, 1); }

// Two attention ranks and one expert rank.
void two_senders(size_t thread) { thread < 2 ? attention(thread, thread + 1) : expert(0, 2); }

// One attention rank and two expert ranks.
void two_receivers(size_t thread) { thread == 2 ? attention(0, 2) : expert(thread, thread + 1); }

// A peer that leaves out a number. Rows are not its fault: it waits for the reply as it should.
void skipped_number(size_t thread) {
  Area& to = shared.dispatch[0][0];
  Area& back = shared.reply[0][0];
  if (thread == 0) {
    send(to, first_seq + 1, row_of(0, 0, first_seq + 1, false));
    await_message(back, first_seq);
    send(to, first_seq + 3, row_of(0, 0, first_seq + 3, false));
    return;
  }
  await_message(to, first_seq);
  check_rows(to, row_of(0, 0, first_seq + 1, false));
  send(back, first_seq + 1, row_of(0, 0, first_seq + 1, true));
  await([&] {
    const m2n::Look found = look(to, first_seq + 1);
    check(found != m2n::Look::kArrived, "a message was accepted that leaves out a number");
    return found == m2n::Look::kViolation;
  });
}

// A stream waits for more than the peer ever sends, and its host lets it go on, while what the peer does send comes:
// the verb behind the stream's wait finds it.
void ended_wait(size_t thread) {
  Area& area = shared.reply[0][0];
  const uint32_t seq = first_seq + 1;
  if (thread == 0) return send(area, seq, row_of(0, 0, seq, true));
  if (thread == 1) {
    await([&] {
      m2n::run_ahead(&area.signal, seq + 1);
      return m2n::load_acquire(&shared.is_passed) != 0;
    });
    return;
  }
  await([&] { return static_cast<int32_t>(m2n::signal_seq(m2n::load_signal(&area.signal)) - (seq + 1)) >= 0; });
  m2n::store_release(&shared.is_passed, 1u);
  await_message(area, first_seq);
  check_rows(area, row_of(0, 0, seq, true));
}

// Thread 1 may die at any step; thread 2 watches it, as the owner's watcher does; thread 0 waits for it.
void watch() {
  explorer::await_end_of(1);
  m2n::store_seq_cst(&shared.peer.state, static_cast<uint32_t>(m2n::PeerState::kLost));
}

// Waits for a message of the mortal peer, number `count` of this slot. False: it is gone.
bool await_mortal(const Area& area, uint32_t last_seq, uint8_t slot, uint32_t count) {
  m2n::Look found = m2n::Look::kPending;
  await([&] {
    const m2n::PeerTable peers{&shared.peer, &shared.num_peers};
    found = m2n::look_for(&area.signal, last_seq, [&] { return peers.is_live(0); });
    check(found != m2n::Look::kViolation, "a violation that nobody committed");
    return found != m2n::Look::kPending;
  });
  if (found == m2n::Look::kArrived) return true;
  check(explorer::noted(slot) < count, "a complete message of a dead peer was lost");
  return false;
}

void send_and_note(Area& area, uint32_t seq, unsigned char row, uint8_t slot) {
  send(area, seq, row);
  explorer::note(slot, seq - first_seq);
}

void mortal_expert(size_t thread) {
  if (thread == 2) return watch();
  for (uint32_t seq = first_seq + 1; seq <= first_seq + kLaps; ++seq) {
    for (uint8_t slot = 0; slot < kSlots; ++slot) {
      if (thread == 1) {
        await_message(shared.dispatch[0][slot], seq - 1);
        check_rows(shared.dispatch[0][slot], row_of(0, slot, seq, false));
        send_and_note(shared.reply[0][slot], seq, row_of(0, slot, seq, true), slot);
        continue;
      }
      if (seq > first_seq + 1) {
        if (!await_mortal(shared.reply[0][slot], seq - 2, slot, seq - 1 - first_seq)) return;
        check_rows(shared.reply[0][slot], row_of(0, slot, seq - 1, true));
      }
      send(shared.dispatch[0][slot], seq, row_of(0, slot, seq, false));
    }
  }
  for (uint8_t slot = 0; thread == 0 && slot < kSlots; ++slot) {
    if (!await_mortal(shared.reply[0][slot], first_seq + kLaps - 1, slot, kLaps)) return;
    check_rows(shared.reply[0][slot], row_of(0, slot, first_seq + kLaps, true));
  }
}

void mortal_attention(size_t thread) {
  if (thread == 2) return watch();
  if (thread == 1) {
    for (uint32_t seq = first_seq + 1; seq <= first_seq + kLaps; ++seq) {
      for (uint8_t slot = 0; slot < kSlots; ++slot) {
        if (seq > first_seq + 1) await_message(shared.reply[0][slot], seq - 2);
        send_and_note(shared.dispatch[0][slot], seq, row_of(0, slot, seq, false), slot);
      }
    }
    return;
  }
  for (uint32_t seq = first_seq + 1; seq <= first_seq + kLaps; ++seq) {
    for (uint8_t slot = 0; slot < kSlots; ++slot) {
      if (!await_mortal(shared.dispatch[0][slot], seq - 1, slot, seq - first_seq)) return;
      check_rows(shared.dispatch[0][slot], row_of(0, slot, seq, false));
      send(shared.reply[0][slot], seq, row_of(0, slot, seq, true));
    }
  }
}

struct Case {
  const char* name;
  size_t num_threads;
  void (*body)(size_t thread);
};
constexpr Case kCases[] = {
    {"one_link", 2, one_link},
    {"wrap", 2, one_link},
    {"two_senders", 3, two_senders},
    {"two_receivers", 3, two_receivers},
    {"skipped_number", 2, skipped_number},
    {"ended_wait", 3, ended_wait},
    {"mortal_expert", 3, mortal_expert},
    {"mortal_attention", 3, mortal_attention},
};

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc == 2 ? argv[1] : "";
  if (name == "wrap") {
    first_seq = 0xFFFFFFFEu;
    for (size_t slot = 0; slot < kSlots; ++slot) {
      shared.dispatch[0][slot].signal = shared.reply[0][slot].signal = m2n::make_signal(0, first_seq);
    }
  }
  shared.peer.state = static_cast<uint32_t>(m2n::PeerState::kLive);
  shared.num_peers = 1;
  explorer::search.may_die[1] = name.rfind("mortal", 0) == 0;
  for (const Case& one : kCases) {
    if (name == one.name) explorer::search.run(one.num_threads, one.body, shared);
  }
  return explorer::search.body == nullptr ? 2 : 0;
}
