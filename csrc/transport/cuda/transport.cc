// SPDX-License-Identifier: Apache-2.0
// Memory of a GPU: windows are one reserved range of addresses, into which each peer's own allocation is mapped. What
// no allocation covers is backed by one shared object of zeros. A peer of another process maps its object by a
// descriptor.
#include <vector>

#include "core/error.h"
#include "transport/choice.h"
#include "transport/cuda/memory.h"
#include "transport/local.h"

namespace m2n {
namespace {

class CudaWindow final : public Window, public std::enable_shared_from_this<CudaWindow> {
 public:
  CudaWindow(int ordinal, bool is_for_nics, uint64_t piece_bytes, uint64_t object_bytes, uint64_t stride_bytes,
             uint32_t max_peers)
      : ordinal_(ordinal),
        is_for_nics_(is_for_nics),
        piece_bytes_(piece_bytes),
        object_bytes_(object_bytes),
        stride_bytes_(stride_bytes),
        objects_(max_peers) {
    const OnDevice on_device(ordinal_);
    check_driver(cuda_driver().address_reserve(&base_, bytes(), piece_bytes_, 0, 0), "cannot reserve addresses");
    try {
      back_with_zeros();
    } catch (...) {
      free_all();
      throw;
    }
  }

  ~CudaWindow() override {
    for (const Object& object : objects_) forget_local_object(object.id);
    if (fork_count_ != fork_count()) return;  // a forked child has no devices
    free_all();
  }

  unsigned char* data() const override { return reinterpret_cast<unsigned char*>(base_); }
  uint64_t bytes() const override { return stride_bytes_ * objects_.size(); }

