// SPDX-License-Identifier: Apache-2.0
// Runs a kernel of gate_dispatch.h between one attention rank and three expert ranks of this process, layer after
// layer, and compares what comes back with the oracle, bit for bit. How the kernel is launched is the caller's.
#pragma once

#include <m2n/exchange/device/attention.h>
#include <m2n/exchange/device/expert.h>
#include <sys/socket.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "gate_dispatch.h"

namespace gate_dispatch {

// Three: the sum of two replies would not show their order.
constexpr uint32_t kNumExpertRanks = 3, kAttentionRank = 1, kMicrobatches = 2, kLayers = 3, kSms = 4;
constexpr int64_t kTimeoutNs = 10'000'000'000;
constexpr Stream kStream = nullptr;  // of all launches: each comes after those before it

// Expert e lives on the expert ranks ranks[offsets[e] .. offsets[e + 1]): in turn on each, and every fourth on all.
struct Placement {
  std::vector<int32_t> offsets = {0}, ranks;
  std::vector<uint32_t> experts_of_rank[kNumExpertRanks];

  explicit Placement(uint32_t num_experts) {
    for (uint32_t expert = 0; expert < num_experts; ++expert) {
      for (uint32_t rank = 0; rank < kNumExpertRanks; ++rank) {
        if (expert % kNumExpertRanks != rank && expert % 4 != 0) continue;
        ranks.push_back(static_cast<int32_t>(rank));
        experts_of_rank[rank].push_back(expert);
      }
      offsets.push_back(static_cast<int32_t>(ranks.size()));
    }
  }
  int32_t home(int32_t expert, uint32_t token) const {
    const auto num_replicas = static_cast<uint32_t>(offsets[expert + 1] - offsets[expert]);
    return ranks[offsets[expert] + (token + kAttentionRank) % num_replicas];
  }
};

// Memory where the machine's launches run.
template <class V>
class Array {
 public:
  Array(Machine& machine, uint64_t count)
      : machine_(&machine), count_(count), memory_(machine.allocate(count * sizeof(V))) {}
  Array(Machine& machine, const std::vector<V>& values) : Array(machine, values.size()) {
    if (count_ != 0) machine.copy(data(), values.data(), count_ * sizeof(V));
  }
  V* data() const { return static_cast<V*>(memory_.get()); }
  std::vector<V> read() const { return read_from(*machine_, data(), count_); }

  static std::vector<V> read_from(Machine& machine, const V* from, uint64_t count) {
    std::vector<V> values(count);
    if (count != 0) machine.copy(values.data(), from, count * sizeof(V));
    return values;
  }

 private:
  Machine* machine_;
  uint64_t count_;
  std::shared_ptr<void> memory_;
};

// Connects two ranks of this process.
inline void link(Comm& attention, Comm& expert) {
  int connections[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, connections) != 0) throw std::runtime_error("socketpair");
  Comm::Offer by_attention = attention.offer(expert.rank(), /*life=*/1);
  Comm::Offer by_expert = expert.offer(attention.rank(), /*life=*/1);
  attention.attach(by_attention.peer_idx, std::move(by_expert.handles), by_expert.origin);
  expert.attach(by_expert.peer_idx, std::move(by_attention.handles), by_attention.origin);
  attention.watch(by_attention.peer_idx, connections[0], -1);
  expert.watch(by_expert.peer_idx, connections[1], -1);
}

// What expert number `expert` does to an element, rounded to the element's type.
template <class T>
T apply_expert(int32_t expert, T value) {
  const float scale = 0.5f + 0.25f * static_cast<float>(expert % 5), bias = 0.125f * static_cast<float>(expert);
  const float scaled = to_float(value) * scale;
  return from_float<T>(scaled + bias);
}

// Between -1 and 1.
template <class T>
std::vector<T> random_elements(uint32_t seed, uint64_t count) {
  std::mt19937 random(seed);
  std::vector<T> elements(count);
  for (T& element : elements) element = from_float<T>(static_cast<float>(random() >> 8) * 0x1p-23f - 1.0f);
  return elements;
}

