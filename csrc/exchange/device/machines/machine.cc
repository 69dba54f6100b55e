// SPDX-License-Identifier: Apache-2.0
// Names of devices -> machines.
#include "exchange/device/machines/machine.h"

#include "core/error.h"

namespace m2n {

std::unique_ptr<Machine> make_emulated_machine();
#if M2N_HAS_CUDA
std::unique_ptr<Machine> make_cuda_machine(const std::string& device);
#endif

std::unique_ptr<Machine> make_machine(const std::string& device) {
  if (device == "emulated") return make_emulated_machine();
#if M2N_HAS_CUDA
  if (device.starts_with("cuda")) return make_cuda_machine(device);
#endif
  throw Error(Failure::kSetup, "device: '" + device + "' is not known to this build");
}

}  // namespace m2n