  Handle add_object(uint32_t peer_idx) override {
    if (peer_idx >= objects_.size()) refuse_cuda("peer index beyond max_peers");
    const OnDevice on_device(ordinal_);
    const CUdeviceptr at = base_ + stride_bytes_ * peer_idx;
    Object& object = objects_[peer_idx];
    object.allocation = make_allocation(ordinal_, object_bytes_, is_for_nics_);
    object.is_made = true;
    check_driver(cuda_driver().unmap(at, object_bytes_), "cuMemUnmap");
    check_driver(cuda_driver().map(at, object_bytes_, 0, object.allocation, 0), "cuMemMap");
    allow_access(ordinal_, at, object_bytes_, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    zero_now(reinterpret_cast<void*>(at), object_bytes_);
    Handle handle{export_allocation(ordinal_, object.allocation), object_bytes_, 0};
    object.id = handle.id = add_local_object(weak_from_this(), reinterpret_cast<unsigned char*>(at));
    return handle;
  }

  // The memory of an object lives on for whoever has mapped it by its descriptor.
  bool remove_object(uint32_t peer_idx) override {
    Object& object = objects_.at(peer_idx);
    if (!object.is_made) return true;
    if (!forget_unmapped_local_object(object.id)) return false;
    const OnDevice on_device(ordinal_);
    const CUdeviceptr at = base_ + stride_bytes_ * peer_idx;
    check_driver(cuda_driver().unmap(at, object_bytes_), "cuMemUnmap");
    map_zeros(at, object_bytes_);
    cuda_driver().release(object.allocation);
    object = {};
    return true;
  }

  void set_word(uint64_t offset, uint64_t value) override {
    const OnDevice on_device(ordinal_);
    copy_now(data() + offset, &value, sizeof value);
  }

 private:
  struct Object {
    Allocation allocation{};
    uint64_t id = 0;
    bool is_made = false;
  };

  // Where nothing is mapped; readable.
  void map_zeros(CUdeviceptr at, uint64_t num_bytes) {
    for (uint64_t offset = 0; offset < num_bytes; offset += piece_bytes_) {
      check_driver(cuda_driver().map(at + offset, piece_bytes_, 0, zeros_.allocation, 0), "cuMemMap");
      if (at + offset == base_ + mapped_bytes_) mapped_bytes_ += piece_bytes_;
    }
    allow_access(ordinal_, at, num_bytes, CU_MEM_ACCESS_FLAGS_PROT_READ);
  }

  void back_with_zeros() {
    zeros_.allocation = make_allocation(ordinal_, piece_bytes_, is_for_nics_);
    zeros_.is_made = true;
    map_zeros(base_, bytes());
    allow_access(ordinal_, base_, piece_bytes_, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    zero_now(data(), piece_bytes_);
    allow_access(ordinal_, base_, piece_bytes_, CU_MEM_ACCESS_FLAGS_PROT_READ);
  }

  void free_all() {
    if (mapped_bytes_ != 0) cuda_driver().unmap(base_, mapped_bytes_);
    const auto release = [](const Object& object) {
      if (object.is_made) cuda_driver().release(object.allocation);
    };
    for (const Object& object : objects_) release(object);
    release(zeros_);
    cuda_driver().address_free(base_, bytes());
  }

  const uint32_t fork_count_ = fork_count();
  int ordinal_;
  bool is_for_nics_;
  uint64_t piece_bytes_;
  uint64_t object_bytes_;
  uint64_t stride_bytes_;
  CUdeviceptr base_ = 0;
  uint64_t mapped_bytes_ = 0;    // from the beginning on, when they are mapped for the first time
  Object zeros_;                 // a piece of them, wherever there is no object
  std::vector<Object> objects_;  // by peer index
};

// An object of another process. Its memory outlives the process that made it: nothing faults here when that dies.
class CudaMapping final : public Mapping {
 public:
  CudaMapping(int ordinal, int fd, uint64_t bytes, uint64_t piece_bytes) : ordinal_(ordinal), bytes_(bytes) {
    const OnDevice on_device(ordinal_);
    const Allocation object = import_allocation(fd);
    CUresult result = cuda_driver().address_reserve(&base_, bytes_, piece_bytes, 0, 0);
    if (result == CUDA_SUCCESS) {
      result = cuda_driver().map(base_, bytes_, 0, object, 0);
      is_mapped_ = result == CUDA_SUCCESS;
    }
    cuda_driver().release(object);  // the mapping keeps it
    try {
      check_driver(result, "cannot map the peer's memory; both sides must run the same version and shape");
      allow_access(ordinal_, base_, bytes_, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    } catch (...) {
      free_all();
      throw;
    }
  }
  ~CudaMapping() override {
    if (fork_count_ == fork_count()) free_all();  // a forked child has no devices
  }
  unsigned char* data() const override { return reinterpret_cast<unsigned char*>(base_); }

 private:
  void free_all() {
    if (is_mapped_) cuda_driver().unmap(base_, bytes_);
    if (base_ != 0) cuda_driver().address_free(base_, bytes_);
  }

  const uint32_t fork_count_ = fork_count();
  int ordinal_;
  uint64_t bytes_;
  CUdeviceptr base_ = 0;
  bool is_mapped_ = false;
};

class CudaTransport final : public Transport {
 public:
  // `is_for_nics`: they write and read the windows (GPUDirect).
  CudaTransport(const std::string& device, bool is_for_nics)
      : ordinal_(cuda_ordinal(device)),
        is_for_nics_(is_for_nics),
        page_bytes_(map_granularity(ordinal_)),
        uuid_(device_uuid(ordinal_)) {
    if (is_for_nics) require_gpu_direct(ordinal_);
  }

  uint64_t page_bytes() const override { return page_bytes_; }
  std::shared_ptr<void> make_words(uint64_t bytes) override { return make_pinned(ordinal_, bytes); }

  std::shared_ptr<Window> make_window(uint64_t object_bytes, uint64_t stride_bytes, uint32_t max_peers) override {
    return std::make_shared<CudaWindow>(ordinal_, is_for_nics_, page_bytes_, object_bytes, stride_bytes, max_peers);
  }

  Origin origin() const override { return {process_nonce(), uuid_}; }

  std::shared_ptr<Mapping> attach(Handle handle, const Origin& origin) override {
    const int maker = origin.device == uuid_ ? ordinal_ : reachable_device(ordinal_, origin.device);
    if (origin.process != process_nonce()) {
      return std::make_shared<CudaMapping>(ordinal_, handle.fd.get(), handle.bytes, page_bytes_);
    }
    auto mapping = map_local_object(handle.id);
    if (maker != ordinal_) {
      const OnDevice on_device(ordinal_);
      const auto at = reinterpret_cast<CUdeviceptr>(mapping->data());
      allow_access(ordinal_, at, handle.bytes, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    }
    return mapping;
  }

 private:
  int ordinal_;
  bool is_for_nics_;
  uint64_t page_bytes_;
  std::string uuid_;
};

}  // namespace

std::unique_ptr<Transport> make_cuda_transport(const Choice& choice) {
  return std::make_unique<CudaTransport>(choice.device, /*is_for_nics=*/choice.kind == Choice::Kind::kGpuDirect);
}

std::string why_no_cuda() {
  try {
    CudaTransport transport("cuda", /*is_for_nics=*/false);
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

}  // namespace m2n
