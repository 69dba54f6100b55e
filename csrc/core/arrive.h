// SPDX-License-Identifier: Apache-2.0
// One verb run by several blocks of threads, as a GPU does: one block decides for all, and the last one to finish acts
// for all.
//
// An Exec runs a body: `thread()` of `num_threads()` in `block()` of `num_blocks()`, `sync()` among the threads of a
// block, `any(bool)` which is a sync() that tells each whether it was true for one of them, `lane()` of `num_lanes()`
// threads that copy together (a warp), `max_of_lanes(value, n)` of n neighbours among them, `shared()` and `counts()`
// for words that a block shares, `pause()` between two looks, `now_ns()`, `wake(WakeWord*)` after a signal. A host
// thread is one block of one thread.
#pragma once

#include "core/atomic.h"
#include "core/platform.h"

namespace m2n {

template <class Exec>
M2N_HD bool is_leader(const Exec& exec) {
  return exec.thread() == 0;
}

// What the blocks of one launch share. All zero between two launches.
struct Gate {
  uint32_t verdict;   // 0: not decided yet
  uint32_t arrivals;  // blocks that have finished
};

// Ends a block's part. True for one thread only: the leader of the block that arrives last, which sees what all blocks
// wrote. Every block arrives, whatever it did or left undone, else the next launch starts with a wrong count.
template <class Exec>
M2N_HD bool arrive(Exec& exec, uint32_t* arrivals) {
  exec.sync();
  if (!is_leader(exec)) return false;
  if (exec.num_blocks() == 1) return true;
  if (add_acq_rel(arrivals, 1u) + 1 != exec.num_blocks()) return false;  // SYNC: arrival
  // Relaxed: who uses the count next comes after what this thread does next.
  store_relaxed(arrivals, 0u);  // SYNC: arrival
  return true;
}

// The threads of block 0 run verdict_of() (not 0, and the same for all of them); every thread of every block returns
// that verdict, and sees what block 0 wrote before.
template <class Exec, class VerdictOf>
M2N_HD uint32_t decide(Exec& exec, Gate* gate, VerdictOf&& verdict_of) {
  if (exec.block() == 0) {
    const uint32_t verdict = verdict_of();
    exec.sync();
    if (is_leader(exec)) store_release_to_blocks(&gate->verdict, verdict);  // SYNC: verdict
  } else if (is_leader(exec)) {
    while (load_acquire_of_blocks(&gate->verdict) == 0) exec.pause();  // SYNC: verdict
  }
  exec.sync();
  return load_acquire_of_blocks(&gate->verdict);  // SYNC: verdict
}

// The end of a launch that began with decide(): true for the one thread that may finish it for all.
template <class Exec>
M2N_HD bool leave(Exec& exec, Gate* gate) {
  if (!arrive(exec, &gate->arrivals)) return false;
  store_relaxed(&gate->verdict, 0u);  // relaxed: all blocks have read it
  return true;
}

// Where the share of one of `num_parts` begins.
M2N_HD constexpr uint32_t share(uint32_t num_items, uint32_t part, uint32_t num_parts) {
  return static_cast<uint32_t>(uint64_t{num_items} * part / num_parts);
}

// Pieces of work dealt out in turn, over several calls: worker i of n takes i, i + n, i + 2n, ...
class Deal {
 public:
  M2N_HD Deal(uint32_t worker, uint32_t num_workers) : next_(worker), num_workers_(num_workers) {}

  // Calls body(i) for this worker's share of 0 .. num_pieces; the next call goes on with whose turn it is.
  template <class Body>
  M2N_HD void operator()(uint32_t num_pieces, Body&& body) {
    uint32_t i = next_;
    for (; i < num_pieces; i += num_workers_) body(i);
    next_ = i - num_pieces;
  }

 private:
  uint32_t next_, num_workers_;
};

// Among the groups of lanes of all blocks.
template <class Exec>
M2N_HD Deal deal_to_groups(const Exec& exec) {
#if defined(__CUDA_ARCH__)
  const uint32_t num_lanes = exec.num_lanes();
#else
  const uint32_t num_lanes = 1;  // a thread of the host copies alone
#endif
  const uint32_t groups = exec.num_threads() / num_lanes;
  return {exec.block() * groups + exec.thread() / num_lanes, exec.num_blocks() * groups};
}

}  // namespace m2n
