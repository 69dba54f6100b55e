// SPDX-License-Identifier: Apache-2.0
// What no transport between processes can beat: one copy into shared memory and a signal, and the signal alone.
#include <cstring>

#include "job.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace m2n::bench {
namespace {

void copy_regular(unsigned char* to, const unsigned char* from, uint64_t bytes) { std::memcpy(to, from, bytes); }

#if defined(__x86_64__)
void copy_non_temporal(unsigned char* to, const unsigned char* from, uint64_t bytes) {
  for (uint64_t i = 0; i + 64 <= bytes; i += 64) {
    for (uint64_t j = i; j < i + 64; j += sizeof(__m128i)) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + j), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j)));
    }
  }
  std::memcpy(to + bytes / 64 * 64, from + bytes / 64 * 64, bytes % 64);
}
#endif

// Per (attention, expert) pair: a landing place each way and a signal each way.
class Limit final : public Contender {
 public:
  using Copy = void (*)(unsigned char*, const unsigned char*, uint64_t);

  Limit(const Job& job, Board& board, const std::string& name, Copy copy)
      : traffic_(job.traffic), board_(board), copy_(copy) {
    const Case& options = job.options;
    const uint64_t num_links = uint64_t{options.num_attention} * options.num_expert;
    // A landing place holds what a pair can send at most.
    const uint64_t rows = uint64_t{options.num_tokens} * traffic_.row_bytes;
    const uint64_t num_replies =
        options.num_tokens * (options.shape.reduce_at == ReduceAt::kExpert ? 1 : options.shape.top_k);
    dispatch_bytes_ = round_up(rows, 4096);
    combine_bytes_ = round_up(num_replies * traffic_.reply_row_bytes, 4096);
    const auto map = [&](const char* what, uint64_t bytes) {
      return static_cast<unsigned char*>(map_shared(options, name + what, bytes));
    };
    dispatch_ = map(".dispatch", num_links * dispatch_bytes_);
    combine_ = map(".combine", num_links * combine_bytes_);
    signals_ = map(".signals", num_links * 2 * kLineBytes);
  }

  void dispatch_send(const unsigned char* x) override {
    ++seq_;
    uint32_t first_row = 0;
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      if (moves_rows()) gather_rows(traffic_, x, first_row, traffic_.rows[peer], landing(peer, false), copy_);
      first_row += traffic_.rows[peer];
      ring(peer, 0);
    }
  }
  void combine_recv(unsigned char*) override { wait_all(1); }
  const unsigned char* replies_from(uint32_t peer) override { return moves_rows() ? landing(peer, true) : nullptr; }
  bool moves_rows() const override { return copy_ != nullptr; }
  void dispatch_recv() override {
    ++seq_;
    wait_all(0);
  }
  const unsigned char* rows_from(uint32_t peer) override { return landing(peer, false); }
  void combine_send(const unsigned char* y) override {
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      const uint64_t bytes = traffic_.reply_rows[peer] * traffic_.reply_row_bytes;
      if (moves_rows()) copy_(landing(peer, true), y, bytes);
      y += bytes;
      ring(peer, 1);
    }
  }

 private:
  uint64_t link(uint32_t peer) const {
    const uint32_t attention = traffic_.is_attention() ? traffic_.rank() : peer;
    const uint32_t expert = traffic_.is_attention() ? peer : traffic_.rank();
    return uint64_t{attention} * traffic_.num_expert + expert;
  }
  unsigned char* landing(uint32_t peer, bool is_reply) const {
    return is_reply ? combine_ + link(peer) * combine_bytes_ : dispatch_ + link(peer) * dispatch_bytes_;
  }
  uint64_t* signal(uint32_t peer, int direction) const {
    return reinterpret_cast<uint64_t*>(signals_ + (link(peer) * 2 + static_cast<uint64_t>(direction)) * kLineBytes);
  }
  void ring(uint32_t peer, int direction) {
#if defined(__x86_64__)
    if (copy_ == copy_non_temporal) _mm_sfence();  // such stores do not wait for their turn
#endif
    store_release(signal(peer, direction), seq_);  // SYNC: limit-signal
  }
  void wait_all(int direction) {
    for (uint32_t peer = 0; peer < traffic_.num_peers(); ++peer) {
      board_.wait([&] { return load_acquire(signal(peer, direction)) == seq_; });  // SYNC: limit-signal
    }
  }

  const Traffic& traffic_;
  Board& board_;
  const Copy copy_;
  uint64_t dispatch_bytes_, combine_bytes_;
  unsigned char *dispatch_, *combine_, *signals_;
  uint64_t seq_ = 0;
};

}  // namespace

std::unique_ptr<Contender> make_limit(const Job& job, Board& board, const std::string& name) {
  if (name == "hop") return std::make_unique<Limit>(job, board, name, nullptr);
  if (name == "memcpy") return std::make_unique<Limit>(job, board, name, copy_regular);
#if defined(__x86_64__)
  if (name == "non-temporal") return std::make_unique<Limit>(job, board, name, copy_non_temporal);
#endif
  throw std::runtime_error("no contender " + name + " on this machine");
}

}  // namespace m2n::bench
