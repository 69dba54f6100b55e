// SPDX-License-Identifier: Apache-2.0
// What the processes of one run share: the case, the board they meet at, and the traffic between them.
#pragma once

#include <sched.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "contender.h"
#include "core/atomic.h"
#include "exchange/host/attention.h"
#include "transport/host_exec.h"

namespace m2n::bench {

// As the command line has written it, in a folder in memory: `case.txt` (lines "key value", one for each contender) and
// `topk.i32`, the expert ids int32 [M][T][top_k].
struct Case {
  std::string folder;
  uint32_t num_attention = 1;
  uint32_t num_expert = 1;
  uint32_t num_tokens = 1;
  uint32_t x_stride_rows = 1;  // 2: every other row of x is somebody else's
  Shape shape;
  std::string transport = "shm";
  std::string ucx_transport;  // of "m2n-ucx"
  double seconds = 1;
  uint32_t max_rounds = 20000;
  int64_t deadline_ns = 20'000'000'000;  // of one wait
  std::vector<int> cores;                // by process; empty: not pinned, oversubscribed
  std::vector<std::string> contenders;   // a name, or "name=plug-in"

  uint32_t num_processes() const { return num_attention + num_expert; }
};

Case read_case(const std::string& folder);

// The words all processes see, each alone on its line. Processes are numbered attention ranks first.
class Board {
 public:
  Board(const Case& job, uint32_t process);

  // Everybody gets here before anybody goes on.
  void meet();
  void stamp(int64_t now_ns) { store_relaxed(start_of(process_), now_ns); }  // published by what is sent next
  // The earliest stamp of the peers that `has_rows` names, in ns.
  int64_t first_start(const Traffic& traffic, const std::vector<uint32_t>& rows) const;

  // The last round, set by process 0 before it comes to a meeting.
  void set_last_round(int64_t round) { store_relaxed(word(0), round); }
  int64_t last_round() const { return load_relaxed(word(0)); }
  void fail() { store_release(word(1), int64_t{1}); }  // SYNC: board-failed

  // Pauses; where processes share cores, also yields: a spin would hold the core that the other one needs.
  template <class Ready>
  void wait(Ready&& ready) {
    for (uint64_t i = 0; !ready(); ++i) {
      if (i % 1024 == 1023) require_going();
      if (is_oversubscribed_ && i >= 100) {
        sched_yield();
      } else {
        pause();
      }
    }
    began_ns_ = 0;
  }

 private:
  int64_t* word(uint32_t line) const { return words_ + line * (kLineBytes / sizeof(int64_t)); }
  int64_t* arrived_of(uint32_t process) const { return word(2 + process); }
  int64_t* start_of(uint32_t process) const { return word(2 + num_processes_ + process); }
  void require_going();
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  int64_t* words_;
  const uint32_t num_processes_;
  const uint32_t process_;
  const bool is_oversubscribed_;
  const int64_t deadline_ns_;
  int64_t began_ns_ = 0;
  int64_t meeting_ = 0;
};

// Memory that all processes of the run map under one name.
void* map_shared(const Case& job, const std::string& name, uint64_t bytes);
Services make_services(const Case& job, Board& board);

struct Job {
  Case options;
  Traffic traffic;
  std::vector<std::shared_ptr<Route>> routes;  // by attention rank
};
Job make_job(const Case& options, uint32_t process);
// The expert ids that an expert rank hosts: equal blocks, as Placement.block.
std::vector<uint32_t> experts_of(const Case& job, uint32_t expert_rank);

// y of the attention rank: the sum of the replies, by the arithmetic of combine_recv.
void sum_replies(const Job& job, Contender& contender, unsigned char* y);

// Known by name: m2n, m2n-pack, m2n-tcp, m2n-ucx, memcpy, non-temporal, hop, socket; else a plug-in.
std::unique_ptr<Contender> make_contender(const Job& job, Board& board, const std::string& name);
std::unique_ptr<Contender> make_m2n(const Job& job, const std::string& name);
std::unique_ptr<Contender> make_socket(const Job& job, Board& board);
std::unique_ptr<Contender> make_limit(const Job& job, Board& board, const std::string& name);

}  // namespace m2n::bench
