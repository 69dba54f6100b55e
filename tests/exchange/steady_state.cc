// SPDX-License-Identifier: Apache-2.0
// What the four verbs ask of the system once everything is warm: allocations, counted in malloc, and system calls,
// counted by the parent, which traces. test_steady_state.py compiles it.
//
// Phase "alone": one thread makes all four verbs in turn, so that nothing ever waits or sleeps. Phase "apart": an
// attention and an expert rank on a thread each, which wait for each other, now and then so long that they sleep. With
// the argument "mistake" one verb does what it must not, and the counts must show it. Lines on stdout: "PHASE VERB WHAT
// COUNT".
#include <execinfo.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "exchange/host/attention.h"
#include "exchange/host/expert.h"

namespace {

using namespace m2n;

constexpr uint32_t kWarmUp = 50, kRounds = 1000;
constexpr uint32_t kLateEvery = 100;  // rounds; then the other side falls asleep
constexpr useconds_t kLateUs = 20'000;
constexpr int kCannotTrace = 3;  // exit status

enum Verb : uint32_t { kDispatchSend, kDispatchRecv, kCombineSend, kCombineRecv, kClock, kNumVerbs, kNoVerb = 99 };
constexpr const char* kVerbNames[] = {"dispatch_send", "dispatch_recv", "combine_send", "combine_recv", "clock"};
enum Phase : uint32_t { kAlone, kApart, kNumPhases };
constexpr const char* kPhaseNames[] = {"alone", "apart"};

// What the traced child tells its tracer.
struct Shared {
  std::atomic<uint32_t> phase;
  std::atomic<bool> is_warm;
  struct {
    std::atomic<pid_t> thread;
    std::atomic<uint32_t> verb;
  } role[2];  // attention, expert
  std::atomic<uint64_t> allocations[kNumPhases][kNumVerbs];
};
Shared* shared = nullptr;
std::atomic<int> num_traces_left{8};
thread_local uint32_t own_verb = kNoVerb;

void note_allocation() {
  const uint32_t verb = own_verb;
  if (verb == kNoVerb || !shared->is_warm) return;
  shared->allocations[shared->phase][verb] += 1;
  if (num_traces_left.fetch_sub(1) <= 0) return;
  own_verb = kNoVerb;  // what is done here is not counted
  void* frames[16];
  std::fprintf(stderr, "an allocation in %s:\n", kVerbNames[verb]);
  backtrace_symbols_fd(frames, backtrace(frames, 16), STDERR_FILENO);
  own_verb = verb;
}

// Counted while it lives.
class In {
 public:
  In(uint32_t role, Verb verb) : role_(role) {
    own_verb = verb;
    shared->role[role].verb = verb;
  }
  ~In() {
    shared->role[role_].verb = kNoVerb;
    own_verb = kNoVerb;
  }

 private:
  uint32_t role_;
};

[[noreturn]] void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

// An attention and an expert rank, linked.
class Pair {
 public:
  Pair(ReduceAt reduce_at, bool is_reduced, bool has_mistake) : is_reduced_(is_reduced), has_mistake_(has_mistake) {
    // The longest messages, 64 KB, are some of those that write_choice.h times.
    shape_ = {512, 4, 2, 32, 2, DType::kFloat32, DType::kFloat32, reduce_at};
    attention_ = std::make_shared<AttentionComm>(shape_, 0, 4, "shm");
    expert_ = std::make_shared<ExpertComm>(shape_, 0, 4, "shm", std::vector<uint32_t>{0, 1, 2, 3});
    Comm::Offer of_attention = attention_->offer(0, 1), of_expert = expert_->offer(0, 1);
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) fail("socketpair");
    attention_->attach(of_attention.peer_idx, std::move(of_expert.handles), of_expert.origin);
    expert_->attach(of_expert.peer_idx, std::move(of_attention.handles), of_attention.origin);
    attention_->watch(of_attention.peer_idx, ends[0], -1);
    expert_->watch(of_expert.peer_idx, ends[1], -1);
    x_.resize(size_t{shape_.max_tokens} * shape_.hidden);
    sums_.resize(x_.size());
    y_.resize(size_t{shape_.max_tokens} * shape_.top_k * shape_.hidden);
    for (const uint32_t num_tokens : {1u, 9u, shape_.max_tokens}) add_route(num_tokens);
  }
  ~Pair() {
    attention_->close();
    expert_->close();
  }

