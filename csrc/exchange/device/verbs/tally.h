// SPDX-License-Identifier: Apache-2.0
// Counting by the threads of one block, over parts of the items: runs of them, so that a sort by key keeps their order.
#pragma once

#include <cstdint>

#include "core/arrive.h"

namespace m2n {

// Most parts of a tally: one for each thread of a block.
inline constexpr uint32_t kMaxParts = 512;
// Parts are added up in runs of so many, and then the runs.
inline constexpr uint32_t kPartsPerRun = 16;
inline constexpr uint32_t kMaxRuns = kMaxParts / kPartsPerRun;

// In memory of the launch, for a tally that is too large for what a block shares.
constexpr uint64_t tally_words(uint64_t num_keys) { return num_keys * (kMaxParts + kMaxRuns + 1); }

struct Tally {
  uint32_t* counts;  // [num_keys][num_parts]
  uint32_t* runs;    // [num_keys][kMaxRuns]
  uint32_t* totals;  // [num_keys]
  uint32_t num_keys;
  uint32_t num_items;
  uint32_t num_parts;

  M2N_HD uint32_t& at(uint32_t key, uint32_t part) const { return counts[key * num_parts + part]; }
  M2N_HD uint32_t total(uint32_t key) const { return totals[key]; }
  M2N_HD uint32_t begin(uint32_t part) const { return share(num_items, part, num_parts); }
  M2N_HD uint32_t part_of(uint32_t item) const {
    uint32_t part = static_cast<uint32_t>(uint64_t{item} * num_parts / num_items);
    while (begin(part + 1) <= item) ++part;
    return part;
  }
};

// A part for each thread, or for each item where there are fewer. `words`: tally_words(num_keys).
template <class Exec>
M2N_HD Tally make_tally(const Exec& exec, uint32_t* words, uint32_t num_keys, uint32_t num_items) {
  const uint32_t num_threads = exec.num_threads() < kMaxParts ? exec.num_threads() : kMaxParts;
  const uint32_t num_parts = num_items < num_threads ? (num_items == 0 ? 1 : num_items) : num_threads;
  if (num_keys * (num_parts + kMaxRuns + 1) <= kCountWords) words = exec.counts();
  uint32_t* runs = words + num_keys * num_parts;
  return {words, runs, runs + num_keys * kMaxRuns, num_keys, num_items, num_parts};
}

// All counts to zero, by all threads.
template <class Exec>
M2N_HD void clear(Exec& exec, const Tally& tally) {
  for (uint32_t i = exec.thread(); i < tally.num_keys * tally.num_parts; i += exec.num_threads()) tally.counts[i] = 0;
  exec.sync();
}

// By all threads: the count of each part becomes that of the parts before it, and the totals are known.
template <class Exec>
M2N_HD void add_up(Exec& exec, const Tally& tally) {
  const uint32_t num_runs = (tally.num_parts + kPartsPerRun - 1) / kPartsPerRun;
  const auto for_each_run = [&](auto&& body) {
    for (uint32_t i = exec.thread(); i < tally.num_keys * num_runs; i += exec.num_threads()) {
      const uint32_t key = i / num_runs, run = i - key * num_runs;
      const uint32_t first = run * kPartsPerRun;
      const uint32_t end = first + kPartsPerRun < tally.num_parts ? first + kPartsPerRun : tally.num_parts;
      body(key, run, &tally.at(key, first), end - first);
    }
  };
  exec.sync();
  for_each_run([&](uint32_t key, uint32_t run, const uint32_t* counts, uint32_t num_counts) {
    uint32_t sum = 0;
    for (uint32_t i = 0; i < num_counts; ++i) sum += counts[i];
    tally.runs[key * kMaxRuns + run] = sum;
  });
  exec.sync();
  for (uint32_t key = exec.thread(); key < tally.num_keys; key += exec.num_threads()) {
    uint32_t sum = 0;
    for (uint32_t run = 0; run < num_runs; ++run) {
      const uint32_t of_run = tally.runs[key * kMaxRuns + run];
      tally.runs[key * kMaxRuns + run] = sum;
      sum += of_run;
    }
    tally.totals[key] = sum;
  }
  exec.sync();
  for_each_run([&](uint32_t key, uint32_t run, uint32_t* counts, uint32_t num_counts) {
    uint32_t sum = tally.runs[key * kMaxRuns + run];
    for (uint32_t i = 0; i < num_counts; ++i) {
      const uint32_t count = counts[i];
      counts[i] = sum;
      sum += count;
    }
  });
  exec.sync();
}

}  // namespace m2n
