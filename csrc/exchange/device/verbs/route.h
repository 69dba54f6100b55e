// SPDX-License-Identifier: Apache-2.0
// Building a route where the router's top-k lies, by the threads of one block.
#pragma once

#include <cstdint>

#include "core/arrive.h"
#include "exchange/device/verbs/tally.h"
#include "exchange/device/verbs/wait.h"
#include "exchange/rows/dtype.h"
#include "exchange/rows/layout.h"
#include "exchange/rows/route.h"

namespace m2n {

enum class IdType : uint32_t { kInt32, kInt64 };
enum class WeightType : uint32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// What the host may learn of a route once it is built, in host memory.
struct RouteOutcome {
  uint32_t num_rows;
  uint32_t num_pairs;
};

// What is wrong with a route, in one word of host memory per comm. The first cause stays until the host takes it.
M2N_HD constexpr uint64_t pack(const RouteResult& result) {
  return static_cast<uint64_t>(static_cast<uint32_t>(result.value)) << 32 | uint64_t{result.token} << 4 |
         static_cast<uint64_t>(result.error);
}
M2N_HD constexpr RouteResult unpack_route(uint64_t word) {
  return {static_cast<RouteError>(word & 0xF), static_cast<uint32_t>(word) >> 4, static_cast<int32_t>(word >> 32)};
}

struct RouteVerb {
  RouteView route;
  Shape shape;
  const void* topk_ids;  // [T][top_k] of id_type, at strides in elements
  IdType id_type;
  int64_t ids_stride, ids_step;
  const void* topk_weights;  // likewise
  WeightType weight_type;
  int64_t weights_stride, weights_step;
  const void* num_tokens;  // where given, one number of num_tokens_type: tokens from there on are padding
  IdType num_tokens_type;
  int32_t* ids;                 // [T][top_k]: the private copies that are checked and used
  float* weights;               // likewise
  int32_t* pair_ranks;          // [T][top_k]: the expert rank that serves a pair; -1: padding
  int32_t* pair_opens;          // [T][top_k]: not 0 for the first pair of its rank among those of its token
  uint32_t* counts;             // tally_words(2 * N)
  const int32_t* rank_offsets;  // [num_experts + 1], into `ranks`: the expert ranks that host an expert
  const int32_t* ranks;
  uint32_t own_rank;
  const uint32_t* split_offsets;  // [N + 1], where the rows are sorted by destination already; else nullptr
  uint64_t* trouble;              // host memory
  RouteOutcome* outcome;          // host memory
  uint32_t* rows_per_rank;        // host memory [N]
};

M2N_HD inline int64_t read_id(const void* ids, IdType type, int64_t at) {
  return type == IdType::kInt32 ? static_cast<const int32_t*>(ids)[at] : static_cast<const int64_t*>(ids)[at];
}

M2N_HD inline float read_weight(const RouteVerb& verb, int64_t at) {
  switch (verb.weight_type) {
    case WeightType::kFloat32:
      return static_cast<const float*>(verb.topk_weights)[at];
    case WeightType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(verb.topk_weights)[at]);
    case WeightType::kFloat16:
      return to_float(static_cast<const Float16*>(verb.topk_weights)[at]);
    case WeightType::kFloat64:
      break;
  }
  return static_cast<float>(static_cast<const double*>(verb.topk_weights)[at]);
}

M2N_HD inline uint32_t rank_of_pair(const RouteVerb& verb, uint32_t token, int32_t id) {
  if (verb.split_offsets == nullptr) return replica_of(id, token, verb.own_rank, verb.rank_offsets, verb.ranks);
  uint32_t rank = 0;
  while (rank < verb.route.num_ranks && token >= verb.split_offsets[rank + 1]) ++rank;
  return rank;
}

M2N_HD inline uint32_t count_tokens(const RouteVerb& verb) {
  if (verb.num_tokens == nullptr) return verb.route.num_tokens;
  const int64_t given = read_id(verb.num_tokens, verb.num_tokens_type, 0);
  const int64_t capacity = verb.route.num_tokens;
  return static_cast<uint32_t>(given < 0 ? 0 : given > capacity ? capacity : given);
}

