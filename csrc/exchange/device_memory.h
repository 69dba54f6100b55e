// SPDX-License-Identifier: Apache-2.0
// What both device comms hold: the machine, and the memory that their launches share.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "exchange/machine.h"
#include "transport/transport.h"

namespace m2n {

// How long one launch of a receive or a poll may wait before the host looks at what only it can see.
inline constexpr int64_t kSliceNs = 20'000'000;

class DeviceMemory {
 public:
  DeviceMemory(const std::string& device, Transport& transport)
      : device_(device), transport_(&transport), machine_(make_machine(device)), control_(on_host<Control>(1)) {}

  const std::string& device() const { return device_; }
  Machine& machine() { return *machine_; }
  Control* control() { return control_; }

  // Zeroed arrays, kept as long as this lives.
  template <class T>
  T* on_device(uint64_t count) {
    kept_.push_back(machine_->allocate(count * sizeof(T)));
    return static_cast<T*>(kept_.back().get());
  }
  template <class T>
  T* on_host(uint64_t count) {
    kept_.push_back(transport_->make_words(count * sizeof(T)));
    return static_cast<T*>(kept_.back().get());
  }
  template <class T>
  T* uploaded(const std::vector<T>& values) {
    T* array = on_device<T>(values.size());
    machine_->upload(array, values.data(), values.size() * sizeof(T));
    return array;
  }

 private:
  std::string device_;
  Transport* transport_;
  std::unique_ptr<Machine> machine_;
  std::vector<std::shared_ptr<void>> kept_;
  Control* control_;
};

}  // namespace m2n
