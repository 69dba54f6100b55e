// SPDX-License-Identifier: Apache-2.0
// The driver's calls for memory that is mapped where we want it, with their errors in words.
#include "transport/cuda/memory.h"

#include <cstdio>

namespace m2n {
namespace {

int attribute_of(int ordinal, CUdevice_attribute attribute) {
  int value = 0;
  check_driver(cuda_driver().device_attribute(&value, attribute, ordinal), "cuDeviceGetAttribute");
  return value;
}

bool can_export(int ordinal) {
  return attribute_of(ordinal, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED) != 0;
}

CUmemAllocationProp properties(int ordinal) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, {ordinal}};
  if (can_export(ordinal)) properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return properties;
}

std::string name_of(int ordinal) { return "cuda:" + std::to_string(ordinal); }

}  // namespace

void check_driver(CUresult result, const std::string& what) {
  if (result == CUDA_SUCCESS) return;
  const char* text = nullptr;
  cuda_driver().error_string(result, &text);
  refuse_cuda(what + ": " + (text != nullptr ? text : "unknown error"));
}

uint64_t map_granularity(int ordinal) {
  const OnDevice on_device(ordinal);
  const CUmemAllocationProp wanted = properties(ordinal);
  size_t bytes = 0;
  check_driver(cuda_driver().granularity(&bytes, &wanted, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
               "cuMemGetAllocationGranularity");
  return bytes;
}

void require_gpu_direct(int ordinal) {
  const bool is_supported = attribute_of(ordinal, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED) != 0 &&
                            attribute_of(ordinal, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED) != 0;
  if (!is_supported) refuse_cuda(name_of(ordinal) + " or its driver lets no NIC into its memory; leave out gpu_direct");
  // Else a NIC's rows could become visible after the signal behind them, without a flush by the host in between.
  const int ordering = attribute_of(ordinal, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING);
  if (ordering < CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER) {
    refuse_cuda(
        "a NIC's writes into the memory of " + name_of(ordinal) +
        " need a flush before its kernels may read them, which m2n does not do; leave out gpu_direct (Hopper and newer "
        "GPUs need none)");
  }
}

Allocation make_allocation(int ordinal, uint64_t bytes, bool is_for_nics) {
  CUmemAllocationProp wanted = properties(ordinal);
  wanted.allocFlags.gpuDirectRDMACapable = is_for_nics ? 1 : 0;
  Allocation allocation{};
  check_driver(cuda_driver().create(&allocation, bytes, &wanted, 0),
               "cannot allocate " + std::to_string(bytes) + " bytes of " + name_of(ordinal));
  return allocation;
}

Fd export_allocation(int ordinal, Allocation allocation) {
  if (!can_export(ordinal)) return Fd();
  int fd = -1;
  check_driver(cuda_driver().export_handle(&fd, allocation, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
               "cuMemExportToShareableHandle");
  return Fd(fd);
}

Allocation import_allocation(int fd) {
  if (fd < 0) {
    refuse_cuda(
        "the peer is another process, and its system cannot share memory of a GPU between processes by file "
        "descriptors; run both ranks in one process");
  }
  Allocation allocation{};
  // The driver takes the number itself for the pointer.
  void* number = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
  check_driver(cuda_driver().import_handle(&allocation, number, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
               "cannot import the peer's memory (cuMemImportFromShareableHandle)");
  return allocation;
}

void allow_access(int ordinal, CUdeviceptr at, uint64_t bytes, CUmemAccess_flags flags) {
  CUmemAccessDesc access{};
  access.location = {CU_MEM_LOCATION_TYPE_DEVICE, {ordinal}};
  access.flags = flags;
  check_driver(cuda_driver().set_access(at, bytes, &access, 1), "cuMemSetAccess for " + name_of(ordinal));
}

std::string device_uuid(int ordinal) {
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties");
  std::string text;
  for (const char byte : properties.uuid.bytes) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned>(static_cast<unsigned char>(byte)));
    text += digits;
  }
  return text;
}

int reachable_device(int ordinal, const std::string& uuid) {
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  for (int other = 0; other < count; ++other) {
    if (device_uuid(other) != uuid) continue;
    int can_access = other == ordinal;
    if (can_access == 0) check_cuda(cudaDeviceCanAccessPeer(&can_access, ordinal, other), "cudaDeviceCanAccessPeer");
    if (can_access == 0) {
      refuse_cuda(
          name_of(ordinal) + " cannot write into the memory of " + name_of(other) +
          ", on which the peer is: the two have no peer access (nvidia-smi topo -p2p w); put both ranks on one of "
          "them, or give one device=\"cpu\" and both Config(transport=\"shm\")");
    }
    return other;
  }
  refuse_cuda("the peer is on the GPU with UUID " + uuid + ", which is not among the " + std::to_string(count) +
              " devices that this process sees; both must see both (CUDA_VISIBLE_DEVICES)");
}

}  // namespace m2n
