// SPDX-License-Identifier: Apache-2.0
// Memory of the host that a GPU uses too: the windows of the shared-memory transport, registered with the driver. For
// links between a rank on a CPU and one on a GPU. Kernels read and write it across the bus; they may touch the objects
// of peers, and not the holes between them.
#include <map>
#include <mutex>
#include <vector>

#include "transport/choice.h"
#include "transport/cuda/api.h"

namespace m2n {
namespace {

// How often memory is registered, by its address: the two ranks of a link may live in one process, and the driver
// takes each address once.
struct Registered {
  std::mutex mutex;
  std::map<void*, uint32_t> counts;
};
Registered& registered() {
  static auto* all = new Registered;  // never destroyed: windows may outlive static destructors
  return *all;
}

// Kernels can use the memory, at the addresses that the host has for it, as long as what is returned lives.
std::shared_ptr<void> register_memory(int ordinal, void* memory, uint64_t bytes) {
  const OnDevice on_device(ordinal);
  const std::lock_guard lock(registered().mutex);
  if (registered().counts[memory] == 0) {
    check_cuda(cudaHostRegister(memory, bytes, cudaHostRegisterMapped | cudaHostRegisterPortable),
               "shared memory cannot be registered for the GPU (cudaHostRegister); is the limit of locked memory "
               "(ulimit -l) too low?");
  }
  ++registered().counts[memory];
  return {memory, [forks = fork_count()](void* data) {
            if (forks != fork_count()) return;  // a forked child has no devices
            const std::lock_guard lock(registered().mutex);
            if (--registered().counts[data] != 0) return;
            registered().counts.erase(data);
            cudaHostUnregister(data);
          }};
}

class PinnedWindow final : public Window {
 public:
  PinnedWindow(int ordinal, std::shared_ptr<Window> inner, uint64_t stride_bytes)
      : ordinal_(ordinal),
        inner_(std::move(inner)),
        stride_bytes_(stride_bytes),
        registrations_(inner_->bytes() / stride_bytes) {}

  unsigned char* data() const override { return inner_->data(); }
  uint64_t bytes() const override { return inner_->bytes(); }
  Handle add_object(uint32_t peer_idx) override {
    Handle handle = inner_->add_object(peer_idx);
    registrations_.at(peer_idx) = register_memory(ordinal_, data() + stride_bytes_ * peer_idx, handle.bytes);
    return handle;
  }
  bool remove_object(uint32_t peer_idx) override {
    registrations_.at(peer_idx).reset();
    return inner_->remove_object(peer_idx);
  }
  void set_word(uint64_t offset, uint64_t value) override { inner_->set_word(offset, value); }

 private:
  int ordinal_;
  std::shared_ptr<Window> inner_;
  uint64_t stride_bytes_;
  std::vector<std::shared_ptr<void>> registrations_;  // by peer index; end before the window
};

class PinnedMapping final : public Mapping {
 public:
  PinnedMapping(int ordinal, std::shared_ptr<Mapping> inner, uint64_t bytes)
      : inner_(std::move(inner)), registration_(register_memory(ordinal, inner_->data(), bytes)) {}
  unsigned char* data() const override { return inner_->data(); }

 private:
  std::shared_ptr<Mapping> inner_;
  std::shared_ptr<void> registration_;  // ends before the mapping
};

class PinnedTransport final : public Transport {
 public:
  explicit PinnedTransport(const std::string& device) : ordinal_(cuda_ordinal(device)), shm_(make_host_transport()) {
    int is_same_address = 0;
    check_cuda(cudaDeviceGetAttribute(&is_same_address, cudaDevAttrCanUseHostPointerForRegisteredMem, ordinal_),
               "cudaDeviceGetAttribute");
    if (is_same_address == 0) {
      refuse_cuda("this GPU cannot use memory of the host at the host's addresses, which transport=\"shm\" needs");
    }
  }

  uint64_t page_bytes() const override { return shm_->page_bytes(); }
  std::shared_ptr<void> make_words(uint64_t bytes) override { return make_pinned(ordinal_, bytes); }
  std::shared_ptr<Window> make_window(uint64_t object_bytes, uint64_t stride_bytes, uint32_t max_peers) override {
    return std::make_shared<PinnedWindow>(ordinal_, shm_->make_window(object_bytes, stride_bytes, max_peers),
                                          stride_bytes);
  }
  std::shared_ptr<Mapping> attach(Handle handle, const Origin& origin) override {
    const uint64_t bytes = handle.bytes;
    return std::make_shared<PinnedMapping>(ordinal_, shm_->attach(std::move(handle), origin), bytes);
  }
  // Both areas lie behind each other, or (no rows) one alone.
  std::shared_ptr<void> expose(const Areas& send) override {
    unsigned char* memory = send.rows_bytes != 0 ? send.rows : send.meta;
    const uint64_t behind = reinterpret_cast<uintptr_t>(memory) % kPageBytes;  // whole pages are registered
    return register_memory(ordinal_, memory - behind, round_up(behind + send.rows_bytes + send.meta_bytes, kPageBytes));
  }

 private:
  int ordinal_;
  std::unique_ptr<Transport> shm_;
};

}  // namespace

std::unique_ptr<Transport> make_pinned_transport(const Choice& choice) {
  return std::make_unique<PinnedTransport>(choice.device);
}

}  // namespace m2n
