// SPDX-License-Identifier: Apache-2.0
// How a kernel runs a body: its blocks and threads; a group of lanes is a warp.
#pragma once

#include <cstdint>

#include "core/wake.h"

#if defined(__CUDACC__)

namespace m2n {

class KernelExec {
 public:
  // `shared`: memory that the threads of a block share; needed by the bodies that ask for it.
  __device__ explicit KernelExec(uint32_t* shared = nullptr) : shared_(shared) {}

  __device__ uint32_t thread() const { return threadIdx.x; }
  __device__ uint32_t num_threads() const { return blockDim.x; }
  __device__ uint32_t block() const { return blockIdx.x; }
  __device__ uint32_t num_blocks() const { return gridDim.x; }
  __device__ uint32_t lane() const { return threadIdx.x % warpSize; }
  __device__ uint32_t num_lanes() const { return warpSize; }
  __device__ void sync_lanes() const { __syncwarp(); }
  __device__ uint32_t from_first_lane(uint32_t value) const { return __shfl_sync(0xFFFFFFFFu, value, 0); }
  __device__ uint32_t max_of_lanes(uint32_t value, uint32_t num_lanes) const {
    for (uint32_t step = num_lanes / 2; step > 0; step /= 2) {
      value = max(value, __shfl_xor_sync(0xFFFFFFFFu, value, step));
    }
    return value;
  }
  __device__ uint32_t* shared() const { return shared_; }
  __device__ void sync() const { __syncthreads(); }
  __device__ bool any(bool is_true) const { return __syncthreads_or(is_true) != 0; }
  __device__ void pause() const {}  // a look takes 0.2 us by itself
  __device__ int64_t now_ns() const {
    int64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
  }
  __device__ void wake(WakeWord*) const {}  // whoever waits for a device's signal polls

 private:
  uint32_t* shared_;
};

}  // namespace m2n

#endif
