// SPDX-License-Identifier: Apache-2.0
// The verbs on CPU threads that stand for the blocks and threads of a kernel: every line of a device comm but
// the launches themselves runs, and is tested, where there is no GPU. A launch is over when launch() returns.
#include <cstring>
#include <new>

#include "exchange/device/machines/machine.h"
#include "exchange/rows/plain_floats.h"
#include "transport/emulated_exec.h"

namespace m2n {
namespace {

constexpr uint32_t kBlocks = 3;
constexpr uint32_t kThreads = 2;  // of a block

class VerbExec : public EmulatedExec {
 public:
  explicit VerbExec(const EmulatedExec& exec) : EmulatedExec(exec) {}
  uint32_t* counts() const { return shared() + shared_words(kMaxPeers); }
};

class EmulatedMachine final : public Machine {
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
  bool is_passed(void*) override { return true; }

  void wait_words(const std::vector<WordWait>& waits, uint32_t* begun, uint32_t* passed, uint32_t ticket,
                  Stream) override {
    store_release(begun, ticket);  // SYNC: wait-begun
    for (const WordWait& wait : waits) {
      while (static_cast<int32_t>(load_seq_cst(wait.word) - wait.value) < 0) sched_yield();  // SYNC: slot-signal
    }
    store_release(passed, ticket);  // SYNC: wait-passed
  }

  void launch(const RouteVerb& verb, Stream) override { start(verb, 1); }
  void launch(const AwaitVerb& verb, Stream) override { start(verb, 1); }
  void launch(const PollVerb& verb, Stream) override { start(verb, 1); }
  void launch(const ReceiveVerb& verb, Stream) override { start(verb, 1); }
  void launch(const DispatchVerb& verb, uint32_t, uint64_t, Stream) override {
    with_types(verb, [](const auto& typed) { start(typed, kBlocks); });
  }
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
    run_emulated<VerbExec>(num_blocks, kThreads, shared_words(kMaxPeers) + kCountWords, [&verb](VerbExec& exec) {
      const PlainFloats floats;  // threads begin with those of who starts them
      run(exec, verb);
    });
  }
};

}  // namespace

std::unique_ptr<Machine> make_emulated_machine() { return std::make_unique<EmulatedMachine>(); }

}  // namespace m2n
