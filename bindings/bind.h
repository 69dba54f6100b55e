// SPDX-License-Identifier: Apache-2.0
// What the files of the native module share.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "core/error.h"
#include "exchange/bodies/inbox.h"
#include "exchange/links/comm.h"
#include "exchange/rows/layout.h"
#include "lock.h"
#include "tensor.h"

namespace m2n::bindings {

// Where a comm's tensors lie, in DLPack's words.
inline constexpr DLDevice kOnCpu{1, 0};

// From now, CLOCK_MONOTONIC; Python's seconds are checked.
int64_t timeout_ns(double timeout_s);
int64_t deadline_after(double timeout_s);

Wanted make_wanted(std::optional<uint32_t> layer, std::optional<uint32_t> microbatch, double linger_us,
                   const std::vector<uint32_t>& attention_ranks);

// Argument checks that host and device comms share.
void require_topk(const Shape& shape, const Tensor& ids, const Tensor& weights);
void require_splits(const std::vector<uint32_t>& splits, int64_t num_tokens);
DType require_x_rows(const Tensor& x, const Shape& shape, uint32_t num_tokens);
void require_out_rows(const Tensor& out, const Shape& shape, uint32_t num_tokens);
DType require_y_rows(const Tensor& y, const Shape& shape, uint32_t num_rows, uint32_t num_pairs, bool is_reduced);

// An array of `count` elements that keeps `owner` alive.
template <class T>
Array list_array(std::shared_ptr<const void> owner, T* data, uint64_t count, DLDevice device) {
  return {std::move(owner),
          data,
          {static_cast<int64_t>(count)},
          std::is_same_v<T, float> ? Kind::kFloat : Kind::kInt,
          32,
          device};
}
Array window_array(const std::shared_ptr<Window>& window, uint64_t num_rows, const Shape& shape, DLDevice device);
// The scales of float8 rows, behind each row; None for rows of another type.
std::optional<Array> scales_array(const std::shared_ptr<Window>& window, uint64_t num_rows, const Shape& shape,
                                  DLDevice device);

// {rank: [number of a row of x]}.
py::dict owed_dict(const Owed& owed);

void bind_errors(py::module_& module);
void bind_device(py::module_& module);

}  // namespace m2n::bindings