// The rule of m2n.testing.oracle_combine with reduce_at="expert". Each line rounds once.
template <class T>
void add_up(T* y, const T* x, const Shape& shape, const Placement& placement, uint32_t token,
            std::vector<std::pair<int32_t, float>> pairs) {
  std::sort(pairs.begin(), pairs.end());  // by ascending expert
  std::map<int32_t, std::vector<float>> partials;
  for (const auto& [expert, weight] : pairs) {
    auto& partial = partials.try_emplace(placement.home(expert, token), shape.hidden, 0.0f).first->second;
    for (uint32_t h = 0; h < shape.hidden; ++h) {
      const float weighted = weight * to_float(apply_expert(expert, x[h]));
      partial[h] = partial[h] + weighted;
    }
  }
  for (uint32_t h = 0; h < shape.hidden; ++h) {
    float total = 0.0f;
    for (const auto& [rank, partial] : partials) total = total + to_float(from_float<T>(partial[h]));
    y[h] = from_float<T>(total);
  }
}

// One shape, with rows of T.
template <class T>
class Check {
 public:
  Check(const std::string& device, const std::string& transport, const Shape& shape)
      : machine_(make_machine(device)), shape_(shape), placement_(shape.num_experts) {
    attention_ = std::make_shared<DeviceAttentionComm>(shape, kAttentionRank, kNumExpertRanks, transport, device,
                                                       placement_.offsets, placement_.ranks, kNumExpertRanks);
    for (uint32_t rank = 0; rank < kNumExpertRanks; ++rank) {
      experts_.push_back(std::make_shared<DeviceExpertComm>(shape, rank, /*max_peers=*/1, transport, device,
                                                            placement_.experts_of_rank[rank]));
      link(*attention_, *experts_.back());
    }
  }
  ~Check() {
    attention_->close();
    for (const auto& expert : experts_) expert->close();
  }
  Check(const Check&) = delete;
  Check& operator=(const Check&) = delete;

  // One layer: all microbatches are in flight at once. Throws where anything differs.
  template <class Launch>
  void run_layer(uint32_t layer, const Launch& launch_kernel) {
    std::vector<Sent> sent;
    for (uint32_t microbatch = 0; microbatch < kMicrobatches; ++microbatch) {
      const uint32_t seed = 100 * layer + microbatch;
      // As many tokens as there may be, some, and none.
      const uint32_t num_tokens = microbatch == 0 ? shape_.max_tokens : layer * shape_.max_tokens / (2 * kLayers);
      sent.push_back(send(seed, num_tokens, microbatch, layer, launch_kernel));
    }
    for (uint32_t i = 0; i < kMicrobatches * kNumExpertRanks; ++i) serve(i % kNumExpertRanks);
    for (uint32_t microbatch = 0; microbatch < kMicrobatches; ++microbatch) {
      const Array<T> y(*machine_, uint64_t{sent[microbatch].num_tokens} * shape_.hidden);
      attention_->combine_recv(reinterpret_cast<unsigned char*>(y.data()), row_bytes(), microbatch, kTimeoutNs, kSms,
                               kStream);
      machine_->synchronize_all();
      attention_->check();  // a launch cannot throw: what went wrong is told here
      compare(sent[microbatch], y.read());
    }
  }
  Stats stats() const { return attention_->stats(); }

 private:
  // What a dispatch reads and writes, kept until it is compared.
  struct Sent {
    uint32_t num_tokens;
    std::vector<T> x, w_gate;
    Array<T> x_array, w_gate_array;
    Array<int32_t> rank_offsets, ranks;
    Array<float> logits;
    Array<int32_t> ids;
    Array<float> weights;
  };

  uint64_t row_bytes() const { return shape_.hidden * sizeof(T); }