// One pair: its private copy, the checks of it, and where it goes. An id beyond int32 becomes one that is refused.
M2N_HD inline RouteResult take_pair(const RouteVerb& verb, uint32_t token, uint32_t k, bool is_padding) {
  const uint64_t at = uint64_t{token} * verb.shape.top_k + k;
  const auto id_at = [&](uint32_t j) {
    return read_id(verb.topk_ids, verb.id_type, token * verb.ids_stride + j * verb.ids_step);
  };
  const int64_t id = is_padding ? kNone : id_at(k);
  verb.ids[at] = id == static_cast<int32_t>(id) ? static_cast<int32_t>(id) : INT32_MAX;
  verb.pair_ranks[at] = kNone;
  if (id == kNone) return {};
  if (id < 0 || id >= verb.shape.num_experts) return {RouteError::kIdRange, token, verb.ids[at]};
  bool is_twice = false;
  for (uint32_t j = 0; j < k; ++j) is_twice |= id_at(j) == id;
  if (is_twice) return {RouteError::kIdTwice, token, verb.ids[at]};
  const float weight = read_weight(verb, token * verb.weights_stride + k * verb.weights_step);
  if (!(weight - weight == 0.0f)) return {RouteError::kWeight, token, static_cast<int32_t>(k)};
  verb.weights[at] = weight;
  const uint32_t rank = rank_of_pair(verb, token, verb.ids[at]);
  if (rank >= verb.route.num_ranks) return {RouteError::kRank, token, verb.ids[at]};
  verb.pair_ranks[at] = static_cast<int32_t>(rank);
  return {};
}

// Calls body(token, k) for this thread's share of the pairs.
template <class Exec, class Body>
M2N_HD void for_each_pair(const Exec& exec, const RouteVerb& verb, Body&& body) {
  const uint32_t top_k = verb.shape.top_k;
  for (uint32_t i = exec.thread(); i < verb.route.num_tokens * top_k; i += exec.num_threads()) {
    const uint32_t token = i / top_k;
    body(token, i - token * top_k);
  }
}

// A route that cannot be built sends nothing, and every result is unknown. The first wrong pair is told.
template <class Exec>
M2N_HD void give_up(const Exec& exec, const RouteVerb& verb, uint32_t num_tokens) {
  const RouteView& route = verb.route;
  for_each_pair(exec, verb, [&](uint32_t token, uint32_t k) {
    route.source_rank[uint64_t{token} * verb.shape.top_k + k] = kUnknown;
  });
  for (uint32_t rank = exec.thread(); rank < route.num_ranks; rank += exec.num_threads()) {
    route.row_offsets[rank + 1] = route.pair_counts[rank] = verb.rows_per_rank[rank] = 0;
  }
  if (!is_leader(exec)) return;
  route.row_offsets[0] = 0;
  *verb.outcome = {};
  for (uint32_t i = 0; i < route.num_tokens * verb.shape.top_k; ++i) {
    const uint32_t token = i / verb.shape.top_k;
    const RouteResult result = take_pair(verb, token, i % verb.shape.top_k, token >= num_tokens);
    if (result.error != RouteError::kNone) return report(verb.trouble, pack(result));
  }
}

// What one pair is among those of its token.
struct PairPlace {
  bool opens;             // the first of its rank
  uint32_t row_place;     // among those of its rank, as the expert rank adds them
  uint32_t num_in_row;    // of its rank
  uint32_t num_before;    // of its rank, in top-k order
  uint32_t ranks_before;  // lower ranks of the token
  uint32_t num_ranks;     // of the token
};

M2N_HD inline PairPlace place_of(const RouteVerb& verb, uint32_t token, uint32_t k) {
  const uint64_t from = uint64_t{token} * verb.shape.top_k;
  const int32_t* ids = verb.ids + from;
  const int32_t* ranks = verb.pair_ranks + from;
  const int32_t rank = ranks[k], id = ids[k];
  PairPlace place{true, 0, 0, 0, 0, 0};
  for (uint32_t j = 0; j < verb.shape.top_k; ++j) {
    if (ranks[j] == kNone) continue;
    const bool opens = verb.pair_opens[from + j] != 0;
    place.num_ranks += opens;
    place.ranks_before += opens && ranks[j] < rank;
    if (ranks[j] != rank) continue;
    place.opens &= j >= k;
    ++place.num_in_row;
    place.num_before += j < k;
    place.row_place += verb.shape.reduce_at == ReduceAt::kExpert ? ids[j] < id : j < k;
  }
  return place;
}

// How many rows, and pairs, of a rank belong to the tokens of the same part before this one.
struct Before {
  uint32_t rows, pairs;
};
M2N_HD inline Before count_before(const RouteVerb& verb, uint32_t first, uint32_t token, int32_t rank) {
  Before before{0, 0};
  for (uint32_t other = first; other < token; ++other) {
    const int32_t* ranks = verb.pair_ranks + uint64_t{other} * verb.shape.top_k;
    uint32_t num_pairs = 0;
    for (uint32_t k = 0; k < verb.shape.top_k; ++k) num_pairs += ranks[k] == rank;
    before.rows += num_pairs != 0;
    before.pairs += num_pairs;
  }
  return before;
}

