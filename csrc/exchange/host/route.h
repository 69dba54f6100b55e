// SPDX-License-Identifier: Apache-2.0
// A route in memory of the host: which rows of x go to which expert rank.
#pragma once

#include <cstdint>
#include <vector>

#include "exchange/rows/route.h"

namespace m2n {

// A route that owns its arrays. Building it again reuses them.
class Route {
 public:
  explicit Route(const Shape& shape) : shape_(shape) {}
  // Before a build: T tokens for N expert ranks.
  void prepare(uint32_t num_tokens, uint32_t num_ranks);

  // Each pair goes to one of its expert's ranks: `ranks_of_expert` [offsets[e] .. offsets[e + 1]).
  void build_from_topk(const int32_t* topk_ids, const float* topk_weights, const std::vector<int32_t>& rank_offsets,
                       const std::vector<int32_t>& ranks, uint32_t own_rank);
  // Rows are sorted by destination already: splits[r] of them go to rank r, with all their experts.
  void build_from_splits(const int32_t* topk_ids, const float* topk_weights, const std::vector<uint32_t>& splits);

  // Are rows copied side by side before they go over a network? Then x is the caller's again after dispatch_send.
  void set_packs(bool packs) { packs_ = packs; }
  bool packs() const { return packs_; }

  const RouteView& view() const { return view_; }
  const Shape& shape() const { return shape_; }
  uint32_t num_rows() const { return view_.num_ranks == 0 ? 0 : view_.row_offsets[view_.num_ranks]; }

 private:
  // Throws for an error, and leaves an empty route then.
  void finish(const RouteResult& result);

  Shape shape_;
  std::vector<uint32_t> counts_;  // row_offsets, next_row, pair_counts
  std::vector<int32_t> indices_;  // token_of_row, ids, source_rank, source_row
  std::vector<float> weights_;    // weights, source_weight
  RouteView view_{};
  bool packs_ = false;
};

}  // namespace m2n
