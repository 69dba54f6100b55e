// SPDX-License-Identifier: Apache-2.0
// Memory of one GPU, for ranks of one process: windows are one reserved range of addresses, into which each peer's own
// allocation is mapped. What no allocation covers is backed by one shared object of zeros.
#include <vector>

#include "core/error.h"
#include "transport/cuda_api.h"
#include "transport/local.h"
#include "transport/transport.h"

namespace m2n {
namespace {

using Allocation = CUmemGenericAllocationHandle;

void check(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  const char* text = nullptr;
  cuda_driver().error_string(result, &text);
  throw Error(Failure::kSetup, std::string("cuda: ") + what + ": " + (text != nullptr ? text : "unknown error"));
}

CUmemAllocationProp properties(int ordinal) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, {ordinal}};
  return properties;
}

// The size that maps are made of: 2 MiB on all devices so far.
uint64_t granularity(int ordinal) {
  const CUmemAllocationProp wanted = properties(ordinal);
  size_t bytes = 0;
  check(cuda_driver().granularity(&bytes, &wanted, CU_MEM_ALLOC_GRANULARITY_MINIMUM), "cuMemGetAllocationGranularity");
  return bytes;
}

class CudaWindow final : public Window, public std::enable_shared_from_this<CudaWindow> {
 public:
  CudaWindow(int ordinal, uint64_t piece_bytes, uint64_t object_bytes, uint64_t stride_bytes, uint32_t max_peers)
      : ordinal_(ordinal),
        piece_bytes_(piece_bytes),
        object_bytes_(object_bytes),
        stride_bytes_(stride_bytes),
        max_peers_(max_peers) {
    const OnDevice on_device(ordinal_);
    check(cuda_driver().address_reserve(&base_, bytes(), piece_bytes_, 0, 0), "cannot reserve addresses");
    try {
      back_with_zeros();
    } catch (...) {
      free_all();
      throw;
    }
  }

  ~CudaWindow() override {
    for (uint64_t id : ids_) forget_local_object(id);
    if (fork_count_ != fork_count()) return;  // a forked child has no devices
    free_all();
  }

  unsigned char* data() const override { return reinterpret_cast<unsigned char*>(base_); }
  uint64_t bytes() const override { return stride_bytes_ * max_peers_; }

  Handle add_object(uint32_t peer_idx) override {
    if (peer_idx >= max_peers_) throw Error(Failure::kSetup, "cuda: peer index beyond max_peers");
    const OnDevice on_device(ordinal_);
    const CUdeviceptr at = base_ + stride_bytes_ * peer_idx;
    const Allocation object = make(object_bytes_);
    check(cuda_driver().unmap(at, object_bytes_), "cuMemUnmap");
    check(cuda_driver().map(at, object_bytes_, 0, object, 0), "cuMemMap");
    allow(at, object_bytes_, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    zero_now(reinterpret_cast<void*>(at), object_bytes_);
    Handle handle;
    handle.bytes = object_bytes_;
    handle.id = add_local_object(weak_from_this(), reinterpret_cast<unsigned char*>(at));
    ids_.push_back(handle.id);
    return handle;
  }

  void set_word(uint64_t offset, uint64_t value) override {
    const OnDevice on_device(ordinal_);
    copy_now(data() + offset, &value, sizeof value);
  }

 private:
  Allocation make(uint64_t num_bytes) {
    const CUmemAllocationProp wanted = properties(ordinal_);
    Allocation allocation{};
    check(cuda_driver().create(&allocation, num_bytes, &wanted, 0), "cannot allocate device memory");
    allocations_.push_back(allocation);
    return allocation;
  }

  void allow(CUdeviceptr at, uint64_t num_bytes, CUmemAccess_flags flags) {
    CUmemAccessDesc access{};
    access.location = {CU_MEM_LOCATION_TYPE_DEVICE, {ordinal_}};
    access.flags = flags;
    check(cuda_driver().set_access(at, num_bytes, &access, 1), "cuMemSetAccess");
  }

  void back_with_zeros() {
    const Allocation zeros = make(piece_bytes_);
    for (; mapped_bytes_ < bytes(); mapped_bytes_ += piece_bytes_) {
      check(cuda_driver().map(base_ + mapped_bytes_, piece_bytes_, 0, zeros, 0), "cuMemMap");
    }
    allow(base_, piece_bytes_, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    zero_now(data(), piece_bytes_);
    allow(base_, bytes(), CU_MEM_ACCESS_FLAGS_PROT_READ);
  }

  void free_all() {
    if (mapped_bytes_ != 0) cuda_driver().unmap(base_, mapped_bytes_);
    for (const Allocation allocation : allocations_) cuda_driver().release(allocation);
    cuda_driver().address_free(base_, bytes());
  }

  const uint32_t fork_count_ = fork_count();
  int ordinal_;
  uint64_t piece_bytes_;
  uint64_t object_bytes_;
  uint64_t stride_bytes_;
  uint32_t max_peers_;
  CUdeviceptr base_ = 0;
  uint64_t mapped_bytes_ = 0;
  std::vector<Allocation> allocations_;
  std::vector<uint64_t> ids_;
};

class CudaTransport final : public Transport {
 public:
  explicit CudaTransport(const std::string& device)
      : ordinal_(cuda_ordinal(device)), page_bytes_(granularity_of(ordinal_)) {}

  uint64_t page_bytes() const override { return page_bytes_; }
  std::shared_ptr<void> make_words(uint64_t bytes) override { return make_pinned(ordinal_, bytes); }

  std::shared_ptr<Window> make_window(uint64_t object_bytes, uint64_t stride_bytes, uint32_t max_peers) override {
    return std::make_shared<CudaWindow>(ordinal_, page_bytes_, object_bytes, stride_bytes, max_peers);
  }

  std::shared_ptr<Mapping> attach(Handle handle, uint64_t process) override {
    if (process == process_nonce()) return map_local_object(handle.id);
    throw Error(Failure::kSetup, "cuda: the peer is another process; this version links GPU ranks of one process only");
  }

 private:
  static uint64_t granularity_of(int ordinal) {
    const OnDevice on_device(ordinal);
    return granularity(ordinal);
  }

  int ordinal_;
  uint64_t page_bytes_;
};

}  // namespace

std::unique_ptr<Transport> make_cuda_transport(const std::string& device) {
  return std::make_unique<CudaTransport>(device);
}

std::string why_no_cuda() {
  try {
    CudaTransport transport("cuda");
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

}  // namespace m2n
