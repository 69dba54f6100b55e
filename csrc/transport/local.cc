// SPDX-License-Identifier: Apache-2.0
// The table of this process's objects.
#include "transport/local.h"

#include <mutex>
#include <unordered_map>

#include "core/error.h"

namespace m2n {
namespace {

struct LocalObject {
  std::weak_ptr<Window> window;
  unsigned char* data;
  uint32_t num_mappings = 0;
};
struct LocalObjects {
  std::mutex mutex;
  std::unordered_map<uint64_t, LocalObject> by_id;
  uint64_t next_id = 1;
};
LocalObjects& local_objects() {
  static auto* objects = new LocalObjects;  // never destroyed: windows may outlive static destructors
  return *objects;
}

// Counted while it lives.
class LocalMapping final : public Mapping {
 public:
  LocalMapping(std::shared_ptr<Window> window, unsigned char* data, uint64_t id)
      : window_(std::move(window)), data_(data), id_(id) {}
  ~LocalMapping() override {
    std::lock_guard lock(local_objects().mutex);
    const auto found = local_objects().by_id.find(id_);
    if (found != local_objects().by_id.end()) --found->second.num_mappings;
  }
  unsigned char* data() const override { return data_; }

 private:
  std::shared_ptr<Window> window_;
  unsigned char* data_;
  uint64_t id_;
};

}  // namespace

uint64_t add_local_object(std::weak_ptr<Window> window, unsigned char* data) {
  LocalObjects& objects = local_objects();
  std::lock_guard lock(objects.mutex);
  const uint64_t id = objects.next_id++;
  objects.by_id[id] = {std::move(window), data, 0};
  return id;
}

void forget_local_object(uint64_t id) {
  std::lock_guard lock(local_objects().mutex);
  local_objects().by_id.erase(id);
}

bool forget_unmapped_local_object(uint64_t id) {
  std::lock_guard lock(local_objects().mutex);
  const auto found = local_objects().by_id.find(id);
  if (found == local_objects().by_id.end()) return true;
  if (found->second.num_mappings != 0) return false;
  local_objects().by_id.erase(found);
  return true;
}

std::shared_ptr<Mapping> map_local_object(uint64_t id) {
  std::lock_guard lock(local_objects().mutex);
  const auto found = local_objects().by_id.find(id);
  auto window = found == local_objects().by_id.end() ? nullptr : found->second.window.lock();
  if (!window) throw Error(Failure::kSetup, "handshake: the peer in this process has closed its window already");
  auto mapping = std::make_shared<LocalMapping>(std::move(window), found->second.data, id);
  ++found->second.num_mappings;
  return mapping;
}

}  // namespace m2n
