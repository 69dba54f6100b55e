// SPDX-License-Identifier: Apache-2.0
// The classic small programs of weak memories: does machine.h allow what C++ allows, and nothing that C++ forbids?
// Usage: orders <program>; prints MISTAKE when the outcome in question can happen.
#include M2N_EXPLORER  // explore.h

#include "core/atomic.h"

namespace {

using explorer::check;

struct Shared {
  uint32_t x, y;
} shared;

constexpr uint8_t kNotes = 4;
// The last thread to end looks at all notes, each below 16.
void when_all_ended(uint8_t num_threads, uint64_t wanted) {
  explorer::note(7, explorer::noted(7) + 1);
  if (explorer::noted(7) != num_threads) return;
  uint64_t seen = 0;
  for (uint8_t i = 0; i < kNotes; ++i) seen = seen * 16 + explorer::noted(i);
  check(seen != wanted, "the outcome in question");
}

// Each thread writes its own word and reads the other's: may both miss?
template <void (*store)(uint32_t*, uint32_t), uint32_t (*load)(const uint32_t*)>
void store_buffering(size_t thread) {
  store(thread == 0 ? &shared.x : &shared.y, 1);
  explorer::note(static_cast<uint8_t>(thread), load(thread == 0 ? &shared.y : &shared.x) + 1);
  when_all_ended(2, 0x1100);
}

// A word is written, then a flag: may the flag be seen and the word not?
template <void (*store)(uint32_t*, uint32_t), uint32_t (*load)(const uint32_t*)>
void message_passing(size_t thread) {
  if (thread == 0) {
    m2n::store_relaxed(&shared.x, 1u);
    store(&shared.y, 1);
  } else {
    explorer::note(0, load(&shared.y));
    explorer::note(1, m2n::load_relaxed(&shared.x));
  }
  when_all_ended(2, 0x1000);
}

// Two writers, two readers: may the readers disagree on which was first?
template <void (*store)(uint32_t*, uint32_t), uint32_t (*load)(const uint32_t*)>
void independent_reads(size_t thread) {
  if (thread < 2) {
    store(thread == 0 ? &shared.x : &shared.y, 1);
  } else {
    const auto first = static_cast<uint8_t>((thread - 2) * 2);
    explorer::note(first, load(thread == 2 ? &shared.x : &shared.y));
    explorer::note(static_cast<uint8_t>(first + 1), load(thread == 2 ? &shared.y : &shared.x));
  }
  when_all_ended(4, 0x1010);
}

// One word, written twice: may it be seen to go back?
void coherence(size_t thread) {
  if (thread == 0) {
    m2n::store_relaxed(&shared.x, 1u);
    m2n::store_relaxed(&shared.x, 2u);
  } else {
    explorer::note(0, m2n::load_relaxed(&shared.x));
    explorer::note(1, m2n::load_relaxed(&shared.x));
  }
  when_all_ended(2, 0x2100);
}

// Two threads add to one word: may both see the same?
void adding(size_t thread) {
  explorer::note(static_cast<uint8_t>(thread), m2n::add_relaxed(&shared.x, 1u) + 1);
  when_all_ended(2, 0x1100);
}

// Two threads write both words in opposite order, then read: may each word keep its first writer's value?
void opposite_writes(size_t thread) {
  uint32_t* first = thread == 0 ? &shared.x : &shared.y;
  uint32_t* second = thread == 0 ? &shared.y : &shared.x;
  m2n::store_release(first, 1u);
  m2n::store_release(second, 2u);
  explorer::barrier(2);
  explorer::note(static_cast<uint8_t>(thread), m2n::load_relaxed(first));
  when_all_ended(2, 0x1100);
}

struct Program {
  const char* name;
  size_t num_threads;
  void (*body)(size_t thread);
};
constexpr auto kStoreRelease = m2n::store_release<uint32_t>;
constexpr auto kStoreSeqCst = m2n::store_seq_cst<uint32_t>;
constexpr auto kStoreRelaxed = m2n::store_relaxed<uint32_t>;
constexpr auto kLoadAcquire = m2n::load_acquire<uint32_t>;
constexpr auto kLoadSeqCst = m2n::load_seq_cst<uint32_t>;
constexpr auto kLoadRelaxed = m2n::load_relaxed<uint32_t>;
constexpr Program kPrograms[] = {
    {"store_buffering_release_acquire", 2, store_buffering<kStoreRelease, kLoadAcquire>},
    {"store_buffering_seq_cst_acquire", 2, store_buffering<kStoreSeqCst, kLoadAcquire>},
    {"store_buffering_release_seq_cst", 2, store_buffering<kStoreRelease, kLoadSeqCst>},
    {"store_buffering_seq_cst", 2, store_buffering<kStoreSeqCst, kLoadSeqCst>},
    {"message_passing_relaxed_acquire", 2, message_passing<kStoreRelaxed, kLoadAcquire>},
    {"message_passing_release_relaxed", 2, message_passing<kStoreRelease, kLoadRelaxed>},
    {"message_passing_release_acquire", 2, message_passing<kStoreRelease, kLoadAcquire>},
    {"independent_reads_release_acquire", 4, independent_reads<kStoreRelease, kLoadAcquire>},
    {"independent_reads_seq_cst", 4, independent_reads<kStoreSeqCst, kLoadSeqCst>},
    {"opposite_writes_release", 2, opposite_writes},
    {"coherence_relaxed", 2, coherence},
    {"adding_relaxed", 2, adding},
};

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc == 2 ? argv[1] : "";
  for (const Program& one : kPrograms) {
    if (name == one.name) explorer::search.run(one.num_threads, one.body, shared);
  }
  return explorer::search.body == nullptr ? 2 : 0;
}
