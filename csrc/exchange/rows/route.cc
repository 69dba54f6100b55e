// SPDX-License-Identifier: Apache-2.0
// The words for a route that cannot be.
#include "exchange/rows/route.h"

#include <string>

#include "core/error.h"

namespace m2n {

void require_full_splits(uint32_t num_tokens, uint32_t num_rows) {
  if (num_rows == num_tokens) return;
  throw Error(Failure::kArgument, "topk_ids: with ready-made splits every row needs at least one expert, but " +
                                      std::to_string(num_tokens - num_rows) + " rows have only -1");
}

void require_built(const RouteResult& result, const Shape& shape) {
  const std::string where = " at token " + std::to_string(result.token);
  switch (result.error) {
    case RouteError::kNone:
      return;
    case RouteError::kIdRange:
      throw Error(Failure::kArgument, "topk_ids: expert id " + std::to_string(result.value) + where +
                                          " is out of range; expected 0 to " + std::to_string(shape.num_experts - 1) +
                                          ", or -1 for a padded entry");
    case RouteError::kIdTwice:
      throw Error(Failure::kArgument, "topk_ids: expert id " + std::to_string(result.value) + " comes twice" + where +
                                          "; the experts of a token must differ");
    case RouteError::kWeight:
      throw Error(Failure::kArgument, "topk_weights: not finite" + where + ", k=" + std::to_string(result.value));
    case RouteError::kRank:
      throw Error(Failure::kArgument, "placement: expert id " + std::to_string(result.value) + where +
                                          " lives on an expert rank that does not exist");
  }
}

}  // namespace m2n
