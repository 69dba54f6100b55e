// SPDX-License-Identifier: Apache-2.0
// The ranks of one run at the C++ boundary: `m2n_ranks FOLDER` starts all of them, `m2n_ranks FOLDER PROCESS` is one
// (mpirun's number stands for PROCESS where it is "mpi").
//
// In every round each contender has one exchange, so that all of them meet the same moments of the machine. One timing
// boundary for all: the clock (CLOCK_MONOTONIC) is read before the call that sends, and when the receiver has read a
// word of every line of the rows (dispatch), or has their sum in y (combine). Samples in us go to
// FOLDER/<contender>.<direction>.<process>, as doubles.
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "job.h"

namespace m2n::bench {
namespace {

uint64_t read_lines(const unsigned char* bytes, uint64_t num_bytes) {
  constexpr uint64_t kCacheLine = 64;  // kLineBytes are two of them
  uint64_t sum = 0;
  for (uint64_t i = 0; i < num_bytes; i += kCacheLine) {
    sum += load_relaxed(reinterpret_cast<const uint64_t*>(bytes + i));  // relaxed: only to touch the line
  }
  return sum;
}

struct Entry {
  std::string name;
  std::unique_ptr<Contender> contender;
  std::vector<double> one_way_us, roundtrip_us;
};

// Small whole numbers: exact in every dtype, also as sums.
float value_of(uint32_t token) { return static_cast<float>(token % 13 + 1); }

void fill_row(DType dtype, unsigned char* row, uint32_t hidden, float value) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    for (uint32_t h = 0; h < hidden; ++h) reinterpret_cast<T*>(row)[h] = from_float<T>(value);
  });
}

class Rank {
 public:
  Rank(const Case& options, uint32_t process)
      : job_(make_job(options, process)), traffic_(job_.traffic), board_(options, process) {
    if (!options.cores.empty()) {
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(options.cores.at(process), &set);
      sched_setaffinity(0, sizeof set, &set);
    }
    uint64_t num_replies = 0;
    for (uint32_t rows : traffic_.reply_rows) num_replies += rows;
    for (uint32_t rows : traffic_.rows) has_rows_ |= rows != 0;
    x_.resize(options.num_tokens * traffic_.x_stride_bytes);
    y_.resize(std::max<uint64_t>(num_replies, options.num_tokens) * traffic_.reply_row_bytes);
    for (const std::string& name : options.contenders) {
      entries_.push_back({name.substr(0, name.find('=')), make_contender(job_, board_, name), {}, {}});
    }
  }

  void run() {
    prove();
    const int64_t end_ns = now_ns() + static_cast<int64_t>(job_.options.seconds * 1e9);
    board_.set_last_round(job_.options.max_rounds - 1);
    for (int64_t round = 0;; ++round) {
      for (Entry& entry : entries_) {
        if (traffic_.process == 0 && round > 1 && now_ns() > end_ns) board_.set_last_round(last_round(round, entry));
        if (traffic_.is_attention()) std::memset(x_.data(), static_cast<int>(round % 64), x_.size());  // fresh rows
        board_.meet();
        if (round > board_.last_round()) return write();
        traffic_.is_attention() ? attention(entry) : expert(entry);
        entry.contender->settle();
      }
    }
  }

  void fail() { board_.fail(); }

 private:
  // Everybody ends after the same exchange: at the next round's first one.
  int64_t last_round(int64_t round, const Entry& entry) const {
    return &entry == &entries_.front() ? round - 1 : round;
  }

  void attention(Entry& entry) {
    Contender& contender = *entry.contender;
    const int64_t began_ns = now_ns();
    board_.stamp(began_ns);
    contender.dispatch_send(x_.data());
    contender.combine_recv(y_.data());
    if (contender.replies_from(0) != nullptr) sum_replies(job_, contender, y_.data());
    const int64_t ended_ns = now_ns();
    if (!has_rows_) return;
    entry.roundtrip_us.push_back(static_cast<double>(ended_ns - began_ns) / 1e3);
    entry.one_way_us.push_back(static_cast<double>(ended_ns - board_.first_start(traffic_, traffic_.reply_rows)) / 1e3);
  }

  void expert(Entry& entry) {
    Contender& contender = *entry.contender;
    contender.dispatch_recv();
    for (uint32_t peer = 0; peer < traffic_.num_peers() && contender.moves_rows(); ++peer) {
      sum_ += read_lines(contender.rows_from(peer), traffic_.rows[peer] * traffic_.row_bytes);
    }
    const int64_t read_ns = now_ns();
    board_.stamp(read_ns);
    if (has_rows_) {
      const int64_t began_ns = board_.first_start(traffic_, traffic_.rows);
      entry.one_way_us.push_back(static_cast<double>(read_ns - began_ns) / 1e3);
    }
    contender.combine_send(y_.data());
  }

