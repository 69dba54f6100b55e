// SPDX-License-Identifier: Apache-2.0
// What one GPU allows, in one run: the hop of a signal between two kernels, launches, copies, and the four verbs
// between two ranks of one process. Prints lines of JSON. Usage: m2n_gpu_timing [ROUNDS]
#include <sys/socket.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

#include "exchange/device_attention.h"
#include "exchange/device_expert.h"
#include "transport/cuda_api.h"

namespace {

using namespace m2n;

constexpr int64_t kDeadlineNs = 10'000'000'000;

void print(const std::string& name, uint64_t bytes, std::vector<double> us) {
  std::sort(us.begin(), us.end());
  const auto at = [&](double share) { return us[static_cast<size_t>(share * static_cast<double>(us.size() - 1))]; };
  std::printf("{\"name\": \"%s\", \"bytes\": %llu, \"samples\": %zu, \"p50_us\": %.3f, \"p99_us\": %.3f}\n",
              name.c_str(), static_cast<unsigned long long>(bytes), us.size(), at(0.5), at(0.99));
  std::fflush(stdout);
}

double us_since(int64_t began_ns) { return static_cast<double>(now_ns() - began_ns) / 1e3; }

class Timer {
 public:
  Timer() {
    check_cuda(cudaEventCreate(&begin_), "cudaEventCreate");
    check_cuda(cudaEventCreate(&end_), "cudaEventCreate");
  }
  void begin(cudaStream_t stream) { check_cuda(cudaEventRecord(begin_, stream), "cudaEventRecord"); }
  void end(cudaStream_t stream) { check_cuda(cudaEventRecord(end_, stream), "cudaEventRecord"); }
  double us() {
    float ms = 0;
    check_cuda(cudaEventSynchronize(end_), "a kernel failed");
    check_cuda(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
    return 1e3 * ms;
  }

 private:
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

__global__ void empty_kernel() {}

// Each of two kernels waits for the other's signal and answers it; gives up after a second.
__global__ void bounce(Signal* own, Signal* peer, uint32_t rounds, bool is_first, int64_t* took_ns) {
  const auto now = [] {
    int64_t ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    return ns;
  };
  int64_t began_ns = now();
  for (uint32_t seq = 1; seq <= rounds; ++seq) {
    if (is_first) store_signal(peer, make_signal(0, seq));  // SYNC: slot-signal
    while (signal_seq(poll_signal(own)) != seq) {
      if (now() - began_ns > 1'000'000'000) return;
    }
    if (!is_first) store_signal(peer, make_signal(0, seq));  // SYNC: slot-signal
    if (seq == rounds / 10) began_ns = now();                // the first tenth warms up
  }
  *took_ns = now() - began_ns;
}

struct Streams {
  cudaStream_t attention = nullptr, expert = nullptr;
  Streams() {
    check_cuda(cudaStreamCreateWithFlags(&attention, cudaStreamNonBlocking), "cudaStreamCreate");
    check_cuda(cudaStreamCreateWithFlags(&expert, cudaStreamNonBlocking), "cudaStreamCreate");
  }
};

void time_signal(Machine& machine, const Streams& streams, uint32_t repeats) {
  constexpr uint32_t kRounds = 10'000;
  std::vector<double> us;
  for (uint32_t i = 0; i < repeats; ++i) {
    const auto memory = machine.allocate(4 * kLineBytes);
    auto* first = static_cast<Signal*>(memory.get());
    Signal* second = first + kLineBytes / sizeof(Signal);
    auto* took_ns = reinterpret_cast<int64_t*>(first + 2 * kLineBytes / sizeof(Signal));
    bounce<<<1, 1, 0, streams.attention>>>(first, second, kRounds, true, took_ns);
    bounce<<<1, 1, 0, streams.expert>>>(second, first, kRounds, false, took_ns + 1);
    check_cuda(cudaStreamSynchronize(streams.attention), "the signal kernel failed");
    check_cuda(cudaStreamSynchronize(streams.expert), "the signal kernel failed");
    int64_t host_ns = 0;
    copy_now(&host_ns, took_ns, sizeof host_ns);
    if (host_ns > 0) us.push_back(static_cast<double>(host_ns) / 1e3 / (2.0 * 0.9 * kRounds));
  }
  if (!us.empty()) print("signal, one way, two kernels of one device", sizeof(Signal), us);
}

void time_launches(const Streams& streams, uint32_t rounds) {
  std::vector<double> launch_us, launch_and_wait_us;
  for (uint32_t i = 0; i < rounds; ++i) {
    int64_t began_ns = now_ns();
    empty_kernel<<<1, 32, 0, streams.attention>>>();
    launch_us.push_back(us_since(began_ns));
    check_cuda(cudaStreamSynchronize(streams.attention), "an empty kernel failed");
    launch_and_wait_us.push_back(us_since(began_ns));
  }
  print("launch of an empty kernel", 0, launch_us);
  print("launch of an empty kernel and wait", 0, launch_and_wait_us);
}

void time_copies(Machine& machine, const Streams& streams, uint32_t rounds) {
  Timer timer;
  for (const uint64_t bytes : {uint64_t{256} << 10, uint64_t{256} << 20}) {
    const auto from = machine.allocate(bytes);
    const auto to = machine.allocate(bytes);
    std::vector<double> us;
    for (uint32_t i = 0; i < rounds; ++i) {
      timer.begin(streams.attention);
      check_cuda(cudaMemcpyAsync(to.get(), from.get(), bytes, cudaMemcpyDeviceToDevice, streams.attention), "copy");
      timer.end(streams.attention);
      us.push_back(timer.us());
    }
    print("cudaMemcpyAsync, device to the same device", bytes, us);
  }
}

struct Ranks {
  std::shared_ptr<DeviceAttentionComm> attention;
  std::shared_ptr<DeviceExpertComm> expert;

  explicit Ranks(const Shape& shape) {
    std::vector<int32_t> offsets(shape.num_experts + 1);
    std::iota(offsets.begin(), offsets.end(), 0);
    const std::vector<int32_t> hosts(shape.num_experts, 0);
    std::vector<uint32_t> experts(shape.num_experts);
    std::iota(experts.begin(), experts.end(), 0);
    attention = std::make_shared<DeviceAttentionComm>(shape, 0, 1, "cuda:0", "cuda:0", offsets, hosts, 1);
    expert = std::make_shared<DeviceExpertComm>(shape, 0, 1, "cuda:0", "cuda:0", experts);
    int connections[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, connections) != 0) std::perror("socketpair"), std::exit(1);
    Comm::Offer by_attention = attention->offer(0, 1);
    Comm::Offer by_expert = expert->offer(0, 1);
    attention->attach(by_attention.peer_idx, std::move(by_expert.handles), by_expert.process);
    expert->attach(by_expert.peer_idx, std::move(by_attention.handles), by_attention.process);
    attention->watch(by_attention.peer_idx, connections[0], -1);
    expert->watch(by_expert.peer_idx, connections[1], -1);
  }
  ~Ranks() {
    attention->close();
    expert->close();
  }
};

// One layer after another; every launch is timed by events around it.
void time_verbs(Machine& machine, const Streams& streams, uint32_t num_tokens, uint32_t rounds) {
  Shape shape;
  shape.hidden = 4096;
  shape.num_experts = 8;
  shape.top_k = 2;
  shape.max_tokens = num_tokens;
  const Ranks ranks(shape);
  const uint64_t row_bytes = uint64_t{shape.hidden} * dtype_bytes(shape.dispatch_dtype);
  const uint64_t num_pairs = uint64_t{num_tokens} * shape.top_k;
  std::vector<int32_t> ids(num_pairs);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(3 * i % shape.num_experts);
  const std::vector<float> weights(num_pairs, 0.5f);
  const auto x = machine.allocate(num_tokens * row_bytes);
  const auto y = machine.allocate(num_pairs * row_bytes);
  const auto result = machine.allocate(num_tokens * row_bytes);
  const auto device_ids = machine.allocate(num_pairs * sizeof(int32_t));
  const auto device_weights = machine.allocate(num_pairs * sizeof(float));
  machine.upload(device_ids.get(), ids.data(), num_pairs * sizeof(int32_t));
  machine.upload(device_weights.get(), weights.data(), num_pairs * sizeof(float));
  const TopKView topk{num_tokens, device_ids.get(),     IdType::kInt32,       shape.top_k,
                      1,          device_weights.get(), WeightType::kFloat32, shape.top_k,
                      1};
  Timer send, combine, recv;
  std::vector<double> route_us, send_us, dispatch_recv_us, combine_us, recv_us, layer_us;
  for (uint32_t round = 0; round < rounds; ++round) {
    int64_t began_ns = now_ns();
    const auto route = ranks.attention->make_route(topk, {}, streams.attention);
    route_us.push_back(us_since(began_ns));
    began_ns = now_ns();
    send.begin(streams.attention);
    ranks.attention->dispatch_send(static_cast<unsigned char*>(x.get()), row_bytes, route, 0, round, kDeadlineNs,
                                   streams.attention);
    send.end(streams.attention);
    const int64_t recv_began_ns = now_ns();
    const auto batch = ranks.expert->dispatch_recv(Wanted{}, now_ns() + kDeadlineNs, streams.expert);
    if (batch == nullptr) std::fputs("dispatch_recv: no batch in time\n", stderr), std::exit(1);
    dispatch_recv_us.push_back(us_since(recv_began_ns));
    combine.begin(streams.expert);
    ranks.expert->combine_send(*batch, static_cast<unsigned char*>(y.get()), row_bytes, DType::kBFloat16, false,
                               streams.expert);
    combine.end(streams.expert);
    check_cuda(cudaStreamSynchronize(streams.expert), "combine_send failed");
    recv.begin(streams.attention);
    ranks.attention->combine_recv(static_cast<unsigned char*>(result.get()), row_bytes, 0, kDeadlineNs,
                                  streams.attention);
    recv.end(streams.attention);
    check_cuda(cudaStreamSynchronize(streams.attention), "combine_recv failed");
    layer_us.push_back(us_since(began_ns));
    send_us.push_back(send.us());
    combine_us.push_back(combine.us());
    recv_us.push_back(recv.us());
    ranks.attention->check();
  }
  const uint64_t bytes = num_tokens * row_bytes;
  print("route (host, with its wait)", bytes, route_us);
  print("dispatch_send (launch, by events)", bytes, send_us);
  print("dispatch_recv (host, with its wait)", bytes, dispatch_recv_us);
  print("combine_send (launch, by events)", bytes, combine_us);
  print("combine_recv (launch, by events)", bytes, recv_us);
  print("one layer, four verbs, two ranks of one thread (host)", bytes, layer_us);
}

}  // namespace

int main(int argc, char** argv) {
  const auto rounds = static_cast<uint32_t>(argc > 1 ? std::max(std::atoi(argv[1]), 20) : 300);
  try {
    const auto machine = make_machine("cuda:0");
    const Streams streams;
    time_signal(*machine, streams, 11);
    time_launches(streams, rounds);
    time_copies(*machine, streams, 50);
    for (const uint32_t num_tokens : {1u, 32u, 256u}) time_verbs(*machine, streams, num_tokens, rounds);
  } catch (const Error& error) {
    std::fprintf(stderr, "m2n_gpu_timing: %s\n", error.what());
    return 1;
  }
  return 0;
}