  template <class Launch>
  Sent send(uint32_t seed, uint32_t num_tokens, uint32_t microbatch, uint32_t layer, const Launch& launch_kernel) {
    std::vector<T> x = random_elements<T>(seed, uint64_t{num_tokens} * shape_.hidden);
    if (num_tokens > 3)
      x[3 * shape_.hidden] = from_float<T>(NAN);  // so its logits are not finite, and it goes to nobody
    std::vector<T> w_gate = random_elements<T>(~seed, uint64_t{shape_.hidden} * shape_.num_experts);
    const uint64_t num_pairs = uint64_t{num_tokens} * shape_.top_k;
    Machine& machine = *machine_;
    Sent sent{num_tokens,
              x,
              w_gate,
              {machine, x},
              {machine, w_gate},
              {machine, placement_.offsets},
              {machine, placement_.ranks},
              {machine, uint64_t{num_tokens} * shape_.num_experts},
              {machine, num_pairs},
              {machine, num_pairs}};
    GateDispatch<T> launch{};
    const auto route = attention_->make_empty_route(num_tokens, nullptr);
    launch.verb = attention_->prepare_dispatch(route, microbatch, layer, kTimeoutNs, nullptr);
    launch.verb.x = reinterpret_cast<const unsigned char*>(sent.x_array.data());
    launch.verb.x_stride_bytes = row_bytes();
    launch.w_gate = sent.w_gate_array.data();
    launch.rank_offsets = sent.rank_offsets.data();
    launch.ranks = sent.ranks.data();
    launch.own_rank = kAttentionRank;
    launch.logits = sent.logits.data();
    launch.topk_ids = sent.ids.data();
    launch.topk_weights = sent.weights.data();
    launch_kernel(launch);
    attention_->note_dispatch(microbatch, nullptr);
    return sent;
  }

  // An expert rank answers the batch that waits longest. Its experts compute on the host.
  void serve(uint32_t rank) {
    DeviceExpertComm& comm = *experts_[rank];
    Machine& machine = *machine_;
    const std::shared_ptr<DeviceBatch> batch = comm.dispatch_recv(Wanted{}, now_ns() + kTimeoutNs, kStream);
    if (batch == nullptr) throw std::runtime_error("an expert rank has received nothing in time");
    const std::vector<uint32_t>& experts = placement_.experts_of_rank[rank];
    const BatchView& lists = batch->slot.lists;
    const auto offsets = Array<int32_t>::read_from(machine, lists.expert_offsets, experts.size() + 1);
    const auto window_rows = Array<int32_t>::read_from(machine, lists.row_index_by_expert, batch->num_pairs);
    std::vector<T> y;
    for (size_t i = 0; i < experts.size(); ++i) {
      for (int32_t pair = offsets[i]; pair < offsets[i + 1]; ++pair) {
        const auto* from = reinterpret_cast<const T*>(comm.rows_window()->data() + window_rows[pair] * row_bytes());
        for (const T value : Array<T>::read_from(machine, from, shape_.hidden)) {
          y.push_back(apply_expert(static_cast<int32_t>(experts[i]), value));
        }
      }
    }
    const Array<T> y_array(machine, y);
    comm.combine_send(*batch, reinterpret_cast<const unsigned char*>(y_array.data()), row_bytes(), shape_.combine_dtype,
                      /*is_reduced=*/false, kSms, kStream);
    machine.synchronize_all();  // y_array is read until then
    comm.check();
  }

  void compare(const Sent& sent, const std::vector<T>& y) const {
    const auto logits = sent.logits.read();
    const auto ids = sent.ids.read();
    const auto weights = sent.weights.read();
    std::vector<T> expected(y.size(), from_float<T>(bits_to_float(0x7FC00000u)));
    for (uint32_t token = 0; token < sent.num_tokens; ++token) {
      const uint64_t from = uint64_t{token} * shape_.top_k, row = uint64_t{token} * shape_.hidden;
      compare_gate(sent, token, &logits[uint64_t{token} * shape_.num_experts], &ids[from], &weights[from]);
      std::vector<std::pair<int32_t, float>> pairs;
      for (uint32_t k = 0; k < shape_.top_k && ids[from + k] >= 0; ++k) {
        pairs.emplace_back(ids[from + k], weights[from + k]);
      }
      if (!pairs.empty()) add_up(&expected[row], &sent.x[row], shape_, placement_, token, std::move(pairs));
      if (std::memcmp(&expected[row], &y[row], row_bytes()) != 0) {
        throw std::runtime_error("the result of token " + std::to_string(token) + " is not the oracle's");
      }
    }
  }

