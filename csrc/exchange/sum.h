// SPDX-License-Identifier: Apache-2.0
// The weighted sum of rows. The arithmetic is fixed (float32, the order written here, no contraction), so that results
// equal the oracle's bit for bit. Host and device run the same sums; the host has wider instructions where it finds
// them, which round the same.
#pragma once

#include <cstdint>
#include <type_traits>

#include "exchange/dtype.h"

namespace m2n {

#if defined(__CUDA_ARCH__)
inline constexpr uint32_t kSpan = 4;
#else
inline constexpr uint32_t kSpan = 1024;  // elements summed at a time: in registers or the first cache level
#endif

// Spans of all rows, shared among all threads of all blocks.
template <class Exec, class Body>
M2N_HD void for_each_span(const Exec& exec, uint32_t num_rows, uint32_t hidden, Body&& body) {
  const uint32_t spans = (hidden + kSpan - 1) / kSpan;
  const uint64_t num_workers = uint64_t{exec.num_blocks()} * exec.num_threads();
  uint64_t i = uint64_t{exec.block()} * exec.num_threads() + exec.thread();
  for (; i < static_cast<uint64_t>(num_rows) * spans; i += num_workers) {
    const uint32_t begin = static_cast<uint32_t>(i % spans) * kSpan;
    body(static_cast<uint32_t>(i / spans), begin, begin + kSpan < hidden ? begin + kSpan : hidden);
  }
}

// total = total + weight * row.
template <bool kWeighted, class In>
M2N_HD inline __attribute__((always_inline)) void add_elements(float* total, const In* row, uint32_t count,
                                                               float weight) {
  for (uint32_t h = 0; h < count; ++h) {
    const float value = to_float(row[h]);
    total[h] += kWeighted ? weight * value : value;
  }
}
template <class Out>
M2N_HD inline __attribute__((always_inline)) void cast_elements(Out* out, const float* total, uint32_t count) {
  for (uint32_t h = 0; h < count; ++h) out[h] = from_float<Out>(total[h]);
}

// out = +0 + row.
template <class T>
M2N_HD inline __attribute__((always_inline)) void copy_elements(T* out, const T* row, uint32_t count) {
  for (uint32_t h = 0; h < count; ++h) out[h] = plus_zero(row[h]);
}

#if defined(__x86_64__) && !defined(__CUDACC__)
template <class T>
__attribute__((target("avx2"))) void copy_avx2(T* out, const T* row, uint32_t count) {
  copy_elements(out, row, count);
}
template <bool kWeighted, class In>
__attribute__((target("avx2"))) void add_avx2(float* total, const In* row, uint32_t count, float weight) {
  add_elements<kWeighted>(total, row, count, weight);
}
template <class Out>
__attribute__((target("avx2"))) void cast_avx2(Out* out, const float* total, uint32_t count) {
  cast_elements(out, total, count);
}
inline const bool kHasAvx2 = __builtin_cpu_supports("avx2");
#endif

template <class T>
M2N_HD void copy_row(T* out, const T* row, uint32_t count) {
#if defined(__x86_64__) && !defined(__CUDACC__)
  if (kHasAvx2) return copy_avx2(out, row, count);
#endif
  copy_elements(out, row, count);
}
template <bool kWeighted, class In>
M2N_HD void add_row(float* total, const In* row, uint32_t count, float weight) {
#if defined(__x86_64__) && !defined(__CUDACC__)
  if (kHasAvx2) return add_avx2<kWeighted>(total, row, count, weight);
#endif
  add_elements<kWeighted>(total, row, count, weight);
}
template <class Out>
M2N_HD void cast_total(Out* out, const float* total, uint32_t count) {
#if defined(__x86_64__) && !defined(__CUDACC__)
  if (kHasAvx2) return cast_avx2(out, total, count);
#endif
  cast_elements(out, total, count);
}

// total = +0, then total = total + weight * row, for every row that `row_at(i)` gives (nullptr: nothing to add), cast
// once into `out`. Products and sums round separately.
template <bool kWeighted, class In, class Out, class RowAt, class WeightAt>
M2N_HD void sum_span(Out* out, uint32_t begin, uint32_t end, uint32_t num_rows, RowAt&& row_at, WeightAt&& weight_at) {
  const In* only = nullptr;  // the one row, as long as there is no second one
  float total[kSpan];
  bool is_begun = false;
  for (uint32_t i = 0; i < num_rows; ++i) {
    const In* row = row_at(i);
    if (row == nullptr) continue;
    if constexpr (!kWeighted && std::is_same_v<In, Out>) {
      if (only == nullptr && !is_begun) {
        only = row;
        continue;
      }
    }
    if (!is_begun) {
      for (uint32_t h = 0; h < end - begin; ++h) total[h] = 0.0f;
      is_begun = true;
      if (only != nullptr) add_row<kWeighted>(total, only + begin, end - begin, 1.0f);
    }
    add_row<kWeighted>(total, row + begin, end - begin, weight_at(i));
  }
  if (is_begun) return cast_total(out + begin, total, end - begin);
  if constexpr (!kWeighted && std::is_same_v<In, Out>) {
    if (only != nullptr) return copy_row(out + begin, only + begin, end - begin);
  }
  for (uint32_t h = begin; h < end; ++h) out[h] = Out{};
}

}  // namespace m2n
