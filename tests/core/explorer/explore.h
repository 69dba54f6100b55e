// SPDX-License-Identifier: Apache-2.0
// Runs the threads of a small case in every order and with every value that a load may return, and stops at the first
// mistake. What is modelled and what not is said in link.cc.
//
// A thread has no stack of its own: what it does is a function of what it saw, so it is run again from its start, fed
// with its log, until it asks for an operation that the log does not have. That makes a state a plain value: states
// that were met before are not looked at again, and the search ends.
#pragma once

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <unordered_set>

#include "state.h"

namespace explorer {

class Search {
 public:
  size_t num_threads = 0;
  std::array<bool, kMaxThreads> may_die{};
  void (*body)(size_t thread) = nullptr;
  const char* shared_begin = nullptr;
  const char* shared_end = nullptr;

  uint64_t perform(Op op) {
    std::vector<Seen>& log = now_->memory.logs[self_];
    if (replayed_ == log.size()) {
      if (op.what < Do::kRead) {
        now_->threads[self_].next = op;
        _longjmp(back_, 1);
      }
      log.push_back({apply_local(op), kNoWord, 0});
    }
    return log[replayed_++].value;
  }

  size_t here() const { return replayed_; }

  // The look that began at `head` found nothing: it is repeated when a word that it read has changed.
  [[noreturn]] void pause(size_t head) {
    std::vector<Seen>& log = now_->memory.logs[self_];
    now_->threads[self_].pause.assign(log.begin() + static_cast<std::ptrdiff_t>(head), log.end());
    log.resize(head);
    _longjmp(back_, 2);
  }

  // A round of a loop is over that left nothing behind in its thread.
  [[noreturn]] void forget(size_t head) {
    now_->memory.logs[self_].resize(head);
    _longjmp(back_, 2);
  }

  [[noreturn]] void mistake(const std::string& text) {
    std::printf("MISTAKE: %s\n", text.c_str());
    if (!is_telling_) tell_path();
    std::exit(1);
  }

  uint8_t word_of(const void* address, size_t num_bytes) {
    const size_t index = index_of(words_, address, kMaxWords);
    std::vector<Message>& list = now_->memory.words[index];
    if (list.empty()) {
      list.push_back({0, {}, false});
      std::memcpy(&list[0].value, address, num_bytes);
    }
    return static_cast<uint8_t>(index);
  }
  uint8_t byte_of(const void* address) { return static_cast<uint8_t>(index_of(bytes_, address, kMaxBytes)); }

  // `shared` is the case's memory; what it holds now is what every run begins with.
  template <class Shared>
  void run(size_t count, void (*each)(size_t thread), const Shared& shared) {
    num_threads = count;
    body = each;
    shared_begin = reinterpret_cast<const char*>(&shared);
    shared_end = reinterpret_cast<const char*>(&shared + 1);
    explore(first_state());
    std::printf("explored: %zu states, %zu steps, %zu ends, %zu steps deep\n", met_.size(), steps_, ends_, deepest_);
  }

 private:
  static size_t index_of(std::vector<const void*>& table, const void* address, size_t limit) {
    const auto found = std::find(table.begin(), table.end(), address);
    if (found != table.end()) return static_cast<size_t>(found - table.begin());
    if (table.size() == limit) {
      std::printf("OUT OF BOUNDS: a case has at most %zu words or bytes\n", limit);
      std::exit(2);
    }
    table.push_back(address);
    return table.size() - 1;
  }

  // Runs a thread up to its next operation.
  void advance(State& state, size_t thread) {
    now_ = &state;
    self_ = thread;
    if (_setjmp(back_) == 1) return;  // 1: the next operation is known; 2: the log is shorter now, run again
    replayed_ = 0;
    body(self_);
    now_->threads[self_].next = {};
  }

  uint64_t apply_local(const Op& op) {
    Memory& memory = now_->memory;
    uint8_t value = 0;
    switch (op.what) {
      case Do::kRead:
        if (!memory.read(self_, op.target, &value)) mistake(at(self_) + "data race: reads a byte too early");
        return value;
      case Do::kWrite:
        if (!memory.write(self_, op.target, static_cast<uint8_t>(op.value))) {
          mistake(at(self_) + "data race: overwrites a byte that may still be read");
        }
        return 0;
      case Do::kNote:
        return now_->notes[op.target] = op.value;
      default:
        return now_->notes[op.target];
    }
  }

