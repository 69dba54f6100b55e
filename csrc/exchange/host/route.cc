// SPDX-License-Identifier: Apache-2.0
// Storage of routes on the host.
#include "exchange/host/route.h"

namespace m2n {

void Route::prepare(uint32_t num_tokens, uint32_t num_ranks) {
  const uint64_t num_pairs = static_cast<uint64_t>(num_tokens) * shape_.top_k;  // rows <= pairs
  counts_.resize(3 * uint64_t{num_ranks} + 1);
  indices_.resize(num_pairs * (3 + shape_.top_k));
  weights_.resize(num_pairs * (1 + shape_.top_k));
  view_.num_tokens = num_tokens;
  view_.num_ranks = num_ranks;
  view_.row_offsets = counts_.data();
  view_.next_row = counts_.data() + num_ranks + 1;
  view_.pair_counts = view_.next_row + num_ranks;
  view_.token_of_row = indices_.data();
  view_.source_rank = indices_.data() + num_pairs;
  view_.source_row = indices_.data() + 2 * num_pairs;
  view_.ids = indices_.data() + 3 * num_pairs;
  view_.source_weight = weights_.data();
  view_.weights = weights_.data() + num_pairs;
}

void Route::build_from_topk(const int32_t* topk_ids, const float* topk_weights,
                            const std::vector<int32_t>& rank_offsets, const std::vector<int32_t>& ranks,
                            uint32_t own_rank) {
  const auto rank_of = [&](uint32_t token, uint32_t k) {
    const int32_t id = topk_ids[static_cast<uint64_t>(token) * shape_.top_k + k];
    return replica_of(id, token, own_rank, rank_offsets.data(), ranks.data());
  };
  finish(build_route(view_, shape_, topk_ids, topk_weights, rank_of));
}

void Route::build_from_splits(const int32_t* topk_ids, const float* topk_weights, const std::vector<uint32_t>& splits) {
  std::vector<uint32_t> rank_of_row;
  for (uint32_t rank = 0; rank < splits.size(); ++rank) rank_of_row.insert(rank_of_row.end(), splits[rank], rank);
  const auto rank_of = [&](uint32_t token, uint32_t) { return rank_of_row[token]; };
  finish(build_route(view_, shape_, topk_ids, topk_weights, rank_of));
  require_full_splits(view_.num_tokens, num_rows());
}

void Route::finish(const RouteResult& result) {
  if (result.error != RouteError::kNone) view_ = RouteView{};
  require_built(result, shape_);
}

}  // namespace m2n
