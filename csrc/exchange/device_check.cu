// SPDX-License-Identifier: Apache-2.0
// Compiles the four bodies for a device, one kernel each, so that host-only code in them is noticed at once.
#include "exchange/combine.h"
#include "exchange/dispatch.h"
#include "exchange/route.h"

namespace m2n::device_check {

// One block; a waiting GPU polls, so there is nobody to wake.
struct BlockExec {
  __device__ uint32_t thread() const { return threadIdx.x; }
  __device__ uint32_t num_threads() const { return blockDim.x; }
  __device__ uint32_t block() const { return blockIdx.x; }
  __device__ uint32_t num_blocks() const { return gridDim.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void wake(WakeWord*) const {}
};

__global__ void dispatch_send_kernel(Layout layout, DispatchSend send) {
  BlockExec exec;
  dispatch_send(exec, layout, send);
}

__global__ void dispatch_recv_kernel(Layout layout, ArrivedMessage* messages, uint32_t num_messages, int32_t* ids,
                                     float* weights, const int32_t* expert_idx, uint32_t num_local_experts,
                                     int32_t* next, BatchView batch, uint32_t num_experts, RecvResult* result) {
  if (threadIdx.x != 0) return;
  *result = take_ids(messages[0], layout.top_k, num_experts, expert_idx, ids, weights);
  count_pairs(ids, messages[0].num_rows, layout.top_k, expert_idx, batch.expert_offsets);
  dispatch_recv(layout, messages, num_messages, ids, weights, expert_idx, num_local_experts, next, batch);
}

__global__ void combine_send_kernel(Layout layout, Shape shape, CombineSend send) {
  BlockExec exec;
  combine_send(exec, layout, shape, send);
}

__global__ void combine_recv_kernel(Layout layout, Shape shape, CombineRecv recv) {
  BlockExec exec;
  combine_recv(exec, layout, shape, recv);
}

__global__ void route_kernel(RouteView route, Shape shape, const int32_t* ids, const float* weights,
                             const int32_t* rank_of_expert, RouteResult* result) {
  const auto rank_of = [=](uint32_t token, uint32_t k) {
    return static_cast<uint32_t>(rank_of_expert[ids[token * uint64_t{shape.top_k} + k]]);
  };
  if (threadIdx.x == 0) *result = build_route(route, shape, ids, weights, rank_of);
}

}  // namespace m2n::device_check
