// SPDX-License-Identifier: Apache-2.0
// Deadlines and argument checks.
#include "bind.h"

#include <algorithm>
#include <cmath>

namespace m2n::bindings {

int64_t timeout_ns(double timeout_s) {
  if (std::isnan(timeout_s) || timeout_s < 0) throw py::value_error("timeout: expected seconds >= 0");
  constexpr double kForeverS = 1e9;  // no wait is endless, but this one ends in 30 years
  return static_cast<int64_t>(std::min(timeout_s, kForeverS) * 1e9);
}

int64_t deadline_after(double timeout_s) {
  const int64_t wait_ns = timeout_ns(timeout_s);
  return wait_ns == 0 ? kNoWait : now_ns() + wait_ns;
}

Wanted make_wanted(std::optional<uint32_t> layer, std::optional<uint32_t> microbatch, double linger_us,
                   const std::vector<uint32_t>& attention_ranks) {
  Wanted wanted;
  wanted.is_any_layer = !layer.has_value();
  wanted.layer = layer.value_or(0);
  wanted.is_any_microbatch = !microbatch.has_value();
  wanted.microbatch = microbatch.value_or(0);
  wanted.linger_ns = static_cast<int64_t>(linger_us * 1e3);
  wanted.attention_ranks = attention_ranks.data();
  wanted.num_attention_ranks = static_cast<uint32_t>(attention_ranks.size());
  return wanted;
}

void require_topk(const Shape& shape, const Tensor& ids, const Tensor& weights) {
  ids.require_matrix(shape.top_k);
  weights.require_matrix(shape.top_k);
  if (ids.num_rows() != weights.num_rows()) {
    throw py::value_error("topk_weights: expected " + std::to_string(ids.num_rows()) + " rows as in topk_ids, got " +
                          std::to_string(weights.num_rows()));
  }
  if (ids.num_rows() > shape.max_tokens) {
    throw py::value_error("topk_ids: " + std::to_string(ids.num_rows()) + " tokens, but max_tokens is " +
                          std::to_string(shape.max_tokens) + "; send them in several dispatches");
  }
}

void require_splits(const std::vector<uint32_t>& splits, int64_t num_tokens) {
  int64_t num_rows = 0;
  for (uint32_t split : splits) num_rows += split;
  if (num_rows == num_tokens) return;
  throw py::value_error("splits: they add up to " + std::to_string(num_rows) + " rows, topk_ids has " +
                        std::to_string(num_tokens));
}

DType require_x_rows(const Tensor& x, const Shape& shape, uint32_t num_tokens) {
  const bool is_any = shape.dispatch_dtype == DType::kFloat8E4M3;  // what becomes float8 may have any other type
  const DType dtype = is_any ? x.float_dtype() : shape.dispatch_dtype;
  x.require_rows(dtype, shape.hidden);
  if (x.num_rows() == num_tokens) return dtype;
  throw py::value_error("x: the route is for " + std::to_string(num_tokens) + " tokens, x has " +
                        std::to_string(x.num_rows()) + " rows");
}

void require_out_rows(const Tensor& out, const Shape& shape, uint32_t num_tokens) {
  out.require_rows(shape.combine_dtype, shape.hidden);
  if (out.num_rows() == num_tokens) return;
  throw py::value_error("out: expected " + std::to_string(num_tokens) + " rows, got " + std::to_string(out.num_rows()));
}

DType require_y_rows(const Tensor& y, const Shape& shape, uint32_t num_rows, uint32_t num_pairs, bool is_reduced) {
  const DType dtype = y.float_dtype();
  y.require_rows(dtype, shape.hidden);
  if (is_reduced && shape.reduce_at == ReduceAt::kAttention) {
    throw py::value_error("reduced: with reduce_at='attention' the attention rank sums, so y must hold every pair");
  }
  const uint32_t expected = is_reduced ? num_rows : num_pairs;
  if (y.num_rows() == expected) return dtype;
  throw py::value_error("y: expected " + std::to_string(expected) +
                        (is_reduced ? " rows, one per received row" : " rows, one per (row, expert) pair") + ", got " +
                        std::to_string(y.num_rows()));
}

Array window_array(const std::shared_ptr<Window>& window, uint64_t num_rows, const Shape& shape, DLDevice device) {
  const DType dtype = shape.dispatch_dtype;
  const uint32_t element_bytes = dtype_bytes(dtype);
  return {window,
          window->data(),
          {static_cast<int64_t>(num_rows), static_cast<int64_t>(shape.hidden)},
          dtype == DType::kBFloat16     ? Kind::kBFloat
          : dtype == DType::kFloat8E4M3 ? Kind::kFloat8E4M3
                                        : Kind::kFloat,
          static_cast<uint8_t>(8 * element_bytes),
          device,
          {static_cast<int64_t>(bytes_of_row(shape.hidden, dtype) / element_bytes), 1}};
}

std::optional<Array> scales_array(const std::shared_ptr<Window>& window, uint64_t num_rows, const Shape& shape,
                                  DLDevice device) {
  if (shape.dispatch_dtype != DType::kFloat8E4M3) return std::nullopt;
  return Array{window,
               window->data() + scales_offset(shape.hidden),
               {static_cast<int64_t>(num_rows), num_scales(shape.hidden)},
               Kind::kFloat,
               32,
               device,
               {static_cast<int64_t>(bytes_of_row(shape.hidden, shape.dispatch_dtype) / sizeof(float)), 1}};
}

}  // namespace m2n::bindings