  bool is_enabled(const State& state, size_t index) const {
    const Thread& thread = state.threads[index];
    if (has_ended(thread) || thread.is_asleep) return false;
    if (thread.next.what == Do::kAwaitEnd) return has_ended(state.threads[thread.next.target]);
    if (thread.next.what == Do::kBarrier) {
      for (size_t i = 0; i < thread.next.value; ++i) {
        if (!has_ended(state.threads[i]) && state.threads[i].next.what != Do::kBarrier) return false;
      }
    }
    if (thread.pause.empty()) return true;
    return std::any_of(thread.pause.begin(), thread.pause.end(), [&](const Seen& seen) {
      return seen.word != kNoWord && seen.position + 1u < state.memory.words[seen.word].size();
    });
  }

  // What the next operation of a thread may do: messages of a word, or numbers.
  static std::vector<uint8_t> choices(const State& state, size_t index) {
    const Op& op = state.threads[index].next;
    if (op.what <= Do::kReplace) return state.memory.choices(index, op.target, op.order, op.what == Do::kLoad);
    std::vector<uint8_t> numbers(op.what == Do::kChoose ? op.value : 1);
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<uint8_t>(i);
    return numbers;
  }

  void step(State& state, size_t index, uint8_t choice) {
    Memory& memory = state.memory;
    const Op op = state.threads[index].next;
    Seen seen{0, kNoWord, 0};
    state.threads[index].pause.clear();
    switch (op.what) {
      case Do::kLoad:
        seen = {memory.load(index, op.target, op.order, choice), op.target, choice};
        break;
      case Do::kStore:
        memory.store(index, op.target, op.order, choice, op.value, false);
        break;
      case Do::kAdd:
        seen.value = memory.add(index, op.target, op.order, choice, op.value, op.mask);
        break;
      case Do::kReplace:
        seen.value = memory.load(index, op.target, op.order, choice);
        if (seen.value != op.expected) {
          seen = {seen.value, op.target, choice};
        } else {
          memory.store(index, op.target, op.order, choice, op.value, true);
        }
        break;
      case Do::kSleep:  // as the kernel does it: compares with the newest value and goes to sleep, in one step
        if (memory.words[op.target].back().value != op.value) break;
        state.threads[index].is_asleep = true;
        return;
      case Do::kWake:
        for (size_t i = 0; i < num_threads; ++i) {
          if (state.threads[i].is_asleep && state.threads[i].next.target == op.target) wake(state, i);
        }
        break;
      case Do::kAwaitEnd:  // the kernel tells of an end after all that was done before it
        memory.views[index].join(memory.views[op.target]);
        break;
      case Do::kBarrier:
        return pass_barrier(state, op.value);
      default:
        seen.value = choice;
    }
    memory.logs[index].push_back(seen);
    advance(state, index);
  }

  void wake(State& state, size_t index) {
    state.threads[index].is_asleep = false;
    state.memory.logs[index].push_back({0, kNoWord, 0});
    advance(state, index);
  }

  void pass_barrier(State& state, size_t count) {
    View all;
    for (size_t i = 0; i < count; ++i) all.join(state.memory.views[i]);
    for (size_t i = 0; i < count; ++i) {
      if (has_ended(state.threads[i])) continue;
      state.memory.views[i].join(all);
      state.memory.logs[i].push_back({0, kNoWord, 0});
      advance(state, i);
    }
  }

  void explore(const State& state) {
    deepest_ = std::max(deepest_, path_.size());
    if (path_.size() > kMaxDepth || met_.size() > kMaxStates) {
      std::printf("OUT OF BOUNDS: %zu states, %zu steps deep\n", met_.size(), path_.size());
      std::exit(2);
    }
    bool is_stuck = true;
    bool all_ended = true;
    for (size_t i = 0; i < num_threads; ++i) {
      all_ended = all_ended && has_ended(state.threads[i]);
      if (may_die[i] && !has_ended(state.threads[i])) go(state, {i, kDies});
      if (!is_enabled(state, i)) continue;
      is_stuck = false;
      for (const uint8_t choice : choices(state, i)) go(state, {i, choice});
    }
    if (all_ended) {
      ++ends_;
    } else if (is_stuck) {
      mistake("a wait that never ends: " + waits(state));
    }
  }

  void go(const State& state, Step chosen) {
    path_.push_back(chosen);
    ++steps_;
    State next = state;
    apply(next, chosen);
    if (met_.insert(key_of(next, num_threads)).second) explore(next);
    path_.pop_back();
  }