// Writes what one pair adds to the route.
M2N_HD inline void fill_pair(const RouteVerb& verb, const Tally& tally, uint32_t token, uint32_t k) {
  const RouteView& route = verb.route;
  const uint32_t top_k = verb.shape.top_k;
  const uint64_t from = uint64_t{token} * top_k;
  const int32_t rank = verb.pair_ranks[from + k];
  const bool is_reduced = verb.shape.reduce_at == ReduceAt::kExpert;
  const PairPlace place = place_of(verb, token, k);
  if (!is_reduced || k >= place.num_ranks) route.source_rank[from + k] = kNone;
  if (rank == kNone) return;
  const uint32_t part = tally.part_of(token);
  const Before before = count_before(verb, tally.begin(part), token, rank);
  const uint32_t row_of_rank = tally.at(static_cast<uint32_t>(rank), part) + before.rows;
  const uint32_t row = route.row_offsets[rank] + row_of_rank;
  route.ids[uint64_t{row} * top_k + place.row_place] = verb.ids[from + k];
  route.weights[uint64_t{row} * top_k + place.row_place] = verb.weights[from + k];
  if (!is_reduced) {
    route.source_rank[from + k] = rank;
    route.source_row[from + k] = static_cast<int32_t>(tally.at(route.num_ranks + static_cast<uint32_t>(rank), part) +
                                                      before.pairs + place.num_before);
    route.source_weight[from + k] = verb.weights[from + k];
  }
  if (!place.opens) return;
  route.token_of_row[row] = static_cast<int32_t>(token);
  for (uint32_t j = place.num_in_row; j < top_k; ++j) {
    route.ids[uint64_t{row} * top_k + j] = kNone;
    route.weights[uint64_t{row} * top_k + j] = 0.0f;
  }
  if (!is_reduced) return;
  route.source_rank[from + place.ranks_before] = rank;
  route.source_row[from + place.ranks_before] = static_cast<int32_t>(row_of_rank);
}

// The second half: rows and pairs of each rank in ascending token.
template <class Exec>
M2N_HD void fill_route(Exec& exec, const RouteVerb& verb) {
  const RouteView& route = verb.route;
  const Tally tally = make_tally(exec, verb.counts, 2 * route.num_ranks, route.num_tokens);
  clear(exec, tally);
  for_each_pair(exec, verb, [&](uint32_t token, uint32_t k) {
    const uint64_t from = uint64_t{token} * verb.shape.top_k;
    const int32_t* ranks = verb.pair_ranks + from;
    if (ranks[k] == kNone) return;
    const auto rank = static_cast<uint32_t>(ranks[k]);
    const uint32_t part = tally.part_of(token);
    bool opens = true;
    for (uint32_t j = 0; j < k; ++j) opens &= ranks[j] != ranks[k];
    verb.pair_opens[from + k] = opens;
    // Relaxed: add_up() begins with a sync().
    if (opens) add_relaxed(&tally.at(rank, part), 1u);
    add_relaxed(&tally.at(route.num_ranks + rank, part), 1u);
  });
  add_up(exec, tally);
  if (is_leader(exec)) {
    route.row_offsets[0] = 0;
    for (uint32_t rank = 0; rank < route.num_ranks; ++rank) {
      route.row_offsets[rank + 1] = route.row_offsets[rank] + tally.total(rank);
    }
  }
  exec.sync();
  for_each_pair(exec, verb, [&](uint32_t token, uint32_t k) { fill_pair(verb, tally, token, k); });
  for (uint32_t rank = exec.thread(); rank < route.num_ranks; rank += exec.num_threads()) {
    verb.rows_per_rank[rank] = tally.total(rank);
    route.pair_counts[rank] = tally.total(route.num_ranks + rank);
  }
  if (!is_leader(exec)) return;
  uint32_t num_pairs = 0;
  for (uint32_t rank = 0; rank < route.num_ranks; ++rank) num_pairs += tally.total(route.num_ranks + rank);
  *verb.outcome = {route.row_offsets[route.num_ranks], num_pairs};
}

template <class Exec>
M2N_HD void run(Exec& exec, const RouteVerb& verb) {
  const uint32_t num_tokens = count_tokens(verb);
  bool is_wrong = false;
  for_each_pair(exec, verb, [&](uint32_t token, uint32_t k) {
    is_wrong |= take_pair(verb, token, k, token >= num_tokens).error != RouteError::kNone;
  });
  if (exec.any(is_wrong)) return give_up(exec, verb, num_tokens);
  fill_route(exec, verb);
}

}  // namespace m2n
