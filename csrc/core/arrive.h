// SPDX-License-Identifier: Apache-2.0
// One verb run by several blocks of threads, as a GPU does: one block decides for all, and the last one to finish acts
// for all.
//
// An Exec runs a body: `thread()` of `num_threads()` in `block()` of `num_blocks()`, `sync()` among the threads of a
// block, `pause()` between two looks, `wake(WakeWord*)` after a signal. A host thread is one block of one thread.
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

// Block 0 runs verdict_of() (not 0) in one thread; every thread of every block returns its verdict.
template <class Exec, class VerdictOf>
M2N_HD uint32_t decide(Exec& exec, Gate* gate, VerdictOf&& verdict_of) {
  if (is_leader(exec)) {
    if (exec.block() == 0) {
      store_release(&gate->verdict, verdict_of());  // SYNC: verdict
    } else {
      while (load_acquire(&gate->verdict) == 0) exec.pause();  // SYNC: verdict
    }
  }
  exec.sync();
  return load_acquire(&gate->verdict);  // SYNC: verdict
}

// The end of a launch that began with decide(): true for the one thread that may finish it for all.
template <class Exec>
M2N_HD bool leave(Exec& exec, Gate* gate) {
  if (!arrive(exec, &gate->arrivals)) return false;
  store_relaxed(&gate->verdict, 0u);  // relaxed: all blocks have read it
  return true;
}

}  // namespace m2n