  void attention_sends(uint32_t round) {
    std::shared_ptr<const Route> route = routes_[round % routes_.size()];
    const In in(0, kDispatchSend);
    attention_->dispatch_send(bytes(x_), row_bytes(), DType::kFloat32, std::move(route), round % 2, round,
                              deadline_ns_);
  }
  void expert_receives() {
    const In in(1, kDispatchRecv);
    batch_ = expert_->dispatch_recv(wanted_, deadline_ns_);
    if (batch_ == nullptr) fail("no batch");
  }
  void expert_sends() {
    const In in(1, kCombineSend);
    if (has_mistake_) {
      std::vector<Shape>(1, shape_).swap(shape_copy_);
      syscall(SYS_getppid);
    }
    expert_->combine_send(*batch_, bytes(y_), row_bytes(), DType::kFloat32, is_reduced_);
    batch_.reset();
  }
  void attention_receives(uint32_t round) {
    const In in(0, kCombineRecv);
    attention_->combine_recv(bytes(sums_), row_bytes(), round % 2, deadline_ns_);
  }

 private:
  static unsigned char* bytes(std::vector<float>& rows) { return reinterpret_cast<unsigned char*>(rows.data()); }
  uint64_t row_bytes() const { return shape_.hidden * sizeof(float); }

  void add_route(uint32_t num_tokens) {
    std::vector<int32_t> ids;
    for (uint32_t i = 0; i < num_tokens; ++i) {
      ids.push_back(static_cast<int32_t>(i % 4));
      ids.push_back(static_cast<int32_t>((i + 1) % 4));
    }
    auto route = std::make_shared<Route>(shape_);
    route->prepare(num_tokens, 1);
    const std::vector<float> weights(ids.size(), 0.5f);
    route->build_from_topk(ids.data(), weights.data(), {0, 1, 2, 3, 4}, {0, 0, 0, 0}, 0);
    routes_.push_back(std::move(route));
  }

  const bool is_reduced_, has_mistake_;
  Shape shape_;
  std::shared_ptr<AttentionComm> attention_;
  std::shared_ptr<ExpertComm> expert_;
  std::vector<std::shared_ptr<const Route>> routes_;
  std::vector<float> x_, y_, sums_;
  std::vector<Shape> shape_copy_;
  std::shared_ptr<Batch> batch_;
  const Wanted wanted_{};
  const int64_t deadline_ns_ = now_ns() + 100'000'000'000;
};

pid_t own_thread() { return static_cast<pid_t>(syscall(SYS_gettid)); }

// One thread in both roles: each verb finds what it needs.
void run_alone(Pair& pair) {
  for (auto& role : shared->role) role.thread = own_thread();
  for (uint32_t round = 0; round < kWarmUp + kRounds; ++round) {
    shared->is_warm = round >= kWarmUp;
    pair.attention_sends(round);
    pair.expert_receives();
    pair.expert_sends();
    pair.attention_receives(round);
    const In in(0, kClock);  // a machine may have no clock without a system call
    now_ns();
  }
}

void run_apart(Pair& pair) {
  shared->phase = kApart;
  shared->is_warm = false;
  std::thread expert([&] {
    shared->role[1].thread = own_thread();
    for (uint32_t round = 0; round < kWarmUp + kRounds; ++round) {
      pair.expert_receives();
      if (round % kLateEvery == 0) usleep(kLateUs);
      pair.expert_sends();
    }
  });
  for (uint32_t round = 0; round < kWarmUp + kRounds; ++round) {
    if (round % kLateEvery == kLateEvery / 2) usleep(kLateUs);
    pair.attention_sends(round);
    pair.attention_receives(round);
    if (round + 1 == kWarmUp) shared->is_warm = true;
  }
  expert.join();
}

const char* name_of(uint64_t number) {
  return number == SYS_sched_yield     ? "sched_yield"
         : number == SYS_futex         ? "futex"
         : number == SYS_clock_gettime ? "clock_gettime"
                                       : nullptr;
}

