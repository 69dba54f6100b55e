// SPDX-License-Identifier: Apache-2.0
// The body of gate_dispatch.h on CPU threads that stand for the blocks and threads of a kernel, beside device comms of
// the device "emulated"; compared with the oracle. This is how a kernel can be tested where there is no GPU.
//
// Usage: gate_dispatch. A line for each case; not 0 where a bit differs.
#include <sched.h>

#include <atomic>
#include <barrier>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "gate_check.h"

namespace {

using namespace m2n;

constexpr uint32_t kBlocks = 2;
constexpr uint32_t kThreads = 2;  // of a block

// What the threads of a block share.
struct Block {
  std::barrier<> barrier{kThreads};
  std::atomic<uint32_t> is_any{0};
};

// A group of lanes is one thread.
class TeamExec {
 public:
  TeamExec(uint32_t block_idx, uint32_t thread, Block& block)
      : block_idx_(block_idx), thread_(thread), block_(&block) {}

  uint32_t thread() const { return thread_; }
  uint32_t num_threads() const { return kThreads; }
  uint32_t block() const { return block_idx_; }
  uint32_t num_blocks() const { return kBlocks; }
  uint32_t lane() const { return 0; }
  uint32_t num_lanes() const { return 1; }
  void sync_lanes() {}
  uint32_t from_first_lane(uint32_t value) const { return value; }
  void sync() { block_->barrier.arrive_and_wait(); }
  bool any(bool is_true) {
    if (is_true) block_->is_any = 1;
    sync();
    const bool is_any = block_->is_any != 0;
    sync();
    if (thread_ == 0) block_->is_any = 0;
    sync();
    return is_any;
  }
  void pause() { sched_yield(); }
  int64_t now_ns() const { return m2n::now_ns(); }
  void wake(WakeWord*) {}  // whoever waits for a device's signal polls

 private:
  uint32_t block_idx_, thread_;
  Block* block_;
};

struct Launcher {
  template <class T>
  void operator()(const gate_dispatch::GateDispatch<T>& launch) const {
    std::vector<std::unique_ptr<Block>> blocks;
    for (uint32_t i = 0; i < kBlocks; ++i) blocks.push_back(std::make_unique<Block>());
    std::vector<std::thread> threads;
    for (uint32_t i = 0; i < kBlocks * kThreads; ++i) {
      threads.emplace_back([&, i] {
        TeamExec exec(i / kThreads, i % kThreads, *blocks[i / kThreads]);
        gate_dispatch::run(exec, launch);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

}  // namespace

int main() { return gate_dispatch::check_all("emulated", "shm", Launcher{}); }
