// SPDX-License-Identifier: Apache-2.0
// The same cases on relacy, a race detector by another hand: a second opinion on the memory of machine.h.
//
// Relacy keeps no states, so all schedules of two slots and two laps do not end (22 million in the first minute of 10
// thousand million); it looks at those with few switches between threads that could go on, and a load returns the
// newest store or the one before. Cases in which a peer dies, and numbers that do not begin at 0, are not for it.
#pragma once

#include <relacy/relacy.hpp>
// Relacy names its own wherever these words stand.
#undef new
#undef delete
#undef malloc
#undef calloc
#undef realloc
#undef free
#undef memory_order_relaxed
#undef memory_order_acquire
#undef memory_order_release
#undef memory_order_acq_rel
#undef memory_order_seq_cst

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace explorer {

using Order = rl::memory_order;
inline constexpr Order memory_order_relaxed = rl::mo_relaxed;
inline constexpr Order memory_order_acquire = rl::mo_acquire;
inline constexpr Order memory_order_release = rl::mo_release;
inline constexpr Order memory_order_acq_rel = rl::mo_acq_rel;
inline constexpr Order memory_order_seq_cst = rl::mo_seq_cst;

inline constexpr size_t kMaxWords = 16;
inline constexpr size_t kMaxBytes = 16;

// What one run uses up.
struct Run {
  rl::atomic<uint64_t> words[kMaxWords];
  rl::var<uint64_t> bytes[kMaxBytes];
  rl::atomic<uint64_t> at_barrier;
  uint64_t notes[8] = {};

  void begin() {
    for (auto& word : words) word.store(0, rl::mo_relaxed, $);
    for (auto& byte : bytes) byte($) = uint64_t{0};
    at_barrier.store(0, rl::mo_relaxed, $);
  }
};
inline Run* now = nullptr;

struct Search {
  bool may_die[8] = {};
  void (*body)(size_t thread) = nullptr;
  const char* shared_begin = nullptr;
  const char* shared_end = nullptr;
  const void* words[kMaxWords] = {};
  const void* bytes[kMaxBytes] = {};

  template <class Shared>
  void run(size_t num_threads, void (*each)(size_t thread), const Shared& shared);
};
inline Search search;

inline size_t index_of(const void** table, size_t size, const void* address) {
  for (size_t i = 0; i < size; ++i) {
    if (table[i] == nullptr) table[i] = address;
    if (table[i] == address) return i;
  }
  std::printf("OUT OF BOUNDS: a case has at most %zu words or bytes\n", size);
  std::exit(2);
}
inline rl::atomic<uint64_t>& word_at(const void* address) {
  return now->words[index_of(search.words, kMaxWords, address)];
}
inline rl::var<uint64_t>& byte_at(const void* address) {
  return now->bytes[index_of(search.bytes, kMaxBytes, address)];
}

template <class T>
class AtomicRef {
 public:
  explicit AtomicRef(T& word) : word_(word_at(&word)) {}
  T load(Order order) const { return static_cast<T>(word_.load(order, $)); }
  void store(T value, Order order) const { word_.store(value, order, $); }
  T fetch_add(T value, Order order) const {
    // A word is 64 bits wide here: a carry out of 32 bits must not be seen, and -1 must take one away.
    const auto wide = static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(value)));
    return static_cast<T>(word_.fetch_add(wide, order, $));
  }
  bool compare_exchange_strong(T& expected, T value, Order order) const {
    uint64_t seen = expected;
    return word_.compare_exchange(rl::bool_t<false>(), seen, uint64_t{value}, order, $);
  }

 private:
  rl::atomic<uint64_t>& word_;
};

inline uint8_t read_byte(const void* address) { return static_cast<uint8_t>(uint64_t{byte_at(address)($)}); }
inline void write_byte(const void* address, uint8_t value) { byte_at(address)($) = uint64_t{value}; }
inline void futex_wait(const uint32_t* word, uint32_t seen) {
  rl::atomic<uint64_t>& sleeps_on = word_at(word);
  if (sleeps_on.debug_value() == seen) sleeps_on.wait(rl::ctx(), false, false, $);
}
inline void futex_wake(const uint32_t* word) { word_at(word).wake(rl::ctx(), 8, $); }
inline uint64_t choose(uint64_t count) { return rl::rand(static_cast<unsigned>(count)); }
inline void note(uint8_t which, uint64_t value) { now->notes[which] = value; }
inline uint64_t noted(uint8_t which) { return now->notes[which]; }
inline void check(bool is_right, const char* text) {
  if (!is_right) rl::ctx().fail_test(text, rl::test_result_user_assert_failed, $);
}
inline void await_end_of(size_t) { check(false, "no case of relacy's"); }

template <class Look>
void await(Look&& look) {
  while (!look()) rl::yield(1, $);
}
template <class Round>
void repeat(Round&& round) {
  while (!round()) rl::yield(1, $);
}
inline void pause_after_load() { rl::yield(1, $); }
inline void barrier(size_t count) {
  const uint64_t round = now->at_barrier.fetch_add(1, rl::mo_acq_rel, $) / count;
  await([&] { return now->at_barrier.load(rl::mo_acquire, $) >= (round + 1) * count; });
}

template <int kThreads>
struct Suite : rl::test_suite<Suite<kThreads>, kThreads> {
  Run run;
  void before() {
    now = &run;
    run.begin();
  }
  void thread(unsigned index) { search.body(index); }
};

template <class Shared>
void Search::run(size_t num_threads, void (*each)(size_t thread), const Shared& shared) {
  body = each;
  shared_begin = reinterpret_cast<const char*>(&shared);
  shared_end = reinterpret_cast<const char*>(&shared + 1);
  rl::test_params params;
  std::ostringstream progress;
  params.progress_stream = &progress;
  params.search_type = rl::sched_bound;
  params.context_bound = static_cast<unsigned>(std::atoi(std::getenv("M2N_EXPLORER_SWITCHES")));
  params.iteration_count = UINT64_MAX;
  const bool is_right = num_threads == 2   ? rl::simulate<Suite<2>>(params)
                        : num_threads == 3 ? rl::simulate<Suite<3>>(params)
                                           : rl::simulate<Suite<4>>(params);
  if (!is_right) std::exit(1);
  std::printf("explored: %llu runs with at most %u switches\n", static_cast<unsigned long long>(params.stop_iteration),
              params.context_bound);
}

}  // namespace explorer

#include "copies.h"
