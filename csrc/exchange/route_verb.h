// SPDX-License-Identifier: Apache-2.0
// Building a route where the router's top-k lies. For one thread so far.
#pragma once

#include <cstdint>

#include "core/arrive.h"
#include "exchange/dtype.h"
#include "exchange/layout.h"
#include "exchange/route.h"

namespace m2n {

enum class IdType : uint32_t { kInt32, kInt64 };
enum class WeightType : uint32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// What the host learns of a route, in host memory.
struct RouteOutcome {
  RouteResult result;
  uint32_t num_rows;
  uint32_t num_pairs;
};

struct RouteVerb {
  RouteView route;
  Shape shape;
  const void* topk_ids;  // [T][top_k] of id_type, at strides in elements
  IdType id_type;
  int64_t ids_stride, ids_step;
  const void* topk_weights;  // likewise
  WeightType weight_type;
  int64_t weights_stride, weights_step;
  int32_t* ids;                 // [T][top_k]: the private copies that are checked and used
  float* weights;               // likewise
  const int32_t* rank_offsets;  // [num_experts + 1], into `ranks`: the expert ranks that host an expert
  const int32_t* ranks;
  uint32_t own_rank;
  const uint32_t* split_offsets;  // [N + 1], where the rows are sorted by destination already; else nullptr
  RouteOutcome* outcome;
  uint32_t* rows_per_rank;  // host memory [N]
};

// The private copies; an id beyond int32 becomes one that is refused.
M2N_HD inline void copy_topk(const RouteVerb& verb) {
  for (uint32_t i = 0; i < verb.route.num_tokens * verb.shape.top_k; ++i) {
    const int64_t token = i / verb.shape.top_k;
    const int64_t k = i % verb.shape.top_k;
    const int64_t id_at = token * verb.ids_stride + k * verb.ids_step;
    const int64_t id = verb.id_type == IdType::kInt32 ? static_cast<const int32_t*>(verb.topk_ids)[id_at]
                                                      : static_cast<const int64_t*>(verb.topk_ids)[id_at];
    verb.ids[i] = id == static_cast<int32_t>(id) ? static_cast<int32_t>(id) : INT32_MAX;
    const int64_t at = token * verb.weights_stride + k * verb.weights_step;
    switch (verb.weight_type) {
      case WeightType::kFloat32:
        verb.weights[i] = static_cast<const float*>(verb.topk_weights)[at];
        break;
      case WeightType::kBFloat16:
        verb.weights[i] = to_float(static_cast<const BFloat16*>(verb.topk_weights)[at]);
        break;
      case WeightType::kFloat16:
        verb.weights[i] = to_float(static_cast<const Float16*>(verb.topk_weights)[at]);
        break;
      case WeightType::kFloat64:
        verb.weights[i] = static_cast<float>(static_cast<const double*>(verb.topk_weights)[at]);
        break;
    }
  }
}

M2N_HD inline uint32_t rank_of_pair(const RouteVerb& verb, uint32_t token, uint32_t k) {
  if (verb.split_offsets != nullptr) {
    uint32_t rank = 0;
    while (token >= verb.split_offsets[rank + 1]) ++rank;
    return rank;
  }
  const int32_t id = verb.ids[uint64_t{token} * verb.shape.top_k + k];
  return replica_of(id, token, verb.own_rank, verb.rank_offsets, verb.ranks);
}

template <class Exec>
M2N_HD void run(Exec& exec, const RouteVerb& verb) {
  if (exec.block() != 0 || !is_leader(exec)) return;
  copy_topk(verb);
  const auto rank_of = [&](uint32_t token, uint32_t k) { return rank_of_pair(verb, token, k); };
  verb.outcome->result = build_route(verb.route, verb.shape, verb.ids, verb.weights, rank_of);
  verb.outcome->num_rows = verb.outcome->num_pairs = 0;
  if (verb.outcome->result.error != RouteError::kNone) return;
  for (uint32_t rank = 0; rank < verb.route.num_ranks; ++rank) {
    verb.rows_per_rank[rank] = verb.route.row_offsets[rank + 1] - verb.route.row_offsets[rank];
    verb.outcome->num_rows += verb.rows_per_rank[rank];
    verb.outcome->num_pairs += verb.route.pair_counts[rank];
  }
}

}  // namespace m2n