  // The kernel's choice: its logits bit for bit, and weights up to the last bits of its expf().
  void compare_gate(const Sent& sent, uint32_t token, const float* logits, const int32_t* ids,
                    const float* weights) const {
    const auto differs = [token](const char* what) {
      throw std::runtime_error(std::string(what) + " of token " + std::to_string(token) + " differ");
    };
    std::vector<float> expected(shape_.num_experts, 0.0f);
    for (uint32_t h = 0; h < shape_.hidden; ++h) {
      for (uint32_t e = 0; e < shape_.num_experts; ++e) {
        const float product = to_float(sent.x[token * uint64_t{shape_.hidden} + h]) *
                              to_float(sent.w_gate[h * uint64_t{shape_.num_experts} + e]);
        expected[e] = expected[e] + product;
      }
    }
    if (std::isnan(expected[0])) return ids[0] == kNone ? void() : differs("ids of NaN");
    if (std::memcmp(expected.data(), logits, expected.size() * sizeof(float)) != 0) differs("logits");
    std::vector<int32_t> order(shape_.num_experts);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return expected[a] > expected[b]; });
    double total = 0.0;
    for (uint32_t k = 0; k < shape_.top_k; ++k) total += std::exp(double{expected[order[k]]} - expected[order[0]]);
    for (uint32_t k = 0; k < shape_.top_k; ++k) {
      if (ids[k] != order[k]) differs("ids");
      const double weight = std::exp(double{expected[order[k]]} - expected[order[0]]) / total;
      if (std::abs(weights[k] - weight) > 1e-5 * weight) differs("weights");
    }
  }

  const std::unique_ptr<Machine> machine_;
  const Shape shape_;
  const Placement placement_;
  std::shared_ptr<DeviceAttentionComm> attention_;
  std::vector<std::shared_ptr<DeviceExpertComm>> experts_;
};

// `launch_kernel(const GateDispatch<T>&)` launches the kernel on kStream.
template <class T, class Launch>
void check_shape(const std::string& device, const std::string& transport, Shape shape, const Launch& launch_kernel) {
  constexpr bool kIsFloat = std::is_same_v<T, float>;
  shape.microbatches = kMicrobatches;
  shape.dispatch_dtype = shape.combine_dtype = kIsFloat ? DType::kFloat32 : DType::kBFloat16;
  Check<T> check(device, transport, shape);
  for (uint32_t layer = 0; layer < kLayers; ++layer) check.run_layer(layer, launch_kernel);
  std::printf("%s, hidden %u, top %u of %u experts, %u tokens: %llu rows, as the oracle\n",
              kIsFloat ? "float32" : "bfloat16", shape.hidden, shape.top_k, shape.num_experts, shape.max_tokens,
              static_cast<unsigned long long>(check.stats().rows_sent));
}

// What main() returns.
template <class Launch>
int check_all(const std::string& device, const std::string& transport, const Launch& launch_kernel) {
  try {
    // Rows of whole pieces of 16 bytes, of 4 and of 2; fewer experts than lanes, and more; one token.
    for (const Shape& shape : {Shape{64, 8, 2, 40}, Shape{202, 70, 8, 25}, Shape{37, 5, 5, 9}, Shape{16, 4, 1, 1}}) {
      check_shape<BFloat16>(device, transport, shape, launch_kernel);
      check_shape<float>(device, transport, shape, launch_kernel);
    }
  } catch (const std::exception& error) {  // one of m2n::Error says in kind() what it is
    std::fprintf(stderr, "gate_dispatch: %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace gate_dispatch
