// SPDX-License-Identifier: Apache-2.0
// The verbs as kernels: one launch each, on the caller's stream.
#include <cstdint>

#include "core/error.h"
#include "exchange/machine.h"
#include "transport/cuda_api.h"

namespace m2n {
namespace {

// Few blocks: they spin while they wait, and leave the rest of the device to whoever computes.
constexpr uint32_t kBlocks = 8;
constexpr uint32_t kThreads = 256;

class CudaExec {
 public:
  __device__ uint32_t thread() const { return threadIdx.x; }
  __device__ uint32_t num_threads() const { return blockDim.x; }
  __device__ uint32_t block() const { return blockIdx.x; }
  __device__ uint32_t num_blocks() const { return gridDim.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void pause() const { __nanosleep(32); }
  __device__ int64_t now_ns() const {
    int64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
  }
  __device__ void wake(WakeWord*) const {}  // whoever waits for a device's signal polls
};

template <class V>
__global__ void __launch_bounds__(kThreads) verb_kernel(const __grid_constant__ V verb) {
  CudaExec exec;
  run(exec, verb);
}

// Loading a kernel at its first launch can wait for kernels that spin: all are loaded beforehand.
template <class... V>
void load_kernels() {
  cudaFuncAttributes attributes;
  (check_cuda(cudaFuncGetAttributes(&attributes, verb_kernel<V>), "the kernels do not run on this device"), ...);
}

class CudaMachine final : public Machine {
 public:
  explicit CudaMachine(const std::string& device) : ordinal_(cuda_ordinal(device)) {
    const OnDevice on_device(ordinal_);
    load_kernels<RouteVerb, DispatchVerb, CombineRecvVerb, PollVerb, ReceiveVerb, CombineSendVerb>();
  }

  std::shared_ptr<void> allocate(uint64_t bytes) override {
    const OnDevice on_device(ordinal_);
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, bytes == 0 ? 1 : bytes), "cudaMalloc");
    std::shared_ptr<void> owned(memory, [](void* data) { cudaFree(data); });
    zero_now(memory, bytes);
    return owned;
  }
  void upload(void* to, const void* from, uint64_t bytes) override {
    const OnDevice on_device(ordinal_);
    copy_now(to, from, bytes);
  }

  std::shared_ptr<void> make_event() override {
    const OnDevice on_device(ordinal_);
    cudaEvent_t event = nullptr;
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    return {event, [](void* data) { cudaEventDestroy(static_cast<cudaEvent_t>(data)); }};
  }
  void record(void* event, Stream stream) override {
    const OnDevice on_device(ordinal_);
    check_cuda(cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream)), "cudaEventRecord");
  }
  void wait(Stream stream, void* event) override {
    const OnDevice on_device(ordinal_);
    check_cuda(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(event)),
               "cudaStreamWaitEvent");
  }
  void synchronize(void* event) override {
    const OnDevice on_device(ordinal_);
    check_cuda(cudaEventSynchronize(static_cast<cudaEvent_t>(event)), "a kernel failed");
  }

  void launch(const RouteVerb& verb, Stream stream) override { launch(verb, 1, 1, stream); }
  void launch(const DispatchVerb& verb, Stream stream) override { launch(verb, kBlocks, kThreads, stream); }
  void launch(const CombineRecvVerb& verb, Stream stream) override { launch(verb, kBlocks, kThreads, stream); }
  void launch(const PollVerb& verb, Stream stream) override { launch(verb, 1, 1, stream); }
  void launch(const ReceiveVerb& verb, Stream stream) override { launch(verb, 1, 1, stream); }
  void launch(const CombineSendVerb& verb, Stream stream) override { launch(verb, kBlocks, kThreads, stream); }

 private:
  template <class V>
  void launch(const V& verb, uint32_t num_blocks, uint32_t num_threads, Stream stream) {
    const OnDevice on_device(ordinal_);
    verb_kernel<<<num_blocks, num_threads, 0, static_cast<cudaStream_t>(stream)>>>(verb);
    check_cuda(cudaGetLastError(), "a kernel could not be launched");
  }

  int ordinal_;
};

}  // namespace

std::unique_ptr<Machine> make_cuda_machine(const std::string& device) { return std::make_unique<CudaMachine>(device); }

}  // namespace m2n
