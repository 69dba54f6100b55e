// SPDX-License-Identifier: Apache-2.0
// The body of gate_dispatch.h on CPU threads that stand for the blocks and threads of a kernel, beside device comms of
// the device "emulated"; compared with the oracle. This is how a kernel can be tested where there is no GPU.
//
// Usage: gate_dispatch. A line for each case; not 0 where a bit differs.
#include <m2n/transport/emulated_exec.h>

#include <cstdint>

#include "gate_check.h"

namespace {

using namespace m2n;

constexpr uint32_t kBlocks = 2;
constexpr uint32_t kThreads = 2;  // of a block

struct Launcher {
  template <class T>
  void operator()(const gate_dispatch::GateDispatch<T>& launch) const {
    run_emulated(kBlocks, kThreads, /*num_shared_words=*/0,
                 [&launch](EmulatedExec& exec) { gate_dispatch::run(exec, launch); });
  }
};

}  // namespace

int main() { return gate_dispatch::check_all("emulated", "shm", Launcher{}); }
