// SPDX-License-Identifier: Apache-2.0
// The verbs on a team of CPU threads that stand for the blocks and threads of a kernel: every line of a device comm but
// the launches themselves runs, and is tested, where there is no GPU. A launch is over when launch() returns.
#include <sched.h>

#include <atomic>
#include <barrier>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "exchange/machine.h"
#include "transport/host_exec.h"

namespace m2n {
namespace {

constexpr uint32_t kBlocks = 3;
constexpr uint32_t kThreads = 2;  // of a block

// What the threads of a block share.
struct Block {
  std::barrier<> barrier{kThreads};
  std::atomic<uint32_t> is_any[3] = {0, 0, 0};  // of this turn, the next, and the last, which all have read
  alignas(16) uint32_t words[shared_words(kMaxPeers)] = {};
  uint32_t counts[kCountWords] = {};
};

class TeamExec {
 public:
  TeamExec(uint32_t block_idx, uint32_t thread, uint32_t num_blocks, Block& block)
      : block_idx_(block_idx), thread_(thread), num_blocks_(num_blocks), block_(&block) {}

  uint32_t thread() const { return thread_; }
  uint32_t num_threads() const { return kThreads; }
  uint32_t block() const { return block_idx_; }
  uint32_t num_blocks() const { return num_blocks_; }
  uint32_t lane() const { return 0; }
  uint32_t num_lanes() const { return 1; }
  uint32_t* shared() const { return block_->words; }
  uint32_t* counts() const { return block_->counts; }
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
  void wake(WakeWord* wake) { wake_waiters(wake, futex_wake_all); }

 private:
  uint32_t block_idx_, thread_, num_blocks_;
  uint32_t turn_ = 0;  // of any()
  Block* block_;
};

class TeamMachine final : public Machine {
 public:
  std::shared_ptr<void> allocate(uint64_t bytes) override {
    const auto align = std::align_val_t{kLineBytes};
    void* memory = ::operator new(bytes, align);
    std::memset(memory, 0, bytes);
    return {memory, [align](void* data) { ::operator delete(data, align); }};
  }
  // By words where it can be: verbs may be reading or writing them.
  void copy(void* to, const void* from, uint64_t bytes) override {
    if (bytes == sizeof(uint32_t)) {
      store_release(static_cast<uint32_t*>(to), *static_cast<const uint32_t*>(from));  // SYNC: peer-mirror
    } else if (bytes % sizeof(uint64_t) == 0) {
      for (uint64_t i = 0; i < bytes / sizeof(uint64_t); ++i) {
        store_relaxed(static_cast<uint64_t*>(to) + i, load_relaxed(static_cast<const uint64_t*>(from) + i));
      }
    } else {
      std::memcpy(to, from, bytes);
    }
  }
  bool is_capturing(Stream) override { return false; }
  void synchronize_all() override {}

  std::shared_ptr<void> make_event() override { return nullptr; }
  void record(void*, Stream) override {}
  void wait(Stream, void*) override {}
  void synchronize(void*) override {}

  void launch(const RouteVerb& verb, Stream) override { start(verb, 1); }
  void launch(const AwaitVerb& verb, Stream) override { start(verb, 1); }
  void launch(const PollVerb& verb, Stream) override { start(verb, 1); }
  void launch(const ReceiveVerb& verb, Stream) override { start(verb, 1); }
  void launch(const DispatchVerb& verb, uint32_t, uint64_t, Stream) override { start(verb, kBlocks); }
  void launch(const CombineRecvVerb& verb, uint32_t, uint64_t, Stream) override {
    with_types(verb, [](const auto& typed) { start(typed, kBlocks); });
  }
  void launch(const CombineSendVerb& verb, uint32_t, uint64_t, Stream) override {
    with_types(verb, [](const auto& typed) { start(typed, kBlocks); });
  }

 private:
  // Always all blocks: small payloads shall meet them too.
  template <class V>
  static void start(const V& verb, uint32_t num_blocks) {
    std::vector<std::unique_ptr<Block>> blocks;
    for (uint32_t i = 0; i < num_blocks; ++i) blocks.push_back(std::make_unique<Block>());
    std::vector<std::thread> threads;
    for (uint32_t i = 0; i < num_blocks * kThreads; ++i) {
      threads.emplace_back([&verb, &blocks, num_blocks, i] {
        TeamExec exec(i / kThreads, i % kThreads, num_blocks, *blocks[i / kThreads]);
        run(exec, verb);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

}  // namespace

std::unique_ptr<Machine> make_team_machine() { return std::make_unique<TeamMachine>(); }

}  // namespace m2n
