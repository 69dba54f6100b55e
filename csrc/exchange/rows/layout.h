// SPDX-License-Identifier: Apache-2.0
// The shape that both sides agree on, and the window map as one constexpr function of it. The only place that
// adds offsets.
#pragma once

#include <cstdint>
#include <numeric>

#include "core/platform.h"
#include "core/slot.h"
#include "exchange/rows/dtype.h"

namespace m2n {

enum class ReduceAt : uint32_t { kExpert, kAttention };

struct Shape {
  uint32_t hidden = 0;
  uint32_t num_experts = 0;
  uint32_t top_k = 0;
  uint32_t max_tokens = 0;    // per dispatch
  uint32_t microbatches = 1;  // in flight at once
  DType dispatch_dtype = DType::kBFloat16;
  DType combine_dtype = DType::kBFloat16;
  ReduceAt reduce_at = ReduceAt::kExpert;

  bool operator==(const Shape&) const = default;
};

// A row of float8: its elements, then a float32 scale for each block of them, the last of which may be shorter. One
// piece, so that the row's number finds both.
inline constexpr uint32_t kScaleBlock = 128;
M2N_HD constexpr uint32_t num_scales(uint32_t hidden) { return (hidden + kScaleBlock - 1) / kScaleBlock; }
M2N_HD constexpr uint64_t scales_offset(uint32_t hidden) { return round_up(hidden, sizeof(float)); }

M2N_HD constexpr uint64_t bytes_of_row(uint32_t hidden, DType dtype) {
  if (dtype != DType::kFloat8E4M3) return hidden * uint64_t{dtype_bytes(dtype)};
  return round_up(scales_offset(hidden) + num_scales(hidden) * sizeof(float), 16);
}

// The rows that one peer writes: [slots][max_rows][hidden], an object of its own in the owner's window.
struct Rows {
  uint64_t row_bytes;
  uint32_t max_rows;      // per slot
  uint64_t object_bytes;  // physical, whole pages
  uint64_t stride_bytes;  // from one peer's object to the next: whole pages and whole rows
  uint64_t stride_rows;

  M2N_HD constexpr uint64_t row_in_object(uint32_t slot, uint32_t row) const {
    return static_cast<uint64_t>(slot) * max_rows + row;
  }
  M2N_HD constexpr uint64_t row_in_window(uint32_t peer_idx, uint32_t slot, uint32_t row) const {
    return peer_idx * stride_rows + row_in_object(slot, row);
  }
};

// The meta object beside the rows: per slot one signal and one header, and for a dispatch the expert ids and
// weights of each row: int32 and float32 [max_rows][top_k], ids global, -1 behind the last one.
struct Meta {
  uint64_t headers_offset;
  uint64_t ids_offset;
  uint64_t weights_offset;
  uint64_t slot_ids_bytes;  // of the ids, and of the weights, of one slot
  uint64_t object_bytes;

  M2N_HD constexpr uint64_t signal(uint32_t slot) const { return slot * kLineBytes; }
  M2N_HD constexpr uint64_t header(uint32_t slot) const { return headers_offset + slot * kLineBytes; }
  M2N_HD constexpr uint64_t ids(uint32_t slot) const { return ids_offset + slot * slot_ids_bytes; }
  M2N_HD constexpr uint64_t weights(uint32_t slot) const { return weights_offset + slot * slot_ids_bytes; }
};

struct Layout {
  uint32_t num_slots;  // one per microbatch, and the retry slot
  uint32_t top_k;
  Rows dispatch_rows;  // in an expert rank's memory, per attention peer
  Meta dispatch_meta;
  Rows combine_rows;  // in an attention rank's memory, per expert peer
  Meta combine_meta;

  M2N_HD constexpr uint32_t retry_slot() const { return num_slots - 1; }
};

constexpr Rows make_rows(uint32_t num_slots, uint32_t max_rows, uint64_t row_bytes, uint64_t page_bytes) {
  Rows rows{};
  rows.row_bytes = row_bytes;
  rows.max_rows = max_rows;
  rows.object_bytes = round_up(num_slots * static_cast<uint64_t>(max_rows) * row_bytes, page_bytes);
  rows.stride_bytes = round_up(rows.object_bytes, std::lcm(page_bytes, row_bytes));
  rows.stride_rows = rows.stride_bytes / row_bytes;
  return rows;
}

constexpr Meta make_meta(uint32_t num_slots, uint64_t ids_per_slot, uint64_t page_bytes) {
  Meta meta{};
  meta.headers_offset = num_slots * kLineBytes;
  meta.ids_offset = meta.headers_offset + num_slots * kLineBytes;
  meta.slot_ids_bytes = round_up(ids_per_slot * sizeof(int32_t), kLineBytes);
  meta.weights_offset = meta.ids_offset + num_slots * meta.slot_ids_bytes;
  meta.object_bytes = round_up(meta.weights_offset + num_slots * meta.slot_ids_bytes, page_bytes);
  return meta;
}

constexpr Layout make_layout(const Shape& shape, uint64_t page_bytes) {
  Layout layout{};
  layout.num_slots = shape.microbatches + 1;
  layout.top_k = shape.top_k;
  const uint64_t ids_per_slot = static_cast<uint64_t>(shape.max_tokens) * shape.top_k;
  const uint32_t reply_rows =
      shape.reduce_at == ReduceAt::kExpert ? shape.max_tokens : static_cast<uint32_t>(ids_per_slot);
  const uint64_t dispatch_row_bytes = bytes_of_row(shape.hidden, shape.dispatch_dtype);
  const uint64_t combine_row_bytes = bytes_of_row(shape.hidden, shape.combine_dtype);
  layout.dispatch_rows = make_rows(layout.num_slots, shape.max_tokens, dispatch_row_bytes, page_bytes);
  layout.dispatch_meta = make_meta(layout.num_slots, ids_per_slot, page_bytes);
  layout.combine_rows = make_rows(layout.num_slots, reply_rows, combine_row_bytes, page_bytes);
  layout.combine_meta = make_meta(layout.num_slots, 0, page_bytes);
  return layout;
}

}  // namespace m2n
