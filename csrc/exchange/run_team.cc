// SPDX-License-Identifier: Apache-2.0
// The verbs on a team of CPU threads that stand for the blocks and threads of a kernel: every line of a device comm but
// the launches themselves runs, and is tested, where there is no GPU. A launch is over when launch() returns.
#include <sched.h>

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

class TeamExec {
 public:
  TeamExec(uint32_t block, uint32_t thread, uint32_t num_blocks, std::barrier<>* barrier)
      : block_(block), thread_(thread), num_blocks_(num_blocks), barrier_(barrier) {}

  uint32_t thread() const { return thread_; }
  uint32_t num_threads() const { return barrier_ == nullptr ? 1 : kThreads; }
  uint32_t block() const { return block_; }
  uint32_t num_blocks() const { return num_blocks_; }
  void sync() {
    if (barrier_ != nullptr) barrier_->arrive_and_wait();
  }
  void pause() { sched_yield(); }
  int64_t now_ns() const { return m2n::now_ns(); }
  void wake(WakeWord* wake) { wake_waiters(wake, futex_wake_all); }

 private:
  uint32_t block_, thread_, num_blocks_;
  std::barrier<>* barrier_;
};

class TeamMachine final : public Machine {
 public:
  std::shared_ptr<void> allocate(uint64_t bytes) override {
    const auto align = std::align_val_t{kLineBytes};
    void* memory = ::operator new(bytes, align);
    std::memset(memory, 0, bytes);
    return {memory, [align](void* data) { ::operator delete(data, align); }};
  }
  void upload(void* to, const void* from, uint64_t bytes) override { std::memcpy(to, from, bytes); }

  std::shared_ptr<void> make_event() override { return nullptr; }
  void record(void*, Stream) override {}
  void wait(Stream, void*) override {}
  void synchronize(void*) override {}

  void launch(const RouteVerb& verb, Stream) override { run_alone(verb); }
  void launch(const DispatchVerb& verb, Stream) override { run_team(verb); }
  void launch(const CombineRecvVerb& verb, Stream) override { run_team(verb); }
  void launch(const PollVerb& verb, Stream) override { run_alone(verb); }
  void launch(const ReceiveVerb& verb, Stream) override { run_alone(verb); }
  void launch(const CombineSendVerb& verb, Stream) override { run_team(verb); }

 private:
  template <class V>
  static void run_alone(const V& verb) {
    TeamExec exec(0, 0, 1, nullptr);
    run(exec, verb);
  }

  template <class V>
  static void run_team(const V& verb) {
    std::vector<std::unique_ptr<std::barrier<>>> barriers;
    for (uint32_t block = 0; block < kBlocks; ++block) barriers.push_back(std::make_unique<std::barrier<>>(kThreads));
    std::vector<std::thread> threads;
    for (uint32_t i = 0; i < kBlocks * kThreads; ++i) {
      threads.emplace_back([&verb, &barriers, i] {
        TeamExec exec(i / kThreads, i % kThreads, kBlocks, barriers[i / kThreads].get());
        run(exec, verb);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

}  // namespace

std::unique_ptr<Machine> make_team_machine() { return std::make_unique<TeamMachine>(); }

}  // namespace m2n
