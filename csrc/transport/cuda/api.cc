// SPDX-License-Identifier: Apache-2.0
// Looking up the driver, and the calls of set-up that wait for nothing but themselves.
#include "transport/cuda/api.h"

#include <cstring>
#include <mutex>

#include "core/error.h"

namespace m2n {
namespace {

template <class Function>
void look_up(const char* symbol, Function& function) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  check_cuda(cudaGetDriverEntryPointByVersion(symbol, &address, 12000, cudaEnableDefault, &found), symbol);
#else
  check_cuda(cudaGetDriverEntryPoint(symbol, &address, cudaEnableDefault, &found), symbol);
#endif
  if (found != cudaDriverEntryPointSuccess) refuse_cuda(std::string("the driver has no ") + symbol + "; update it");
  function = reinterpret_cast<Function>(address);
}

CudaDriver load_driver() {
  CudaDriver driver{};
  look_up("cuMemAddressReserve", driver.address_reserve);
  look_up("cuMemAddressFree", driver.address_free);
  look_up("cuMemCreate", driver.create);
  look_up("cuMemRelease", driver.release);
  look_up("cuMemMap", driver.map);
  look_up("cuMemUnmap", driver.unmap);
  look_up("cuMemSetAccess", driver.set_access);
  look_up("cuMemGetAllocationGranularity", driver.granularity);
  look_up("cuMemExportToShareableHandle", driver.export_handle);
  look_up("cuMemImportFromShareableHandle", driver.import_handle);
  look_up("cuDeviceGetAttribute", driver.device_attribute);
  look_up("cuStreamWriteValue64", driver.stream_write);
  look_up("cuStreamWaitValue64", driver.stream_wait);
  look_up("cuStreamBatchMemOp", driver.stream_batch);
  look_up("cuGetErrorString", driver.error_string);
  return driver;
}

// A stream that waits for no other one, made for one use: these calls belong to set-up.
class OwnStream {
 public:
  OwnStream() { check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate"); }
  ~OwnStream() { cudaStreamDestroy(stream_); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  cudaStream_t get() const { return stream_; }
  void synchronize() { check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace

void refuse_cuda(const std::string& text) { throw Error(Failure::kSetup, "cuda: " + text); }

void check_cuda(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  cudaGetLastError();  // it was told: the next call must not find it again
  refuse_cuda(std::string(what) + ": " + cudaGetErrorString(result) + " (" + cudaGetErrorName(result) + ")");
}

int cuda_ordinal(const std::string& device) {
  int ordinal = 0;
  if (device != "cuda") {
    const std::string digits = device.starts_with("cuda:") ? device.substr(5) : "";
    if (digits.empty() || digits.size() > 4 || digits.find_first_not_of("0123456789") != std::string::npos) {
      refuse_cuda("device: expected 'cuda' or 'cuda:0', got '" + device + "'");
    }
    ordinal = std::stoi(digits);
  }
  int driver = 0;
  check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  if (driver == 0) refuse_cuda("there is no NVIDIA driver on this machine");
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "no usable device");
  if (ordinal >= count) refuse_cuda("device: there are " + std::to_string(count) + " devices, got '" + device + "'");
  return ordinal;
}

OnDevice::OnDevice(int ordinal) {
  check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
  check_cuda(cudaSetDevice(ordinal), "cudaSetDevice");
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode");
}

OnDevice::~OnDevice() {
  cudaThreadExchangeStreamCaptureMode(&mode_);
  cudaSetDevice(before_);
}

void zero_now(void* memory, uint64_t bytes) {
  OwnStream stream;
  check_cuda(cudaMemsetAsync(memory, 0, bytes, stream.get()), "cudaMemsetAsync");
  stream.synchronize();
}

void copy_now(void* to, const void* from, uint64_t bytes) {
  OwnStream stream;
  check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream.get()), "cudaMemcpyAsync");
  stream.synchronize();
}

std::shared_ptr<void> make_pinned(int ordinal, uint64_t bytes) {
  const OnDevice on_device(ordinal);
  void* words = nullptr;
  check_cuda(cudaHostAlloc(&words, bytes, cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
  std::memset(words, 0, bytes);
  return {words, [](void* data) { cudaFreeHost(data); }};
}

const CudaDriver& cuda_driver() {
  static const CudaDriver driver = load_driver();  // tried again after a failure
  return driver;
}

}  // namespace m2n