  // Each contender shows once that rows come through: the expert ranks echo them, and y must be their sum.
  void prove() {
    const Shape& shape = job_.options.shape;
    for (uint32_t token = 0; token < job_.options.num_tokens && traffic_.is_attention(); ++token) {
      fill_row(shape.dispatch_dtype, x_.data() + token * traffic_.x_stride_bytes, shape.hidden, value_of(token));
    }
    for (Entry& entry : entries_) {
      board_.meet();
      if (!traffic_.is_attention()) {
        entry.contender->dispatch_recv();
        echo(*entry.contender);
        entry.contender->combine_send(y_.data());
      } else {
        std::memset(y_.data(), 0xFF, y_.size());
        entry.contender->dispatch_send(x_.data());
        entry.contender->combine_recv(y_.data());
        if (entry.contender->moves_rows()) check_sums(entry);
      }
      entry.contender->settle();
    }
  }

  // y: every reply row holds what came with the row it answers.
  void echo(Contender& contender) {
    if (!contender.moves_rows() || job_.options.shape.reduce_at == ReduceAt::kAttention) return;
    unsigned char* to = y_.data();
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      const uint64_t bytes = traffic_.rows[peer] * traffic_.row_bytes;
      std::memcpy(to, contender.rows_from(peer), bytes);
      to += bytes;
    }
  }

  void check_sums(Entry& entry) {
    if (entry.contender->replies_from(0) != nullptr) sum_replies(job_, *entry.contender, y_.data());
    const Shape& shape = job_.options.shape;
    if (shape.reduce_at == ReduceAt::kAttention)
      return;  // there pairs are answered in an order of each contender's own
    const RouteView& route = job_.routes[traffic_.rank()]->view();
    std::vector<unsigned char> expected(traffic_.reply_row_bytes);
    for (uint32_t token = 0; token < route.num_tokens; ++token) {
      uint32_t num_ranks = 0;
      for (uint32_t k = 0; k < shape.top_k; ++k) num_ranks += route.source_rank[token * shape.top_k + k] != kNone;
      fill_row(shape.combine_dtype, expected.data(), shape.hidden, value_of(token) * static_cast<float>(num_ranks));
      if (std::memcmp(expected.data(), y_.data() + token * traffic_.reply_row_bytes, expected.size()) != 0) {
        throw std::runtime_error(entry.name + ": token " + std::to_string(token) + " came back wrong");
      }
    }
  }

  void write() {
    for (const Entry& entry : entries_) {
      save(entry, traffic_.is_attention() ? "combine" : "dispatch", entry.one_way_us);
      if (traffic_.is_attention()) save(entry, "roundtrip", entry.roundtrip_us);
    }
    if (sum_ == 1) std::fputs("", stdout);  // keeps the reads alive
  }

  void save(const Entry& entry, const char* direction, const std::vector<double>& samples) {
    const std::string name = entry.name + "." + direction + "." + std::to_string(traffic_.process);
    std::ofstream(job_.options.folder + "/" + name, std::ios::binary)
        .write(reinterpret_cast<const char*>(samples.data()),
               static_cast<std::streamsize>(samples.size() * sizeof(double)));
  }

  Job job_;
  const Traffic& traffic_;
  Board board_;
  std::vector<Entry> entries_;
  std::vector<unsigned char> x_, y_;
  bool has_rows_ = false;  // else this rank waits for nothing, and has no times
  uint64_t sum_ = 0;
};

int run_rank(const Case& options, uint32_t process) {
  std::unique_ptr<Rank> rank;
  try {
    rank = std::make_unique<Rank>(options, process);
    rank->run();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "process %u: %s\n", process, error.what());
    Board(options, process).fail();
    return 1;
  }
}

int run_all(const Case& options) {
  std::vector<pid_t> children;
  for (uint32_t process = 0; process < options.num_processes(); ++process) {
    const pid_t child = fork();
    if (child < 0) std::perror("fork");
    if (child <= 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      _exit(child < 0 ? 1 : run_rank(options, process));
    }
    children.push_back(child);
  }
  int result = 0;
  for (size_t i = 0; i < children.size(); ++i) {
    int status = 0;
    waitpid(-1, &status, 0);  // whoever ends first
    if (status == 0) continue;
    Board(options, 0).fail();
    result = 1;
  }
  return result;
}

}  // namespace
}  // namespace m2n::bench

int main(int argc, char** argv) {
  using namespace m2n::bench;
  if (argc < 2) return std::fputs("usage: m2n_ranks FOLDER [PROCESS | mpi]\n", stderr), 2;
  try {
    const Case options = read_case(argv[1]);
    if (argc == 2) return run_all(options);
    std::string process = argv[2];
    for (const char* name : {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"}) {
      if (process == "mpi" && std::getenv(name) != nullptr) process = std::getenv(name);
    }
    return run_rank(options, static_cast<uint32_t>(std::stoul(process)));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "m2n_ranks: %s\n", error.what());
    return 1;
  }
}
