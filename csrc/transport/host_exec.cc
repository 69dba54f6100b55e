// SPDX-License-Identifier: Apache-2.0
// Not in the header, which kernels include too: nvcc takes no lambda of the host there.
#include "transport/host_exec.h"

namespace m2n {

void wake_sleepers(WakeWord* own_wake, Network* network) {
  wake_waiters(own_wake, [network](const uint32_t* word) {
    futex_wake_all(word);
    if (network != nullptr) network->interrupt();
  });
}

}  // namespace m2n