  void apply(State& state, Step chosen) {
    if (chosen.choice == kDies) {
      state.threads[chosen.thread].is_dead = true;
    } else {
      step(state, chosen.thread, chosen.choice);
    }
  }

  State first_state() {
    State state;
    for (size_t i = 0; i < num_threads; ++i) {
      state.memory.views[i].clock[i] = 1;
      advance(state, i);
    }
    return state;
  }

  // Takes the steps to a mistake again, in words; the mistake itself ends it.
  void tell_path() {
    is_telling_ = true;
    State state = first_state();
    for (const Step& chosen : path_) {
      const std::string what = chosen.choice == kDies ? "dies" : describe(state, chosen.thread, chosen.choice);
      std::printf("  %s%s\n", at(chosen.thread).c_str(), what.c_str());
      apply(state, chosen);
    }
  }

  std::string waits(const State& state) const {
    std::string text;
    for (size_t i = 0; i < num_threads; ++i) {
      if (has_ended(state.threads[i])) continue;
      text += " thread " + std::to_string(i) + (state.threads[i].is_asleep ? " sleeps" : " waits");
    }
    return text;
  }

  static constexpr size_t kMaxDepth = 400;
  static constexpr size_t kMaxStates = 20'000'000;

  State* now_ = nullptr;
  size_t self_ = 0, replayed_ = 0;
  std::jmp_buf back_;
  std::vector<const void*> words_, bytes_;
  std::unordered_set<Key, KeyHash> met_;
  std::vector<Step> path_;
  bool is_telling_ = false;
  size_t steps_ = 0, ends_ = 0, deepest_ = 0;
};

inline Search search;

// --- what a case and core/atomic.h call

template <class T>
class AtomicRef {
 public:
  explicit AtomicRef(T& word) : word_(&word) {}
  T load(Order order) const { return static_cast<T>(search.perform(op(Do::kLoad, order, 0))); }
  void store(T value, Order order) const { search.perform(op(Do::kStore, order, value)); }
  T fetch_add(T value, Order order) const { return static_cast<T>(search.perform(op(Do::kAdd, order, value))); }
  bool compare_exchange_strong(T& expected, T value, Order order) const {
    Op replace = op(Do::kReplace, order, value);
    replace.expected = expected;
    return static_cast<T>(search.perform(replace)) == expected;
  }

 private:
  Op op(Do what, Order order, T value) const {
    return {what, order, search.word_of(word_, sizeof(T)), value, static_cast<T>(~T{0})};
  }
  T* word_;
};

inline uint8_t read_byte(const void* address) {
  return static_cast<uint8_t>(search.perform({Do::kRead, memory_order_relaxed, search.byte_of(address)}));
}
inline void write_byte(const void* address, uint8_t value) {
  search.perform({Do::kWrite, memory_order_relaxed, search.byte_of(address), value});
}
inline void futex_wait(const uint32_t* word, uint32_t seen) {
  search.perform({Do::kSleep, memory_order_relaxed, search.word_of(word, sizeof *word), seen});
}
inline void futex_wake(const uint32_t* word) {
  search.perform({Do::kWake, memory_order_relaxed, search.word_of(word, sizeof *word)});
}
inline uint64_t choose(uint64_t count) { return search.perform({Do::kChoose, memory_order_relaxed, 0, count}); }
// The first `count` threads meet, as at the end of a launch.
inline void barrier(size_t count) { search.perform({Do::kBarrier, memory_order_relaxed, 0, count}); }
inline void await_end_of(size_t thread) {
  search.perform({Do::kAwaitEnd, memory_order_relaxed, static_cast<uint8_t>(thread)});
}
inline void note(uint8_t which, uint64_t value) { search.perform({Do::kNote, memory_order_relaxed, which, value}); }
inline uint64_t noted(uint8_t which) { return search.perform({Do::kNoted, memory_order_relaxed, which}); }
inline void check(bool is_right, const char* text) {
  if (!is_right) search.mistake(text);
}

// Until look() is true; it must not leave anything behind.
template <class Look>
void await(Look&& look) {
  const size_t head = search.here();
  if (!look()) search.pause(head);
}
// The same for a round that stores: it comes again whether or not something changed.
template <class Round>
void repeat(Round&& round) {
  const size_t head = search.here();
  if (!round()) search.forget(head);
}
// For a loop around one load.
inline void pause_after_load() { search.pause(search.here() - 1); }

}  // namespace explorer

#include "copies.h"
