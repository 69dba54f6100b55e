// SPDX-License-Identifier: Apache-2.0
// The verbs as kernels: one launch each, on the caller's stream.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/error.h"
#include "core/kernel_exec.h"
#include "exchange/device/machines/machine.h"
#include "transport/cuda/api.h"

namespace m2n {
namespace {

constexpr uint32_t kThreads = 512;
static_assert(kThreads <= kMaxParts);
// What a block is launched for, at least: each of its warps copies 1 KB or more at a time.
constexpr uint64_t kBlockBytes = 4096;
constexpr size_t kMostOps = 128;  // of the driver in one call

class VerbExec : public KernelExec {
 public:
  // `shared`: the words of shared_words(max_peers), then, for a block that works alone, those to count in.
  __device__ VerbExec(uint32_t* shared, uint32_t max_peers) : KernelExec(shared), max_peers_(max_peers) {}
  __device__ uint32_t* counts() const { return shared() + shared_words(max_peers_); }

 private:
  uint32_t max_peers_;
};

__host__ __device__ uint32_t max_peers_of(const RouteVerb&) { return 0; }
template <class V>
__host__ __device__ uint32_t max_peers_of(const V& verb) {
  if constexpr (requires { verb.verb; }) {
    return verb.verb.view.max_peers;
  } else {
    return verb.view.max_peers;
  }
}

template <class V>
__global__ void __launch_bounds__(kThreads) verb_kernel(const __grid_constant__ V verb, bool is_rehearsal) {
  if (is_rehearsal) return;
  extern __shared__ __align__(16) uint32_t shared[];
  VerbExec exec(shared, max_peers_of(verb));
  run(exec, verb);
}

// A kernel's first launch can wait for kernels that spin: it is loaded then, and the device gets the local memory it
// needs. So each is launched once when a machine is made, and does nothing.
template <class V>
void rehearse_kernel(const V& verb) {
  const uint32_t most_bytes = (shared_words(kMaxPeers) + kCountWords) * sizeof(uint32_t);
  check_cuda(cudaFuncSetAttribute(verb_kernel<V>, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes),
             "the kernels do not run on this device");
  verb_kernel<V><<<1, 32, 0, cudaStreamPerThread>>>(verb, /*is_rehearsal=*/true);
  check_cuda(cudaGetLastError(), "the kernels do not run on this device");
}
template <class... V>
void rehearse_kernels() {
  (rehearse_kernel(V{}), ...);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    DispatchVerb dispatch{};
    dispatch.view.shape.dispatch_dtype = DType::kFloat8E4M3;
    dispatch.x_dtype = dtype;
    with_types(dispatch, [](const auto& typed) { rehearse_kernel(typed); });
    CombineRecvVerb recv{};
    recv.view.shape.combine_dtype = dtype;
    with_types(recv, [](const auto& typed) { rehearse_kernel(typed); });
    for (const DType y_dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      CombineSendVerb send{};
      send.view.shape.combine_dtype = dtype;
      send.y_dtype = y_dtype;
      with_types(send, [](const auto& typed) { rehearse_kernel(typed); });
    }
  }
  check_cuda(cudaStreamSynchronize(cudaStreamPerThread), "the kernels do not run on this device");
}

class CudaMachine final : public Machine {
 public:
  explicit CudaMachine(const std::string& device) : ordinal_(cuda_ordinal(device)) {
    const OnDevice on_device(ordinal_);
    rehearse_kernels<RouteVerb, DispatchVerb, AwaitVerb, PollVerb, ReceiveVerb>();
  }

