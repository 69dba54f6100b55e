// SPDX-License-Identifier: Apache-2.0
// A transport with faults, put around another one: a run on it must end with the same results. So far signals come
// late, as on a slow network: the rows are written at once, their signal is held back by a delay from a seed, in which
// no core is occupied.
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>

#include "core/error.h"
#include "core/peer.h"
#include "transport/choice.h"
#include "transport/host_exec.h"
#include "transport/own_thread.h"

namespace m2n {
namespace {

// splitmix64: a step of it also mixes two numbers well.
uint64_t next_random(uint64_t& state) {
  uint64_t mixed = state += 0x9E3779B97F4A7C15u;
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9u;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBu;
  return mixed ^ (mixed >> 31);
}

class Delays {
 public:
  Delays(const Faults& faults, uint64_t stream) : faults_(faults), state_(faults.seed) {
    state_ = next_random(state_) ^ stream;
  }
  int64_t next_ns() {
    const uint64_t width = static_cast<uint64_t>(faults_.jitter_ns) + 1;
    return faults_.delay_ns + static_cast<int64_t>(next_random(state_) % width);
  }

 private:
  Faults faults_;
  uint64_t state_;
};

// What sched_setattr takes; older headers of the C library and of the kernel cannot be included together.
struct SchedAttr {
  uint32_t size, policy;
  uint64_t flags;
  int32_t nice;
  uint32_t priority;
  uint64_t runtime, deadline, period;
};

// A thread that sleeps to the nanosecond and is let in at once where another one computes on its core: it is late by
// microseconds, not by the rest of a time slice. In order of preference: real time, which needs a privilege; a short
// slice, which is let in sooner, though not always at once.
void make_prompt() {
  prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
  const sched_param lowest{.sched_priority = 1};
  if (sched_setscheduler(0, SCHED_FIFO, &lowest) == 0) return;  // 0: of this thread
  SchedAttr attributes{};
  attributes.size = sizeof attributes;
  attributes.policy = SCHED_OTHER;
  attributes.nice = getpriority(PRIO_PROCESS, 0);  // as it is: of this thread
  attributes.runtime = 100'000;                    // its slice, in ns: who asks for little is let in sooner
  syscall(SYS_sched_setattr, 0, &attributes, 0);
}

class DelayedSignals final : public SignalRelay {
 public:
  DelayedSignals(const Faults& faults, uint64_t stream) : shared_(std::make_shared<Shared>(faults, stream)) {
    // It owns a share: in a forked child, which has no such thread, what it may have locked is never touched again.
    start_own_thread("m2n-faulty", [shared = shared_] { shared->run(); }).detach();
  }
  ~DelayedSignals() override {
    if (fork_count_ == fork_count()) shared_->stop();
  }

  void send(Signal* word, Signal value, WakeWord* wake) override { shared_->hold(word, value, wake); }
  void drain() override { shared_->drain(); }
  void forget(const unsigned char* memory, uint64_t num_bytes) override { shared_->forget(memory, num_bytes); }
  HeldSignals held() const override {
    return {load_relaxed(&shared_->held.count), load_relaxed(&shared_->held.total_ns)};  // relaxed: counters
  }

 private:
  struct Held {
    Signal* word;
    Signal value;
    WakeWord* wake;
    int64_t sent_ns;
  };

  struct Shared {
    Shared(const Faults& faults, uint64_t stream) : delays(faults, stream) {}

    void hold(Signal* word, Signal value, WakeWord* wake) {
      std::lock_guard lock(mutex);
      const int64_t sent_ns = now_ns();
      const auto added = by_due_ns.emplace(sent_ns + delays.next_ns(), Held{word, value, wake, sent_ns});
      if (added == by_due_ns.begin()) is_changed.notify_all();
    }

    void drain() {
      std::unique_lock lock(mutex);
      is_changed.wait(lock, [this] { return by_due_ns.empty(); });
    }

    void forget(const unsigned char* memory, uint64_t num_bytes) {
      std::lock_guard lock(mutex);  // so that nothing is being stored when this returns
      std::erase_if(by_due_ns, [&](const auto& each) {
        const auto* at = reinterpret_cast<const unsigned char*>(each.second.word);
        return at >= memory && at < memory + num_bytes;
      });
      is_changed.notify_all();
    }

    void stop() {
      std::lock_guard lock(mutex);  // so that nothing is being stored when this returns
      is_stopped = true;
      is_changed.notify_all();
    }

    void run() {
      make_prompt();
      std::unique_lock lock(mutex);
      while (!is_stopped) {
        if (by_due_ns.empty()) {
          is_changed.wait(lock);
          continue;
        }
        const int64_t due_ns = by_due_ns.begin()->first;
        if (const int64_t now = now_ns(); now >= due_ns) {
          deliver(by_due_ns.begin()->second, now);
          by_due_ns.erase(by_due_ns.begin());
          if (by_due_ns.empty()) is_changed.notify_all();
        } else {
          // steady_clock is CLOCK_MONOTONIC, as now_ns().
          is_changed.wait_until(lock, std::chrono::steady_clock::time_point(std::chrono::nanoseconds(due_ns)));
        }
      }
    }

    void deliver(const Held& one, int64_t now) {
      add_relaxed(&held.count, uint64_t{1});  // relaxed: counters
      add_relaxed(&held.total_ns, static_cast<uint64_t>(now - one.sent_ns));
      HostExec exec(nullptr);
      m2n::signal(exec, PeerView{nullptr, nullptr, one.wake}, one.word, one.value);
    }

    std::mutex mutex;
    std::condition_variable is_changed;  // an earlier signal, none left, or the end
    std::multimap<int64_t, Held> by_due_ns;
    Delays delays;
    bool is_stopped = false;
    HeldSignals held;
  };

  const uint32_t fork_count_ = fork_count();
  const std::shared_ptr<Shared> shared_;
};

class FaultyTransport final : public Transport {
 public:
  FaultyTransport(const Faults& faults, std::unique_ptr<Transport> inner) : faults_(faults), inner_(std::move(inner)) {}

  uint64_t page_bytes() const override { return inner_->page_bytes(); }
  std::shared_ptr<void> make_words(uint64_t bytes) override { return inner_->make_words(bytes); }
  std::shared_ptr<Window> make_window(uint64_t object_bytes, uint64_t stride_bytes, uint32_t max_peers) override {
    return inner_->make_window(object_bytes, stride_bytes, max_peers);
  }
  Origin origin() const override { return inner_->origin(); }
  std::shared_ptr<Mapping> attach(Handle handle, const Origin& origin) override {
    return inner_->attach(std::move(handle), origin);
  }
  std::unique_ptr<SignalRelay> make_relay(uint64_t stream) override {
    return std::make_unique<DelayedSignals>(faults_, stream);
  }

 private:
  const Faults faults_;
  const std::unique_ptr<Transport> inner_;
};

}  // namespace

std::unique_ptr<Transport> make_faulty_transport(const Choice& choice) {
  return std::make_unique<FaultyTransport>(choice.faults, make_transport(*choice.inner));
}

std::vector<int64_t> fault_delays(const std::string& name, uint64_t stream, uint32_t count) {
  Delays delays(read_choice(name).faults, stream);
  std::vector<int64_t> all_ns(count);
  for (int64_t& delay_ns : all_ns) delay_ns = delays.next_ns();
  return all_ns;
}

}  // namespace m2n
