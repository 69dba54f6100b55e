// SPDX-License-Identifier: Apache-2.0
// The body of gate_dispatch.h as a kernel, beside device comms of the device "cuda:0"; compared with the oracle.
//
// Usage: gate_dispatch_cuda. A line for each case; 1 where a bit differs, 77 where there is no GPU.
#include <m2n/core/kernel_exec.h>
#include <m2n/transport/choice.h>
#include <m2n/transport/cuda/api.h>

#include <cstdint>
#include <cstdio>
#include <string>

#include "gate_check.h"

namespace {

using namespace m2n;

constexpr uint32_t kBlocks = 4;  // few enough that all run at once
constexpr uint32_t kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads)
    gate_dispatch_kernel(const __grid_constant__ gate_dispatch::GateDispatch<T> launch) {
  KernelExec exec;
  gate_dispatch::run(exec, launch);
}

struct Launcher {
  template <class T>
  void operator()(const gate_dispatch::GateDispatch<T>& launch) const {
    gate_dispatch_kernel<<<kBlocks, kThreads, 0, static_cast<cudaStream_t>(gate_dispatch::kStream)>>>(launch);
    check_cuda(cudaGetLastError(), "the kernel could not be launched");
  }
};

}  // namespace

int main() {
  if (const std::string reason = why_no_cuda(); !reason.empty()) {
    std::printf("not run: %s\n", reason.c_str());
    return 77;
  }
  return gate_dispatch::check_all("cuda:0", "cuda:0", Launcher{});
}
