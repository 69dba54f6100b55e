// SPDX-License-Identifier: Apache-2.0
// Exchanges of an attention and an expert rank that one thread drives in turn, to be counted by callgrind: see
// instructions.py. It compiles against trees whose headers lie in rooms, and against older ones.
//
// Usage: instructions TOKENS HIDDEN EXCHANGES
#include <sys/socket.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#if __has_include("exchange/host/expert.h")
#include "exchange/host/attention.h"
#include "exchange/host/expert.h"
#else
#include "exchange/attention.h"
#include "exchange/expert.h"
#endif

using namespace m2n;

namespace {

constexpr uint32_t kTopK = 2, kNumExperts = 4;

struct Pair {
  Shape shape;
  std::shared_ptr<AttentionComm> attention;
  std::shared_ptr<ExpertComm> expert;
  std::shared_ptr<const Route> route;
  std::vector<float> x, y, sums;

  explicit Pair(uint32_t num_tokens, uint32_t hidden)
      : shape{hidden, kNumExperts, kTopK, num_tokens, 1, DType::kFloat32, DType::kFloat32},
        attention(std::make_shared<AttentionComm>(shape, 0, 4, "shm")),
        expert(std::make_shared<ExpertComm>(shape, 0, 4, "shm", std::vector<uint32_t>{0, 1, 2, 3})),
        x(size_t{num_tokens} * hidden, 1.0f),
        y(x.size() * kTopK, 1.0f),
        sums(x.size()) {
    Comm::Offer of_attention = attention->offer(0, 1), of_expert = expert->offer(0, 1);
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) std::abort();
    attention->attach(of_attention.peer_idx, std::move(of_expert.handles), of_expert.origin);
    expert->attach(of_expert.peer_idx, std::move(of_attention.handles), of_attention.origin);
    attention->watch(of_attention.peer_idx, ends[0], -1);
    expert->watch(of_expert.peer_idx, ends[1], -1);
    std::vector<int32_t> ids;
    for (uint32_t i = 0; i < num_tokens * kTopK; ++i)
      ids.push_back(static_cast<int32_t>((i / kTopK + i) % kNumExperts));
    const std::vector<float> weights(ids.size(), 0.5f);
    auto made = std::make_shared<Route>(shape);
    made->prepare(num_tokens, 1);
    made->build_from_topk(ids.data(), weights.data(), {0, 1, 2, 3, 4}, {0, 0, 0, 0}, 0);
    route = std::move(made);
  }
};

}  // namespace

// What callgrind counts: by this name.
extern "C" __attribute__((noinline)) void exchange(Pair& pair, uint32_t num_exchanges) {
  const auto bytes = [](std::vector<float>& rows) { return reinterpret_cast<unsigned char*>(rows.data()); };
  const uint64_t row_bytes = pair.shape.hidden * sizeof(float);
  const int64_t deadline_ns = int64_t{1} << 62;
  for (uint32_t i = 0; i < num_exchanges; ++i) {
    pair.attention->dispatch_send(bytes(pair.x), row_bytes, DType::kFloat32, pair.route, 0, i, deadline_ns);
    const std::shared_ptr<Batch> batch = pair.expert->dispatch_recv(Wanted{}, deadline_ns);
    pair.expert->combine_send(*batch, bytes(pair.y), row_bytes, DType::kFloat32, false);
    pair.attention->combine_recv(bytes(pair.sums), row_bytes, 0, deadline_ns);
  }
}

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const auto number = [&](int i) { return static_cast<uint32_t>(std::strtoul(argv[i], nullptr, 10)); };
  Pair pair(number(1), number(2));
  exchange(pair, number(3));
  pair.attention->close();
  pair.expert->close();
}