// Traces the child to its end; by (phase, verb, number of the system call).
std::map<std::array<uint64_t, 3>, uint64_t> trace(pid_t child, int* status) {
  std::map<std::array<uint64_t, 3>, uint64_t> counts;
  if (waitpid(child, status, 0) != child || !WIFSTOPPED(*status)) std::exit(kCannotTrace);
  const long options = PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE | PTRACE_O_EXITKILL;
  if (ptrace(PTRACE_SETOPTIONS, child, nullptr, options) != 0) std::exit(kCannotTrace);
  ptrace(PTRACE_SYSCALL, child, nullptr, 0);
  while (true) {
    const pid_t thread = waitpid(-1, status, __WALL);
    if (thread < 0) std::exit(kCannotTrace);
    if (WIFEXITED(*status) || WIFSIGNALED(*status)) {
      if (thread == child) return counts;
      continue;
    }
    long signal = 0;
    if (WSTOPSIG(*status) == (SIGTRAP | 0x80)) {
      __ptrace_syscall_info info{};
      ptrace(PTRACE_GET_SYSCALL_INFO, thread, sizeof info, &info);
      for (auto& role : shared->role) {
        const uint32_t verb = role.verb;
        if (info.op != PTRACE_SYSCALL_INFO_ENTRY || role.thread != thread) continue;
        if (verb == kNoVerb || !shared->is_warm) continue;
        ++counts[{shared->phase, verb, info.entry.nr}];
      }
    } else if (WSTOPSIG(*status) != SIGTRAP && WSTOPSIG(*status) != SIGSTOP) {
      signal = WSTOPSIG(*status);
    }
    ptrace(PTRACE_SYSCALL, thread, nullptr, signal);
  }
}

int run_child(ReduceAt reduce_at, bool is_reduced, bool has_mistake) {
  if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) return kCannotTrace;
  raise(SIGSTOP);
  void* frames[4];
  backtrace(frames, 4);  // its first call allocates
  Pair pair(reduce_at, is_reduced, has_mistake);
  run_alone(pair);
  for (uint32_t verb = 0; verb < kNumVerbs - 1; ++verb) {
    std::printf("alone %s allocations %lu\n", kVerbNames[verb], shared->allocations[kAlone][verb].load());
  }
  run_apart(pair);
  for (uint32_t verb = 0; verb < kNumVerbs - 1; ++verb) {
    std::printf("apart %s allocations %lu\n", kVerbNames[verb], shared->allocations[kApart][verb].load());
  }
  std::fflush(stdout);
  return 0;
}

}  // namespace

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

void* malloc(size_t bytes) { return note_allocation(), __libc_malloc(bytes); }
void* calloc(size_t count, size_t bytes) { return note_allocation(), __libc_calloc(count, bytes); }
void* realloc(void* data, size_t bytes) { return note_allocation(), __libc_realloc(data, bytes); }
void* aligned_alloc(size_t align, size_t bytes) { return note_allocation(), __libc_memalign(align, bytes); }
}

// Arguments: expert or attention (where sums are made), reduced or pairs (what the expert rank sends), and "mistake".
int main(int argc, char** argv) {
  if (argc < 3) return std::fputs("usage: steady_state expert|attention reduced|pairs [mistake]\n", stderr), 2;
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("mmap");
  shared = new (memory) Shared{};
  for (auto& role : shared->role) role.verb = kNoVerb;
  const pid_t child = fork();
  if (child < 0) fail("fork");
  if (child == 0) {
    const bool is_at_expert = std::strcmp(argv[1], "expert") == 0;
    _exit(run_child(is_at_expert ? ReduceAt::kExpert : ReduceAt::kAttention, std::strcmp(argv[2], "reduced") == 0,
                    argc > 3));
  }
  int status = 0;
  for (const auto& [key, count] : trace(child, &status)) {
    const char* name = name_of(key[2]);
    const std::string number = "syscall_" + std::to_string(key[2]);
    std::printf("%s %s %s %lu\n", kPhaseNames[key[0]], kVerbNames[key[1]], name != nullptr ? name : number.c_str(),
                count);
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
