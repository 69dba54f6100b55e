// SPDX-License-Identifier: Apache-2.0
// What is needed of CUDA. The driver is looked up at run time: without one the library loads, and says why not.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <memory>
#include <string>

namespace m2n {

// Throws Error(kSetup), of this transport.
[[noreturn]] void refuse_cuda(const std::string& text);
// The same, naming what was tried.
void check_cuda(cudaError_t result, const char* what);

// "cuda" or "cuda:1" -> the device's number. Throws Error(kSetup): not a device, or why there is none.
int cuda_ordinal(const std::string& device);

// Makes a device the current one of this thread while it lives. What is done meanwhile is no part of a graph that
// another thread captures, and must not end its capture.
class OnDevice {
 public:
  explicit OnDevice(int ordinal);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Fills device memory with zeros, or copies into it, and returns when that is done. On a stream of its own: nothing
// that runs elsewhere is waited for.
void zero_now(void* memory, uint64_t bytes);
void copy_now(void* to, const void* from, uint64_t bytes);

// Host memory at an address that kernels can use, zeroed.
std::shared_ptr<void> make_pinned(int ordinal, uint64_t bytes);

// What is used of the driver's own functions.
struct CudaDriver {
  decltype(&::cuMemAddressReserve) address_reserve;
  decltype(&::cuMemAddressFree) address_free;
  decltype(&::cuMemCreate) create;
  decltype(&::cuMemRelease) release;
  decltype(&::cuMemMap) map;
  decltype(&::cuMemUnmap) unmap;
  decltype(&::cuMemSetAccess) set_access;
  decltype(&::cuMemGetAllocationGranularity) granularity;
  decltype(&::cuMemExportToShareableHandle) export_handle;
  decltype(&::cuMemImportFromShareableHandle) import_handle;
  decltype(&::cuDeviceGetAttribute) device_attribute;
  decltype(&::cuStreamWriteValue64) stream_write;
  decltype(&::cuStreamWaitValue64) stream_wait;
  decltype(&::cuStreamBatchMemOp) stream_batch;
  decltype(&::cuGetErrorString) error_string;
};
const CudaDriver& cuda_driver();

}  // namespace m2n
