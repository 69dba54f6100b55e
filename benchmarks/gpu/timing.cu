// SPDX-License-Identifier: Apache-2.0
// What one GPU allows, in one run: the hop of a signal between two kernels, launches, copies; and rows by put() beside
// the same rows by bulk copies. Prints lines of JSON. Usage: m2n_gpu_timing [ROUNDS]
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/kernel_exec.h"
#include "exchange/device/machines/machine.h"
#include "exchange/rows/put_rows.h"
#include "transport/cuda/api.h"
#include "transport/host_exec.h"

namespace {

using namespace m2n;

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
  const KernelExec exec;
  int64_t began_ns = exec.now_ns();
  for (uint32_t seq = 1; seq <= rounds; ++seq) {
    if (is_first) store_signal(peer, make_signal(0, seq));  // SYNC: slot-signal
    while (signal_seq(poll_signal(own)) != seq) {
      if (exec.now_ns() - began_ns > 1'000'000'000) return;
    }
    if (!is_first) store_signal(peer, make_signal(0, seq));  // SYNC: slot-signal
    if (seq == rounds / 10) began_ns = exec.now_ns();        // the first tenth warms up
  }
  *took_ns = exec.now_ns() - began_ns;
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

// The same hop by operations of the streams themselves, which occupy no multiprocessor (the paper's mechanism).
// Everything is made and enqueued before the host lets it go, by a word of its own: calls of the runtime may wait for
// streams that wait (a copy to the device did, on an H200).
void time_stream_signal(Machine& machine, const Streams& streams, uint32_t repeats) {
  constexpr uint32_t kRounds = 20;
  const CudaDriver& driver = cuda_driver();
  const auto memory = machine.allocate(2 * kLineBytes);
  const auto first = reinterpret_cast<CUdeviceptr>(memory.get());
  const CUdeviceptr second = first + kLineBytes;
  const auto go = std::static_pointer_cast<uint64_t>(make_pinned(0, sizeof(uint64_t)));
  Timer timer;
  std::vector<double> us;
  uint64_t seq = 0;
  for (uint32_t i = 1; i <= repeats; ++i) {
    CUresult result = CUDA_SUCCESS;
    const auto keep = [&](CUresult next) { result = result == CUDA_SUCCESS ? next : result; };
    const auto gate = reinterpret_cast<CUdeviceptr>(go.get());
    keep(driver.stream_wait(streams.expert, gate, i, CU_STREAM_WAIT_VALUE_GEQ));
    keep(driver.stream_wait(streams.attention, gate, i, CU_STREAM_WAIT_VALUE_GEQ));
    timer.begin(streams.attention);
    for (uint32_t round = 0; round < kRounds; ++round) {
      ++seq;
      keep(driver.stream_write(streams.attention, second, seq, CU_STREAM_WRITE_VALUE_DEFAULT));
      keep(driver.stream_wait(streams.attention, first, seq, CU_STREAM_WAIT_VALUE_GEQ));
      keep(driver.stream_wait(streams.expert, second, seq, CU_STREAM_WAIT_VALUE_GEQ));
      keep(driver.stream_write(streams.expert, first, seq, CU_STREAM_WRITE_VALUE_DEFAULT));
    }
    timer.end(streams.attention);
    store_release(go.get(), uint64_t{i});
    if (result != CUDA_SUCCESS) throw Error(Failure::kSetup, "stream memory operations are not supported here");
    us.push_back(timer.us() / (2.0 * kRounds));
  }
  print("signal, one way, by stream memory operations", sizeof(Signal), us);
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

// 692 rows of 14 KB, as 128 tokens in top-8 to 8 ranks are, or more of them.
constexpr uint32_t kRowBytes = 14336;

// Each row is read from one of `num_sources`, as tokens go to several ranks.
__global__ void __launch_bounds__(512)
    put_kernel(unsigned char* to, const unsigned char* from, uint32_t num_rows, uint32_t num_sources) {
  const KernelExec exec;
  PutDeal deal = deal_put(exec, uint64_t{num_rows} * kRowBytes);
  const auto row_at = [&](uint32_t row) { return from + uint64_t{row % num_sources} * kRowBytes; };
  put_rows(exec, deal, to, num_rows, kRowBytes, false, row_at, [](uint32_t, uint32_t) {});
}

constexpr uint32_t kStages = 2;

#if __CUDA_ARCH__ >= 900

__device__ uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

__device__ void load_row(unsigned char* stage, uint64_t* barrier, const unsigned char* from) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(kRowBytes));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(stage)),
               "l"(from), "r"(kRowBytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ void wait_row(uint64_t* barrier, uint32_t phase) {
  uint32_t is_here = 0;
  while (is_here == 0) {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(is_here)
                 : "r"(shared_address(barrier)), "r"(phase)
                 : "memory");
  }
}

__device__ void store_row(unsigned char* to, const unsigned char* stage) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(stage)),
               "r"(kRowBytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;");
}

