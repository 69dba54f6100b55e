// SPDX-License-Identifier: Apache-2.0
// A memory with weak orders, as a value that can be copied, compared and stepped: the words and rows of a case, and
// what each of its threads may still see of them.
//
// Each word is the list of its stores in modification order; a thread has a position in each list, and a load may
// return any store from there on. A release store carries what its thread has seen, an acquire load takes it over;
// seq_cst operations also agree with one order, that of execution. Rows are plain bytes: unordered accesses are a data
// race.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace explorer {

inline constexpr size_t kMaxThreads = 8;
inline constexpr size_t kMaxWords = 24;
inline constexpr size_t kMaxBytes = 32;

// The names that core/atomic.h expects of a back end.
enum Order {
  memory_order_relaxed,
  memory_order_acquire,
  memory_order_release,
  memory_order_acq_rel,
  memory_order_seq_cst
};
inline bool acquires(Order order) { return order != memory_order_relaxed && order != memory_order_release; }
inline bool releases(Order order) { return order != memory_order_relaxed && order != memory_order_acquire; }

// What is visible: a position in each word's list, and for the rows how much of each thread's past.
struct View {
  std::array<uint8_t, kMaxWords> position{};
  std::array<uint8_t, kMaxThreads> clock{};

  void join(const View& other) {
    for (size_t i = 0; i < kMaxWords; ++i) position[i] = std::max(position[i], other.position[i]);
    for (size_t i = 0; i < kMaxThreads; ++i) clock[i] = std::max(clock[i], other.clock[i]);
  }
};

struct Message {
  uint64_t value;
  View view;    // handed to a load that acquires
  bool is_add;  // nothing may come between it and the message before
};

struct Byte {
  uint8_t value = 0;
  uint8_t writer = 0;
  uint8_t written = 0;  // the writer's clock
  std::array<uint8_t, kMaxThreads> read{};
};

// One result of an operation, as its thread saw it; the thread's state is a function of these.
struct Seen {
  uint64_t value;
  uint8_t word;  // kNoWord, or where a load or an add looked
  uint8_t position;
};
inline constexpr uint8_t kNoWord = 0xFF;

struct Memory {
  std::array<std::vector<Message>, kMaxWords> words;
  std::array<Byte, kMaxBytes> bytes{};
  std::array<uint8_t, kMaxWords> seq_cst{};  // the last store of the one order
  std::array<View, kMaxThreads> views{};
  std::array<std::vector<Seen>, kMaxThreads> logs;

  uint8_t oldest(size_t thread, size_t word, Order order) const {
    const uint8_t own = views[thread].position[word];
    return order == memory_order_seq_cst ? std::max(own, seq_cst[word]) : own;
  }

  // The messages that a load may return; that an add may follow; that a store may follow.
  std::vector<uint8_t> choices(size_t thread, size_t word, Order order, bool is_load) const {
    std::vector<uint8_t> found;
    const std::vector<Message>& list = words[word];
    for (size_t at = oldest(thread, word, order); at < list.size(); ++at) {
      if (is_load || at + 1 == list.size() || !list[at + 1].is_add) found.push_back(static_cast<uint8_t>(at));
    }
    return found;
  }

  uint64_t load(size_t thread, size_t word, Order order, uint8_t at) {
    const Message& message = words[word][at];
    views[thread].position[word] = std::max(views[thread].position[word], at);
    if (acquires(order)) views[thread].join(message.view);
    return message.value;
  }

  void store(size_t thread, size_t word, Order order, uint8_t after, uint64_t value, bool is_add) {
    const auto at = static_cast<uint8_t>(after + 1);
    if (at != words[word].size()) shift(word, at);
    View& view = views[thread];
    view.position[word] = at;
    Message message{value, {}, is_add};
    if (releases(order)) message.view = view;
    if (is_add) message.view.join(words[word][after].view);  // a release sequence goes on
    message.view.position[word] = at;
    words[word].insert(words[word].begin() + at, message);
    if (order == memory_order_seq_cst) seq_cst[word] = at;
    ++view.clock[thread];
  }

  uint64_t add(size_t thread, size_t word, Order order, uint8_t after, uint64_t value, uint64_t mask) {
    const uint64_t before = load(thread, word, order, after);
    store(thread, word, order, after, (before + value) & mask, true);
    return before;
  }

  // False: a data race.
  bool write(size_t thread, size_t byte, uint8_t value) {
    const View& view = views[thread];
    Byte& to = bytes[byte];
    bool is_ordered = view.clock[to.writer] >= to.written;
    for (size_t i = 0; i < kMaxThreads; ++i) is_ordered = is_ordered && (i == thread || view.clock[i] >= to.read[i]);
    to.value = value;
    to.writer = static_cast<uint8_t>(thread);
    to.written = view.clock[thread];
    to.read = {};
    return is_ordered;
  }

  bool read(size_t thread, size_t byte, uint8_t* value) {
    Byte& from = bytes[byte];
    from.read[thread] = views[thread].clock[thread];
    *value = from.value;
    return views[thread].clock[from.writer] >= from.written;
  }

 private:
  // Makes room in the middle of a word's list.
  void shift(size_t word, uint8_t at) {
    const auto move = [at](uint8_t& position) { position = static_cast<uint8_t>(position + (position >= at ? 1 : 0)); };
    for (View& view : views) move(view.position[word]);
    for (auto& list : words) {
      for (Message& message : list) move(message.view.position[word]);
    }
    move(seq_cst[word]);
    for (auto& log : logs) {
      for (Seen& seen : log) {
        if (seen.word == word) move(seen.position);
      }
    }
  }
};

}  // namespace explorer
