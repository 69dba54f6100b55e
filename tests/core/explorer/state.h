// SPDX-License-Identifier: Apache-2.0
// Where a run of a case stands, as a value: the memory, what each thread does next, and a key by which equal states are
// known.
#pragma once

#include <cstdio>
#include <cstring>
#include <string>

#include "machine.h"

namespace explorer {

// From kRead on a thread performs them at once: no other thread can tell when.
enum class Do : uint8_t {
  kLoad,
  kStore,
  kAdd,
  kReplace,
  kSleep,
  kWake,
  kChoose,
  kAwaitEnd,
  kBarrier,
  kEnd,
  kRead,
  kWrite,
  kNote,
  kNoted
};

struct Op {
  Do what = Do::kEnd;
  Order order = memory_order_relaxed;
  uint8_t target = 0;  // a word, a byte, a thread, a note
  uint64_t value = 0;
  uint64_t mask = 0;
  uint64_t expected = 0;  // of kReplace
};

struct Thread {
  Op next;
  bool is_dead = false, is_asleep = false;
  std::vector<Seen> pause;  // not empty: looks again when one of these words has a newer message
};

// One step of a path: a thread, and which of the things that its next operation may do; or it dies.
inline constexpr uint8_t kDies = 0xFF;
struct Step {
  size_t thread;
  uint8_t choice;
};

struct State {
  Memory memory;
  std::array<Thread, kMaxThreads> threads;
  std::array<uint64_t, kMaxThreads> notes{};  // what the case itself remembers; the product's code does not see it
};

inline std::string at(size_t thread) { return "thread " + std::to_string(thread) + ": "; }
inline bool has_ended(const Thread& thread) { return thread.is_dead || thread.next.what == Do::kEnd; }

inline std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

// The next operation of a thread, in words.
inline std::string describe(const State& state, size_t index, uint8_t choice) {
  static const char* const names[] = {"load", "store",  "add",          "replace", "sleep",
                                      "wake", "choose", "await end of", "barrier"};
  static const char* const orders[] = {"relaxed", "acquire", "release", "acq_rel", "seq_cst"};
  const Op& op = state.threads[index].next;
  std::string text = std::string(names[static_cast<size_t>(op.what)]) + " " + std::to_string(op.target);
  if (op.what <= Do::kReplace) text += std::string(" ") + orders[op.order];
  if (op.what == Do::kLoad) {
    const auto& list = state.memory.words[op.target];
    text += " sees " + hex(list[choice].value) + (choice + 1u == list.size() ? "" : ", which is not the newest");
  } else if (op.what <= Do::kSleep) {
    text += " " + hex(op.value);
  } else if (op.what == Do::kChoose) {
    text += " takes " + std::to_string(choice);
  }
  return text;
}

// 128 bits of all that the future depends on.
struct Key {
  uint64_t a = 0x9E3779B97F4A7C15ull, b = 0xC2B2AE3D27D4EB4Full;

  void mix(uint64_t value) {
    a = (a ^ value) * 0xFF51AFD7ED558CCDull;
    a ^= a >> 32;
    b = (b + value) * 0xC4CEB9FE1A85EC53ull;
    b ^= b >> 29;
  }
  template <class Bytes>
  void mix_all(const Bytes& bytes) {
    static_assert(sizeof(Bytes) % sizeof(uint64_t) == 0);
    uint64_t parts[sizeof(Bytes) / sizeof(uint64_t)];
    std::memcpy(parts, &bytes, sizeof bytes);
    for (const uint64_t part : parts) mix(part);
  }
  bool operator==(const Key& other) const { return a == other.a && b == other.b; }
};
struct KeyHash {
  size_t operator()(const Key& key) const { return key.a; }
};

inline void mix_seen(Key& key, const std::vector<Seen>& list) {
  key.mix(list.size());
  for (const Seen& seen : list) {
    key.mix(seen.value);
    key.mix(seen.word * 256u + seen.position);
  }
}

inline Key key_of(const State& state, size_t num_threads) {
  Key key;
  const Memory& memory = state.memory;
  for (size_t i = 0; i < num_threads; ++i) {
    const Thread& thread = state.threads[i];
    key.mix((thread.is_dead ? 1u : 0u) + (thread.is_asleep ? 2u : 0u));
    mix_seen(key, memory.logs[i]);
    mix_seen(key, thread.pause);
    key.mix_all(memory.views[i]);
  }
  for (size_t i = 0; i < kMaxWords; ++i) {
    key.mix(memory.words[i].size() * 256u + memory.seq_cst[i]);
    for (const Message& message : memory.words[i]) {
      key.mix(message.value);
      key.mix(message.is_add);
      key.mix_all(message.view);
    }
  }
  key.mix_all(memory.bytes);
  key.mix_all(state.notes);
  return key;
}

}  // namespace explorer
