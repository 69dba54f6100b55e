// SPDX-License-Identifier: Apache-2.0
// The entry of a peer has a user and is given back, to be the entry of a peer's next life or of another peer: what
// core/hold.h promises.
//
// What an entry has (a view, seqs, the inbox) is two bytes here; both tell the life that they belong to. The returner
// leaves an entry that is held for later, and gives it back in the end: it waits where the product comes again.
#include M2N_EXPLORER  // explore.h or with_relacy.h

#include "core/hold.h"

namespace {

using explorer::await;
using explorer::check;

constexpr uint32_t kMaxSlots = 2;
constexpr unsigned char kOld = 0;  // the life with which a case begins, and its rank
constexpr unsigned char kNew = 1;

struct Shared {
  uint32_t state;
  uint32_t holds[kMaxSlots];
  unsigned char view;
  unsigned char seq;
  unsigned char rank;
  unsigned char is_taken;  // the message that waits from the old life; guarded by the lock
  uint32_t tickets;        // the lock of the inboxes
  uint32_t serving;
} shared;

uint32_t num_slots = 1;
bool is_for_another = false;  // the next life is another rank's

void set_state(m2n::PeerState state) { m2n::store_seq_cst(&shared.state, static_cast<uint32_t>(state)); }
bool is_lost() { return m2n::load_seq_cst(&shared.state) == static_cast<uint32_t>(m2n::PeerState::kLost); }

// The old life's link.
void join_and_lose() {
  set_state(m2n::PeerState::kLive);
  set_state(m2n::PeerState::kLost);
}

bool is_any_held() {
  for (uint32_t slot = 0; slot < num_slots; ++slot) {
    if (m2n::is_held(&shared.holds[slot])) return true;
  }
  return false;
}

// Gives the entry back, and makes it that of the next life. The holds are the users': it may be taken at any time by
// one that has found the entry earlier.
void replace(unsigned char life = kNew) {
  check(explorer::noted(0) == 0, "given back while a verb uses it");
  set_state(m2n::PeerState::kUnused);
  explorer::write_byte(&shared.view, life);
  explorer::write_byte(&shared.seq, life);
  if (is_for_another) explorer::write_byte(&shared.rank, life);
  set_state(m2n::PeerState::kLive);
}

void lose_and_replace() {
  join_and_lose();
  await([] { return !is_any_held(); });
  replace();
}

// Of three lives.
void lose_and_replace_twice() {
  lose_and_replace();
  set_state(m2n::PeerState::kLost);
  await([] { return !is_any_held(); });
  replace(kOld);
}

// Both bytes of one life; the seq is advanced, as verbs do.
void use(uint32_t slot) {
  explorer::note(0, explorer::noted(0) + 1);
  const unsigned char life = explorer::read_byte(&shared.view);
  if (slot == 0) {
    const unsigned char seq = explorer::read_byte(&shared.seq);
    check((seq & 1) == life, "the seqs of another life");
    explorer::write_byte(&shared.seq, static_cast<unsigned char>(seq + 2));
  }
}
void end_use(uint32_t slot) {
  explorer::note(0, explorer::noted(0) - 1);
  m2n::drop_hold(&shared.holds[slot]);
}

// A verb that found the entry for the old life's rank, as dispatch_send and combine_recv do; then once more.
void verb(uint32_t slot) {
  for (int round = 0; round < 2; ++round) {
    if (m2n::take_hold(&shared.holds[slot], &shared.state) && explorer::read_byte(&shared.rank) == kOld) {
      check(!is_for_another || explorer::read_byte(&shared.view) == kOld, "a message for another rank");
      use(slot);
      m2n::load_acquire(&shared.tickets);  // others may run here, as while a reply is awaited
      end_use(slot);
    } else {
      m2n::drop_hold(&shared.holds[slot]);
    }
  }
}

// One slot: a verb, and the thread that loses the peer and gives its entry back.
void one_user(size_t thread) { thread == 0 ? verb(0) : lose_and_replace_twice(); }

// Two slots, each with a thread of its own.
void two_users(size_t thread) { thread < 2 ? verb(static_cast<uint32_t>(thread)) : lose_and_replace(); }

// The watcher loses the peer, another thread sees it and gives the entry back.
void seen_lost(size_t thread) {
  if (thread == 0) return verb(0);
  if (thread == 1) return join_and_lose();
  await(is_lost);
  await([] { return !is_any_held(); });
  replace();
}

// A lock of acquires and releases, which is what a mutex promises.
template <class Body>
void locked(Body&& body) {
  const uint32_t ticket = m2n::add_acq_rel(&shared.tickets, 1u);
  await([&] { return m2n::load_acquire(&shared.serving) == ticket; });
  body();
  m2n::store_release(&shared.serving, ticket + 1);
}

// An expert rank takes a message into a batch under the lock of the inboxes, in which the returner looks at the holds,
// and answers it without.
void batch(size_t thread) {
  if (thread == 2) return join_and_lose();
  if (thread == 0) {
    bool has_batch = false;
    locked([&] {
      if (explorer::read_byte(&shared.is_taken) != 0) return;
      explorer::write_byte(&shared.is_taken, 1);
      m2n::add_hold(&shared.holds[0]);  // a message that came whole counts, live or not
      has_batch = true;
    });
    if (!has_batch) return;
    use(0);
    check(explorer::read_byte(&shared.view) == kOld, "a reply to another life");
    explorer::note(0, explorer::noted(0) - 1);
    return m2n::end_hold(&shared.holds[0]);
  }
  await(is_lost);
  bool is_held = false;
  locked([&] {
    is_held = is_any_held();
    if (is_held) return;
    explorer::write_byte(&shared.is_taken, 1);  // the new life's inbox is empty
    replace();
  });
  if (!is_held) return;
  await([] { return !is_any_held(); });  // comes again: nothing is pending that could be taken by now
  locked([] { replace(); });
}

struct Case {
  const char* name;
  size_t num_threads;
  void (*body)(size_t thread);
};
constexpr Case kCases[] = {
    {"one_user", 2, one_user},   {"another_rank", 2, one_user}, {"two_users", 3, two_users},
    {"seen_lost", 3, seen_lost}, {"batch", 3, batch},
};

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc == 2 ? argv[1] : "";
  is_for_another = name == "another_rank";
  if (name == "two_users") num_slots = 2;
  for (const Case& one : kCases) {
    if (name == one.name) explorer::search.run(one.num_threads, one.body, shared);
  }
  return explorer::search.body == nullptr ? 2 : 0;
}
