// SPDX-License-Identifier: Apache-2.0
// Fuzzes the building of routes: any ids, weights, ranks and (small) shapes. What build_route leaves is compared with
// the same computed again in the simplest way, from arrays that are exactly as large as promised.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "exchange/rows/route.h"
#include "harness.h"

namespace {

using fuzz::require;
using namespace m2n;

struct Case {
  Shape shape;
  uint32_t num_tokens, num_ranks;
  std::vector<int32_t> ids;
  std::vector<float> weights;
  std::vector<uint32_t> ranks;  // of each pair

  size_t at(uint32_t token, uint32_t k) const { return size_t{token} * shape.top_k + k; }
};

Case make_case(fuzz::Bytes& bytes) {
  Case c{};
  c.shape.hidden = 8;
  c.shape.top_k = 1 + bytes.below(5);
  c.shape.num_experts = c.shape.top_k + bytes.below(8);
  c.shape.max_tokens = 6;
  c.shape.reduce_at = bytes.below(2) == 0 ? ReduceAt::kExpert : ReduceAt::kAttention;
  c.num_tokens = bytes.below(c.shape.max_tokens + 1);
  c.num_ranks = 1 + bytes.below(4);
  const uint32_t raw = bytes.below(16);  // which arrays are what the fuzzer likes
  for (uint32_t i = 0; i < c.num_tokens * c.shape.top_k; ++i) {
    const uint32_t good_id = bytes.below(c.shape.num_experts + 1) - 1;
    c.ids.push_back((raw & 1) != 0 && bytes.below(8) == 0 ? bytes.take<int32_t>() : static_cast<int32_t>(good_id));
    c.weights.push_back((raw & 2) != 0 && bytes.below(8) == 0 ? bytes.take<float>() : 0.25f * bytes.below(16));
    c.ranks.push_back((raw & 4) != 0 && bytes.below(8) == 0 ? bytes.take<uint32_t>() : bytes.below(c.num_ranks));
  }
  return c;
}

// The first thing that is wrong, token by token: first its ids and weights in top-k order, then its ranks.
RouteResult expected_result(const Case& c) {
  for (uint32_t token = 0; token < c.num_tokens; ++token) {
    for (uint32_t k = 0; k < c.shape.top_k; ++k) {
      const int32_t id = c.ids[c.at(token, k)];
      if (id == -1) continue;
      if (id < 0 || id >= static_cast<int32_t>(c.shape.num_experts)) return {RouteError::kIdRange, token, id};
      const auto begin = c.ids.begin() + static_cast<ptrdiff_t>(c.at(token, 0));
      if (std::count(begin, begin + k, id) != 0) return {RouteError::kIdTwice, token, id};
      if (!std::isfinite(c.weights[c.at(token, k)])) return {RouteError::kWeight, token, static_cast<int32_t>(k)};
    }
    for (uint32_t k = 0; k < c.shape.top_k; ++k) {
      const int32_t id = c.ids[c.at(token, k)];
      if (id != -1 && c.ranks[c.at(token, k)] >= c.num_ranks) return {RouteError::kRank, token, id};
    }
  }
  return {};
}

// T tokens, at most T * min(top_k, N) rows: each array on its own, so that a step outside is found.
struct Arrays {
  std::vector<uint32_t> row_offsets, next_row, pair_counts;
  std::vector<int32_t> token_of_row, ids, source_rank, source_row;
  std::vector<float> weights, source_weight;
  RouteView view;