#endif

// One thread a warp: whole rows through shared memory, two of them under way. For compute capability 9 and later.
__global__ void bulk_kernel([[maybe_unused]] unsigned char* to, [[maybe_unused]] const unsigned char* from,
                            [[maybe_unused]] uint32_t num_rows, [[maybe_unused]] uint32_t num_sources) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char stages[];
  __shared__ __align__(8) uint64_t barriers[32 * kStages];
  const uint32_t warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  if (threadIdx.x % 32 != 0) return;
  unsigned char* own_stages = stages + uint64_t{warp} * kStages * kRowBytes;
  uint64_t* own_barriers = barriers + warp * kStages;
  for (uint32_t i = 0; i < kStages; ++i) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(own_barriers + i)));
  }
  asm volatile("fence.mbarrier_init.release.cluster;");
  const uint32_t first = blockIdx.x * num_warps + warp, step = gridDim.x * num_warps;
  const auto load = [&](uint32_t turn) {
    const uint32_t row = first + turn * step;
    if (row >= num_rows) return;
    const unsigned char* source = from + uint64_t{row % num_sources} * kRowBytes;
    load_row(own_stages + turn % kStages * kRowBytes, own_barriers + turn % kStages, source);
  };
  for (uint32_t turn = 0; turn < kStages; ++turn) load(turn);
  for (uint32_t turn = 0; first + turn * step < num_rows; ++turn) {
    wait_row(own_barriers + turn % kStages, turn / kStages % 2);
    store_row(to + uint64_t{first + turn * step} * kRowBytes, own_stages + turn % kStages * kRowBytes);
    if (first + (turn + kStages) * step >= num_rows) continue;
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    load(turn + kStages);
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

// Launches back to back, eight buffers in turn; the time of one.
template <class Launch>
double time_launched(const Streams& streams, Launch&& launch) {
  Timer timer;
  std::vector<double> us;
  for (uint32_t round = 0; round < 12; ++round) {
    timer.begin(streams.attention);
    for (uint32_t i = 0; i < 16; ++i) launch(i % 8);
    timer.end(streams.attention);
    if (round >= 2) us.push_back(timer.us() / 16);
  }
  check_cuda(cudaGetLastError(), "a put kernel failed");
  std::sort(us.begin(), us.end());
  return us[us.size() / 2];
}

void time_puts(Machine& machine, const Streams& streams, uint32_t num_rows, uint32_t num_sources) {
  const uint64_t bytes = uint64_t{num_rows} * kRowBytes;
  const auto from = machine.allocate(uint64_t{num_sources} * kRowBytes);
  std::vector<std::shared_ptr<void>> to;
  for (uint32_t i = 0; i < 8; ++i) to.push_back(machine.allocate(bytes));
  const auto* source = static_cast<const unsigned char*>(from.get());
  const auto target = [&](uint32_t i) { return static_cast<unsigned char*>(to[i].get()); };
  for (const uint32_t blocks : {8u, 16u, 32u, 64u, 132u}) {
    const double us = time_launched(streams, [&](uint32_t i) {
      put_kernel<<<blocks, 512, 0, streams.attention>>>(target(i), source, num_rows, num_sources);
    });
    print("put by stores of 16 bytes, " + std::to_string(blocks) + " blocks", bytes, {us});
    for (const uint32_t warps : {2u, 4u, 7u}) {
      const uint32_t shared_bytes = warps * kStages * kRowBytes;
      check_cuda(cudaFuncSetAttribute(bulk_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes)),
                 "shared memory");
      const double bulk_us = time_launched(streams, [&](uint32_t i) {
        bulk_kernel<<<blocks, warps * 32, shared_bytes, streams.attention>>>(target(i), source, num_rows, num_sources);
      });
      print("put by bulk copies, " + std::to_string(blocks) + " blocks of " + std::to_string(warps) + " warps", bytes,
            {bulk_us});
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const auto machine = make_machine("cuda:0");
    const Streams streams;
    if (argc > 1 && std::strcmp(argv[1], "--stream-signal") == 0) {
      time_stream_signal(*machine, streams, 11);
      return 0;
    }
    time_signal(*machine, streams, 11);
    time_launches(streams, 300);
    time_copies(*machine, streams, 50);
    int major = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "cudaDeviceGetAttribute");
    if (major >= 9) {
      time_puts(*machine, streams, 692, 128);
      time_puts(*machine, streams, 22144, 4096);
    }
  } catch (const Error& error) {
    std::fprintf(stderr, "m2n_gpu_timing: %s\n", error.what());
    return 1;
  }
  return 0;
}
