// SPDX-License-Identifier: Apache-2.0
// The wake path: a rank sleeps on its wake word while its peers signal, one of them is lost, or close() is called.
//
// A sleep ends by a wake or a changed word only. The product's sleep also ends after a tenth of a second, which would
// hide a lost wake; here a lost wake is a wait that never ends.
#include M2N_EXPLORER  // explore.h or with_relacy.h

#include "core/peer.h"
#include "one_thread.h"

namespace {

using explorer::check;

constexpr size_t kMaxWriters = 2;
constexpr uint32_t kMessages = 2;

struct Shared {
  m2n::Signal signals[kMaxWriters];
  unsigned char rows[kMaxWriters];
  m2n::WakeWord wake;
  uint32_t state;
  uint32_t is_closed;
} shared;

void wake_rank() { m2n::wake_waiters(&shared.wake, explorer::futex_wake); }

struct Exec : OneThread {
  void wake(m2n::WakeWord* wake) { m2n::wake_waiters(wake, explorer::futex_wake); }
};

// Sleeps until ready(), which leaves nothing behind.
template <class Ready>
void sleep_until(Ready&& ready) {
  explorer::repeat([&] { return m2n::sleep_once(&shared.wake, ready, explorer::futex_wait); });
}

void send(size_t writer, uint32_t seq) {
  Exec exec;
  const auto row = static_cast<unsigned char>(writer * 64 + seq);
  m2n::put(exec, &shared.rows[writer], &row, 1);
  m2n::PeerView peer;
  peer.wake = &shared.wake;
  if (m2n::drain(exec, nullptr)) m2n::signal(exec, peer, &shared.signals[writer], m2n::make_signal(1, seq));
}

void receive(size_t writer, uint32_t seq) {
  sleep_until(
      [&] { return m2n::look_for(&shared.signals[writer], seq - 1, [] { return true; }) == m2n::Look::kArrived; });
  check(explorer::read_byte(&shared.rows[writer]) == writer * 64 + seq, "the row of another message");
}

// One peer signals, one rank sleeps.
void one_writer(size_t thread) { thread == 0 ? receive(0, 1) : send(0, 1); }

// Two peers signal; the rank needs both, one after the other.
void two_writers(size_t thread) {
  if (thread != 0) return send(thread - 1, 1);
  for (size_t writer = 0; writer < kMaxWriters; ++writer) receive(writer, 1);
}

// The peer sends again when the rank has read; it waits awake.
void two_messages(size_t thread) {
  for (uint32_t seq = 1; seq <= kMessages; ++seq) {
    if (thread == 0) {
      receive(0, seq);
      m2n::store_signal(&shared.signals[1], m2n::make_signal(0, seq));
    } else {
      send(0, seq);
      explorer::await([&] { return m2n::signal_seq(m2n::poll_signal(&shared.signals[1])) == seq; });
    }
  }
}

// Two threads of one rank sleep on its word: a verb and wait_peer(), say.
void two_sleepers(size_t thread) { thread < 2 ? receive(0, 1) : send(0, 1); }

void close_rank() {
  m2n::store_seq_cst(&shared.is_closed, 1u);
  wake_rank();
}

// close() while the rank waits for a peer that says nothing, or just signals.
void closed(size_t thread) {
  if (thread == 1) return close_rank();
  sleep_until([] { return m2n::load_seq_cst(&shared.is_closed) != 0; });
}
void closed_or_signalled(size_t thread) {
  if (thread == 1) return close_rank();
  if (thread == 2) return send(0, 1);
  bool has_arrived = false;
  sleep_until([&] {
    has_arrived = m2n::look_for(&shared.signals[0], 0, [] { return true; }) == m2n::Look::kArrived;
    return has_arrived || m2n::load_seq_cst(&shared.is_closed) != 0;
  });
  if (has_arrived) check(explorer::read_byte(&shared.rows[0]) == 1, "the row of another message");
}

// The peer may die at any step; the watcher says so and wakes its own rank.
void mortal_peer(size_t thread) {
  if (thread == 1) {
    send(0, 1);
    explorer::note(0, 1);
    return;
  }
  if (thread == 2) {
    explorer::await_end_of(1);
    m2n::store_seq_cst(&shared.state, 1u);
    wake_rank();
    return;
  }
  m2n::Look found = m2n::Look::kPending;
  sleep_until([&] {
    found = m2n::look_for(&shared.signals[0], 0, [] { return m2n::load_seq_cst(&shared.state) == 0; });
    return found != m2n::Look::kPending;
  });
  if (found == m2n::Look::kArrived) {
    check(explorer::read_byte(&shared.rows[0]) == 1, "the row of another message");
  } else {
    check(found == m2n::Look::kGone && explorer::noted(0) == 0, "a complete message of a dead peer was lost");
  }
}

struct Case {
  const char* name;
  size_t num_threads;
  void (*body)(size_t thread);
};
constexpr Case kCases[] = {
    {"one_writer", 2, one_writer},     {"two_writers", 3, two_writers}, {"two_messages", 2, two_messages},
    {"two_sleepers", 3, two_sleepers}, {"closed", 2, closed},           {"closed_or_signalled", 3, closed_or_signalled},
    {"mortal_peer", 3, mortal_peer},
};

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc == 2 ? argv[1] : "";
  explorer::search.may_die[1] = name == "mortal_peer";
  for (const Case& one : kCases) {
    if (name == one.name) explorer::search.run(one.num_threads, one.body, shared);
  }
  return explorer::search.body == nullptr ? 2 : 0;
}
