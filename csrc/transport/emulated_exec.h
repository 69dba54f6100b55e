// SPDX-License-Identifier: Apache-2.0
// CPU threads that run a body as the blocks and threads of a kernel would: so it can be tested where there is no GPU.
#pragma once

#include <sched.h>

#include <atomic>
#include <barrier>
#include <cstdint>
#include <latch>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "transport/host_exec.h"
#include "transport/own_thread.h"

namespace m2n {

// A group of lanes is one thread.
class EmulatedExec {
 public:
  // What the threads of a block share.
  struct Block {
    Block(uint32_t num_threads, uint32_t num_shared_words) : barrier(num_threads), shared((num_shared_words + 3) / 4) {}

    struct alignas(16) Words {
      uint32_t words[4];
    };
    std::barrier<> barrier;
    std::atomic<uint32_t> is_any[3] = {0, 0, 0};  // of this turn, the next, and the last, which all have read
    std::vector<Words> shared;
  };

  EmulatedExec(uint32_t block_idx, uint32_t num_blocks, uint32_t thread, uint32_t num_threads, Block& block)
      : block_idx_(block_idx), num_blocks_(num_blocks), thread_(thread), num_threads_(num_threads), block_(&block) {}

  uint32_t thread() const { return thread_; }
  uint32_t num_threads() const { return num_threads_; }
  uint32_t block() const { return block_idx_; }
  uint32_t num_blocks() const { return num_blocks_; }
  uint32_t lane() const { return 0; }
  uint32_t num_lanes() const { return 1; }
  void sync_lanes() {}
  uint32_t from_first_lane(uint32_t value) const { return value; }
  uint32_t max_of_lanes(uint32_t value, uint32_t) const { return value; }
  uint32_t* shared() const { return block_->shared.data()->words; }
  void sync() { block_->barrier.arrive_and_wait(); }
  bool any(bool is_true) {
    const uint32_t turn = turn_++;
    if (is_true) block_->is_any[turn % 3] = 1;
    sync();
    if (thread_ == 0) block_->is_any[(turn + 2) % 3] = 0;
    return block_->is_any[turn % 3] != 0;
  }
  void pause() { sched_yield(); }
  int64_t now_ns() const { return m2n::now_ns(); }
  void wake(WakeWord*) {}  // like a device's: whoever waits for its signals polls

 private:
  uint32_t block_idx_, num_blocks_, thread_, num_threads_;
  uint32_t turn_ = 0;  // of any()
  Block* block_;
};

// Calls body(exec), with an `Exec` made from an EmulatedExec, on every thread of every block; returns when all are
// done. Throws Error(kSetup), and has called nothing, where there can be no more threads.
template <class Exec = EmulatedExec, class Body>
void run_emulated(uint32_t num_blocks, uint32_t num_threads, uint32_t num_shared_words, const Body& body) {
  std::vector<std::unique_ptr<EmulatedExec::Block>> blocks;
  for (uint32_t i = 0; i < num_blocks; ++i) {
    blocks.push_back(std::make_unique<EmulatedExec::Block>(num_threads, num_shared_words));
  }
  std::vector<std::thread> threads;
  std::latch is_decided(1);  // bodies wait for each other: none begins before all are there
  std::string failure;
  try {
    for (uint32_t i = 0; i < num_blocks * num_threads; ++i) {
      threads.emplace_back([&, i] {
        is_decided.wait();
        if (!failure.empty()) return;
        Exec exec{EmulatedExec(i / num_threads, num_blocks, i % num_threads, num_threads, *blocks[i / num_threads])};
        body(exec);
      });
    }
  } catch (const std::system_error& error) {
    failure = error.what();
  }
  is_decided.count_down();
  for (std::thread& thread : threads) thread.join();
  if (!failure.empty()) throw no_thread("of an emulated device", failure);
}

}  // namespace m2n
