// SPDX-License-Identifier: Apache-2.0
// Where each (token, k) goes: which expert rank, and which row there. Built from top-k ids or from ready-made
// splits; a token goes to an expert rank once, however many of its experts live there.
#pragma once

#include <cstdint>

#include "core/platform.h"
#include "exchange/rows/layout.h"

namespace m2n {

inline constexpr int32_t kNone = -1;
inline constexpr int32_t kUnknown = -2;  // as a source: the route could not be built, and nobody has the row

// T tokens, N expert ranks, R rows in all (R <= T * min(top_k, N)). Plain pointers into fixed-capacity
// arrays.
struct RouteView {
  uint32_t num_tokens;
  uint32_t num_ranks;
  uint32_t* row_offsets;  // [N + 1]: rows of rank r are row_offsets[r] .. row_offsets[r + 1]
  uint32_t* next_row;     // [N]: used while building in one thread
  uint32_t* pair_counts;  // [N]: (row, expert) pairs sent to rank r
  int32_t* token_of_row;  // [R]
  int32_t* ids;           // [R][top_k]: the experts rank r applies to the row, -1 behind the last one
  float* weights;         // [R][top_k]
  int32_t* source_rank;   // [T][top_k]: whose reply row to add next (ascending rank, or top-k order); -1: none
  int32_t* source_row;    // [T][top_k]: row in that rank's reply
  float* source_weight;   // [T][top_k]: with reduce_at=attention; else the expert rank has applied it
};

enum class RouteError : uint32_t { kNone, kIdRange, kIdTwice, kWeight, kRank };

struct RouteResult {
  RouteError error = RouteError::kNone;
  uint32_t token = 0;
  int32_t value = 0;
};

// The expert rank that serves an expert for a token: replicas are taken in turn, from another start on each attention
// rank. The ranks of expert e are ranks[rank_offsets[e] .. rank_offsets[e + 1]).
M2N_HD inline uint32_t replica_of(int32_t id, uint32_t token, uint32_t own_rank, const int32_t* rank_offsets,
                                  const int32_t* ranks) {
  const uint32_t num_replicas = static_cast<uint32_t>(rank_offsets[id + 1] - rank_offsets[id]);
  return static_cast<uint32_t>(ranks[rank_offsets[id] + (token + own_rank) % num_replicas]);
}

// The checks of one token's ids and weights; -1 is padding.
M2N_HD inline RouteResult check_token(const int32_t* ids, const float* weights, uint32_t top_k, uint32_t num_experts,
                                      uint32_t token) {
  for (uint32_t k = 0; k < top_k; ++k) {
    if (ids[k] == kNone) continue;
    if (ids[k] < 0 || static_cast<uint32_t>(ids[k]) >= num_experts) return {RouteError::kIdRange, token, ids[k]};
    for (uint32_t j = 0; j < k; ++j) {
      if (ids[j] == ids[k]) return {RouteError::kIdTwice, token, ids[k]};
    }
    if (!(weights[k] - weights[k] == 0.0f)) return {RouteError::kWeight, token, static_cast<int32_t>(k)};
  }
  return {};
}

// Is this the first of the token's pairs that go to its rank?
template <class RankOf>
M2N_HD bool opens_row(const int32_t* token_ids, uint32_t token, uint32_t k, RankOf&& rank_of) {
  for (uint32_t j = 0; j < k; ++j) {
    if (token_ids[j] != kNone && rank_of(token, j) == rank_of(token, k)) return false;
  }
  return true;
}

// First pass: checks everything and leaves the number of rows of rank r in row_offsets[r + 1].
template <class RankOf>
M2N_HD RouteResult count_rows(const RouteView& route, const Shape& shape, const int32_t* topk_ids,
                              const float* topk_weights, RankOf&& rank_of) {
  for (uint32_t rank = 0; rank <= route.num_ranks; ++rank) route.row_offsets[rank] = 0;
  for (uint32_t token = 0; token < route.num_tokens; ++token) {
    const uint64_t from = static_cast<uint64_t>(token) * shape.top_k;
    const int32_t* ids = topk_ids + from;
    const RouteResult result = check_token(ids, topk_weights + from, shape.top_k, shape.num_experts, token);
    if (result.error != RouteError::kNone) return result;
    for (uint32_t k = 0; k < shape.top_k; ++k) {
      if (ids[k] == kNone) continue;
      if (rank_of(token, k) >= route.num_ranks) return {RouteError::kRank, token, ids[k]};
      if (opens_row(ids, token, k, rank_of)) ++route.row_offsets[rank_of(token, k) + 1];
    }
  }
  return {};
}

// Adds a pair to a row: with reduce_at=expert in ascending expert id, the order of its sum, else in top-k
// order.
M2N_HD inline void add_pair(const RouteView& route, const Shape& shape, uint32_t row, int32_t id, float weight) {
  int32_t* ids = route.ids + static_cast<uint64_t>(row) * shape.top_k;
  float* weights = route.weights + static_cast<uint64_t>(row) * shape.top_k;
  uint32_t at = 0;
  while (ids[at] != kNone) ++at;
  for (; shape.reduce_at == ReduceAt::kExpert && at > 0 && ids[at - 1] > id; --at) {
    ids[at] = ids[at - 1];
    weights[at] = weights[at - 1];
  }
  ids[at] = id;
  weights[at] = weight;
}

// Notes a row of `rank` as a source of the token's result, in ascending rank (reduce_at=expert).
M2N_HD inline void add_source(const RouteView& route, uint64_t from, uint32_t rank, uint32_t row) {
  uint64_t at = from;
  while (route.source_rank[at] != kNone) ++at;
  for (; at > from && route.source_rank[at - 1] > static_cast<int32_t>(rank); --at) {
    route.source_rank[at] = route.source_rank[at - 1];
    route.source_row[at] = route.source_row[at - 1];
  }
  route.source_rank[at] = static_cast<int32_t>(rank);
  route.source_row[at] = static_cast<int32_t>(row);
}

// Second pass, one token: appends its rows and pairs.
template <class RankOf>
M2N_HD void fill_token(const RouteView& route, const Shape& shape, const int32_t* topk_ids, const float* topk_weights,
                       uint32_t token, RankOf&& rank_of) {
  const uint64_t from = static_cast<uint64_t>(token) * shape.top_k;
  for (uint32_t k = 0; k < shape.top_k; ++k) route.source_rank[from + k] = kNone;
  for (uint32_t k = 0; k < shape.top_k; ++k) {
    if (topk_ids[from + k] == kNone) continue;
    const uint32_t rank = rank_of(token, k);
    if (opens_row(topk_ids + from, token, k, rank_of)) {
      const uint32_t row = route.next_row[rank]++;
      route.token_of_row[row] = static_cast<int32_t>(token);
      for (uint32_t j = 0; j < shape.top_k; ++j) {
        route.ids[static_cast<uint64_t>(row) * shape.top_k + j] = kNone;
        route.weights[static_cast<uint64_t>(row) * shape.top_k + j] = 0.0f;
      }
      if (shape.reduce_at == ReduceAt::kExpert) add_source(route, from, rank, row - route.row_offsets[rank]);
    }
    add_pair(route, shape, route.next_row[rank] - 1, topk_ids[from + k], topk_weights[from + k]);
    if (shape.reduce_at == ReduceAt::kAttention) {
      route.source_rank[from + k] = static_cast<int32_t>(rank);
      route.source_row[from + k] = static_cast<int32_t>(route.pair_counts[rank]);
      route.source_weight[from + k] = topk_weights[from + k];
    }
    ++route.pair_counts[rank];
  }
}

// Fills `route`, whose num_tokens and num_ranks are set and whose arrays have full capacity. Serial.
// `rank_of(token, k)` names the expert rank that serves the pair.
template <class RankOf>
M2N_HD RouteResult build_route(const RouteView& route, const Shape& shape, const int32_t* topk_ids,
                               const float* topk_weights, RankOf&& rank_of) {
  const RouteResult result = count_rows(route, shape, topk_ids, topk_weights, rank_of);
  if (result.error != RouteError::kNone) return result;
  for (uint32_t rank = 0; rank < route.num_ranks; ++rank) {
    route.row_offsets[rank + 1] += route.row_offsets[rank];
    route.next_row[rank] = route.row_offsets[rank];
    route.pair_counts[rank] = 0;
  }
  for (uint32_t token = 0; token < route.num_tokens; ++token) {
    fill_token(route, shape, topk_ids, topk_weights, token, rank_of);
  }
  return {};
}

// On the host: throws Error(kArgument) that says what is wrong.
void require_built(const RouteResult& result, const Shape& shape);
// Rows with ready-made splits all have an expert.
void require_full_splits(uint32_t num_tokens, uint32_t num_rows);

}  // namespace m2n