  explicit Arrays(const Case& c) {
    const size_t rows = size_t{c.num_tokens} * std::min(c.shape.top_k, c.num_ranks);
    const size_t pairs = size_t{c.num_tokens} * c.shape.top_k;
    row_offsets.resize(c.num_ranks + 1, 77);
    next_row.resize(c.num_ranks, 77);
    pair_counts.resize(c.num_ranks, 77);
    token_of_row.resize(rows, 77);
    ids.resize(rows * c.shape.top_k, 77);
    weights.resize(rows * c.shape.top_k, 77.0f);
    source_rank.resize(pairs, 77);
    source_row.resize(pairs, 77);
    source_weight.resize(pairs, 77.0f);
    view = {c.num_tokens,       c.num_ranks,         row_offsets.data(),  next_row.data(),
            pair_counts.data(), token_of_row.data(), ids.data(),          weights.data(),
            source_rank.data(), source_row.data(),   source_weight.data()};
  }
};

bool is_same(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0; }

// The pairs of a token that go to a rank, as (id, k): ascending id for sums at the expert, else top-k order.
std::vector<std::pair<int32_t, uint32_t>> pairs_of(const Case& c, uint32_t token, uint32_t rank) {
  std::vector<std::pair<int32_t, uint32_t>> pairs;
  for (uint32_t k = 0; k < c.shape.top_k; ++k) {
    const size_t at = c.at(token, k);
    if (c.ids[at] != -1 && c.ranks[at] == rank) pairs.emplace_back(c.ids[at], k);
  }
  if (c.shape.reduce_at == ReduceAt::kExpert) std::sort(pairs.begin(), pairs.end());
  return pairs;
}

void check_rows(const Case& c, const Arrays& a, std::vector<std::vector<std::pair<int32_t, int32_t>>>& sources) {
  uint32_t row = 0;
  for (uint32_t rank = 0; rank < c.num_ranks; ++rank) {
    require(a.row_offsets[rank] == row, "row_offsets");
    int32_t num_pairs = 0;
    for (uint32_t token = 0; token < c.num_tokens; ++token) {
      const auto pairs = pairs_of(c, token, rank);
      if (pairs.empty()) continue;
      require(a.token_of_row.at(row) == static_cast<int32_t>(token), "token_of_row");
      for (uint32_t k = 0; k < c.shape.top_k; ++k) {
        const size_t at = size_t{row} * c.shape.top_k + k;
        require(a.ids[at] == (k < pairs.size() ? pairs[k].first : -1), "ids of a row");
        const float weight = k < pairs.size() ? c.weights[c.at(token, pairs[k].second)] : 0.0f;
        require(is_same(a.weights[at], weight), "weights of a row");
      }
      if (c.shape.reduce_at == ReduceAt::kExpert) {
        sources[token].emplace_back(static_cast<int32_t>(rank), static_cast<int32_t>(row - a.row_offsets[rank]));
      } else {
        for (const auto& [id, k] : pairs) sources[token][k] = {static_cast<int32_t>(rank), num_pairs++};
      }
      num_pairs += c.shape.reduce_at == ReduceAt::kExpert ? static_cast<int32_t>(pairs.size()) : 0;
      ++row;
    }
    require(a.pair_counts[rank] == static_cast<uint32_t>(num_pairs), "pair_counts");
  }
  require(a.row_offsets[c.num_ranks] == row, "the number of rows");
}

void check_route(const Case& c, const Arrays& a) {
  const bool is_by_k = c.shape.reduce_at == ReduceAt::kAttention;
  std::vector<std::vector<std::pair<int32_t, int32_t>>> sources(c.num_tokens);
  for (auto& source : sources) source.resize(is_by_k ? c.shape.top_k : 0, {-1, 0});
  check_rows(c, a, sources);
  for (uint32_t token = 0; token < c.num_tokens; ++token) {
    sources[token].resize(c.shape.top_k, {-1, 0});
    for (uint32_t k = 0; k < c.shape.top_k; ++k) {
      const size_t at = c.at(token, k);
      require(a.source_rank[at] == sources[token][k].first, "source_rank");
      if (a.source_rank[at] == -1) continue;
      require(a.source_row[at] == sources[token][k].second, "source_row");
      if (is_by_k) require(is_same(a.source_weight[at], c.weights[at]), "source_weight");
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Bytes bytes(data, size);
  const Case c = make_case(bytes);
  Arrays arrays(c);
  const auto rank_of = [&](uint32_t token, uint32_t k) { return c.ranks[c.at(token, k)]; };
  const RouteResult result = build_route(arrays.view, c.shape, c.ids.data(), c.weights.data(), rank_of);
  const RouteResult expected = expected_result(c);
  require(result.error == expected.error && result.token == expected.token && result.value == expected.value,
          "the first mistake is the one that is told");
  if (result.error == RouteError::kNone) check_route(c, arrays);
  return 0;
}
