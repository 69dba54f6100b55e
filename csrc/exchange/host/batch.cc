// SPDX-License-Identifier: Apache-2.0
// Batches whose memory is used again. Kept by thread: no lock, and nothing that a fork could leave locked.
#include "exchange/host/batch.h"

#include "core/hold.h"

namespace m2n {
namespace {

constexpr size_t kMaxSpare = 64;  // of one thread; more are freed

// Trivial, so it can still be read while the thread ends and has lost its spare ones.
thread_local bool is_thread_over = false;

struct Spare {
  std::vector<std::unique_ptr<Batch>> batches;
  std::vector<void*> blocks;  // where std::shared_ptr counts

  Spare() {
    batches.reserve(kMaxSpare);
    blocks.reserve(kMaxSpare);
  }
  ~Spare() {
    is_thread_over = true;
    for (void* block : blocks) ::operator delete(block);
  }
};
thread_local Spare spare;

void drop(Batch* batch) {
  std::unique_ptr<Batch> owned(batch);
  if (!batch->is_answered) batch->drop_holds();
  if (!is_thread_over && spare.batches.size() < kMaxSpare) spare.batches.push_back(std::move(owned));
}

// Only for the counts of Batch pointers: all its blocks have one size.
template <class T>
struct BlockAllocator {
  using value_type = T;
  BlockAllocator() = default;
  template <class U>
  BlockAllocator(const BlockAllocator<U>&) {}
  template <class U>
  bool operator==(const BlockAllocator<U>&) const {
    return true;
  }

  T* allocate(size_t count) {
    if (is_thread_over || spare.blocks.empty()) return static_cast<T*>(::operator new(count * sizeof(T)));
    void* block = spare.blocks.back();
    spare.blocks.pop_back();
    return static_cast<T*>(block);
  }
  void deallocate(T* block, size_t) {
    if (is_thread_over || spare.blocks.size() == kMaxSpare) return ::operator delete(block);
    spare.blocks.push_back(block);
  }
};

}  // namespace

void Batch::drop_holds() {
  for (const BatchMessage& message : messages) {
    end_hold(&holds[message.arrived.peer_idx * num_slots + message.arrived.slot]);
  }
}

std::shared_ptr<Batch> make_batch() {
  std::unique_ptr<Batch> batch;
  if (is_thread_over || spare.batches.empty()) {
    batch = std::make_unique<Batch>();
  } else {
    batch = std::move(spare.batches.back());
    spare.batches.pop_back();
    batch->messages.clear();
    batch->ranks.clear();
    batch->is_answered = false;
  }
  return {batch.release(), drop, BlockAllocator<Batch>()};
}

}  // namespace m2n