  std::shared_ptr<void> allocate(uint64_t bytes) override {
    const OnDevice on_device(ordinal_);
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, bytes == 0 ? 1 : bytes), "cudaMalloc");
    std::shared_ptr<void> owned(memory, [](void* data) { cudaFree(data); });
    zero_now(memory, bytes);
    return owned;
  }
  void copy(void* to, const void* from, uint64_t bytes) override {
    const OnDevice on_device(ordinal_);
    copy_now(to, from, bytes);
  }
  bool is_capturing(Stream stream) override {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
  }
  void synchronize_all() override {
    const OnDevice on_device(ordinal_);
    check_cuda(cudaDeviceSynchronize(), "a kernel failed");
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
  bool is_passed(void* event) override {
    const OnDevice on_device(ordinal_);
    const cudaError_t result = cudaEventQuery(static_cast<cudaEvent_t>(event));
    if (result == cudaErrorNotReady) return false;
    check_cuda(result, "cudaEventQuery");
    return true;
  }
  void synchronize(void* event) override {
    const OnDevice on_device(ordinal_);
    check_cuda(cudaEventSynchronize(static_cast<cudaEvent_t>(event)), "a kernel failed");
  }

  void wait_words(const std::vector<WordWait>& waits, uint32_t* begun, uint32_t* passed, uint32_t ticket,
                  Stream stream) override {
    const OnDevice on_device(ordinal_);
    std::vector<CUstreamBatchMemOpParams> ops;
    ops.push_back(store_op(begun, ticket));  // SYNC: wait-begun
    for (const WordWait& wait : waits) {
      CUstreamBatchMemOpParams op{};
      op.waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32;
      op.waitValue.address = reinterpret_cast<CUdeviceptr>(wait.word);  // SYNC: slot-signal
      op.waitValue.value = wait.value;
      op.waitValue.flags = CU_STREAM_WAIT_VALUE_GEQ;
      ops.push_back(op);
    }
    ops.push_back(store_op(passed, ticket));  // SYNC: wait-passed
    for (size_t i = 0; i < ops.size(); i += kMostOps) {
      const auto count = static_cast<unsigned>(std::min(ops.size() - i, kMostOps));
      if (cuda_driver().stream_batch(static_cast<CUstream>(stream), count, ops.data() + i, 0) != CUDA_SUCCESS) {
        throw Error(Failure::kSetup,
                    "cuda: a stream cannot wait by itself here (cuStreamBatchMemOp); leave out "
                    "stream_waits");
      }
    }
  }

  void launch(const RouteVerb& verb, Stream stream) override { start(verb, 1, kThreads, stream); }
  void launch(const AwaitVerb& verb, Stream stream) override { start(verb, 1, kThreads, stream); }
  void launch(const PollVerb& verb, Stream stream) override { start(verb, 1, 1, stream); }
  void launch(const ReceiveVerb& verb, Stream stream) override { start(verb, 1, kThreads, stream); }
  void launch(const DispatchVerb& verb, uint32_t num_sms, uint64_t num_bytes, Stream stream) override {
    with_types(verb, [&](const auto& typed) { start(typed, num_blocks(num_sms, num_bytes), kThreads, stream); });
  }
  void launch(const CombineRecvVerb& verb, uint32_t num_sms, uint64_t num_bytes, Stream stream) override {
    with_types(verb, [&](const auto& typed) { start(typed, num_blocks(num_sms, num_bytes), kThreads, stream); });
  }
  void launch(const CombineSendVerb& verb, uint32_t num_sms, uint64_t num_bytes, Stream stream) override {
    with_types(verb, [&](const auto& typed) { start(typed, num_blocks(num_sms, num_bytes), kThreads, stream); });
  }

 private:
  // Everything before it in the stream is visible to who sees it.
  static CUstreamBatchMemOpParams store_op(uint32_t* word, uint32_t value) {
    CUstreamBatchMemOpParams op{};
    op.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32;
    op.writeValue.address = reinterpret_cast<CUdeviceptr>(word);
    op.writeValue.value = value;
    return op;
  }
  static uint32_t num_blocks(uint32_t num_sms, uint64_t num_bytes) {
    return static_cast<uint32_t>(std::clamp<uint64_t>(num_bytes / kBlockBytes, 1, std::max(num_sms, 1u)));
  }

  template <class V>
  void start(const V& verb, uint32_t num_blocks, uint32_t num_threads, Stream stream) {
    const OnDevice on_device(ordinal_);
    constexpr bool kCounts = std::is_same_v<V, RouteVerb> || std::is_same_v<V, ReceiveVerb>;
    const uint32_t num_words = shared_words(max_peers_of(verb)) + (kCounts ? kCountWords : 0);
    verb_kernel<<<num_blocks, num_threads, num_words * sizeof(uint32_t), static_cast<cudaStream_t>(stream)>>>(
        verb,
        /*is_rehearsal=*/false);
    check_cuda(cudaGetLastError(), "a kernel could not be launched");
  }
  int ordinal_;
};

}  // namespace

std::unique_ptr<Machine> make_cuda_machine(const std::string& device) { return std::make_unique<CudaMachine>(device); }

}  // namespace m2n
