// SPDX-License-Identifier: Apache-2.0
// The weighted sum of rows. The arithmetic is fixed (float32, the order written here, no contraction), so that results
// equal the oracle's bit for bit. Host and device run the same sums; the host has wider instructions where it finds
// them, which round the same.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/arrive.h"
#include "exchange/rows/dtype.h"

namespace m2n {

#if defined(__CUDA_ARCH__)
inline constexpr uint32_t kSpan = 8;  // of a lane, in registers: 16 bytes of 16-bit elements
inline constexpr uint32_t kWide = 2;  // so many spans of a row by a lane
#else
inline constexpr uint32_t kSpan = 1024;  // elements summed at a time, in the first cache level
inline constexpr uint32_t kWide = 1;
#endif

// The spans of a row that belong together: kWide of them, at begin, begin + step, ..., those below `end`.
struct Spans {
  uint32_t begin, step, end;
  bool are_whole;  // on a device: pieces of 16 bytes
};

// Are all spans of rows whole, where rows lie at `base`, `stride_bytes` apart?
M2N_HD inline bool are_whole_spans(uint32_t hidden, const void* base, uint64_t stride_bytes) {
  return hidden % kSpan == 0 && (reinterpret_cast<uint64_t>(base) | stride_bytes) % 16 == 0;
}

// Spans of all rows, dealt out to groups of lanes.
template <class Exec, class Body>
M2N_HD void for_each_span([[maybe_unused]] const Exec& exec, Deal& deal, uint32_t num_rows, uint32_t hidden,
                          bool are_whole, Body&& body) {
#if defined(__CUDA_ARCH__)
  const uint32_t num_lanes = exec.num_lanes(), lane = exec.lane();
#else
  const uint32_t num_lanes = 1, lane = 0;
#endif
  const uint32_t step = num_lanes * kSpan;
  const uint32_t pieces = (hidden + kWide * step - 1) / (kWide * step);
  deal(num_rows * pieces, [&](uint32_t i) {
    const uint32_t row = i / pieces;
    const uint32_t begin = (i - row * pieces) * kWide * step + lane * kSpan;
#if defined(__CUDA_ARCH__)
    body(row, Spans{begin, step, hidden, are_whole});
#else
    body(row, Spans{begin, step, begin + kSpan < hidden ? begin + kSpan : hidden, are_whole});
#endif
  });
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

#if defined(__CUDA_ARCH__)
// A span as the loads and stores of 16 bytes that it is.
template <class T>
struct alignas(16) Span {
  T values[kSpan];
};

// The loads of several rows are under way at once.
template <bool kWeighted, class In, class Out, class RowAt, class WeightAt>
__device__ void sum_whole_spans(Out* out, const Spans& spans, uint32_t num_rows, RowAt&& row_at, WeightAt&& weight_at) {
  constexpr uint32_t kRows = sizeof(In) == 2 ? 4 : 2;
  float total[kWide][kSpan] = {};
  for (uint32_t first = 0; first < num_rows; first += kRows) {
    const In* rows[kRows];
    Span<In> loaded[kRows][kWide];
    float weights[kRows];
#pragma unroll
    for (uint32_t i = 0; i < kRows; ++i) rows[i] = first + i < num_rows ? row_at(first + i) : nullptr;
#pragma unroll
    for (uint32_t i = 0; i < kRows; ++i) {
      if (rows[i] == nullptr) continue;
      weights[i] = weight_at(first + i);
#pragma unroll
      for (uint32_t w = 0; w < kWide; ++w) {
        const uint32_t at = spans.begin + w * spans.step;
        if (at < spans.end) loaded[i][w] = *reinterpret_cast<const Span<In>*>(rows[i] + at);
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kRows; ++i) {
      if (rows[i] == nullptr) continue;
#pragma unroll
      for (uint32_t w = 0; w < kWide; ++w) add_elements<kWeighted>(total[w], loaded[i][w].values, kSpan, weights[i]);
    }
  }
#pragma unroll
  for (uint32_t w = 0; w < kWide; ++w) {
    const uint32_t at = spans.begin + w * spans.step;
    if (at >= spans.end) return;
    Span<Out> result;
    cast_elements(result.values, total[w], kSpan);
    *reinterpret_cast<Span<Out>*>(out + at) = result;
  }
}

// Where rows do not begin at 16 bytes, or end within a span.
template <bool kWeighted, class In, class Out, class RowAt, class WeightAt>
__device__ void sum_elements(Out* out, const Spans& spans, uint32_t num_rows, RowAt&& row_at, WeightAt&& weight_at) {
  for (uint32_t begin = spans.begin; begin < spans.begin + kWide * spans.step; begin += spans.step) {
    for (uint32_t at = begin; at < begin + kSpan && at < spans.end; ++at) {
      float total = 0.0f;
      for (uint32_t i = 0; i < num_rows; ++i) {
        const In* row = row_at(i);
        if (row != nullptr) add_elements<kWeighted>(&total, row + at, 1, weight_at(i));
      }
      out[at] = from_float<Out>(total);
    }
  }
}
#endif

// total = +0, then total = total + weight * row, for every row that `row_at(i)` gives (nullptr: nothing to add), cast
// once into `out`. Products and sums round separately.
template <bool kWeighted, class In, class Out, class RowAt, class WeightAt>
M2N_HD void sum_spans(Out* out, const Spans& spans, uint32_t num_rows, RowAt&& row_at, WeightAt&& weight_at) {
#if defined(__CUDA_ARCH__)
  if (spans.are_whole) {
    sum_whole_spans<kWeighted, In>(out, spans, num_rows, row_at, weight_at);
  } else {
    sum_elements<kWeighted, In>(out, spans, num_rows, row_at, weight_at);
  }
#else
  const uint32_t begin = spans.begin, end = spans.end;
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
#endif
}

// The elements of a row, cast once.
template <class In, class Out>
M2N_HD void cast_spans(Out* to, const In* from, const Spans& spans) {
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (uint32_t w = 0; w < kWide; ++w) {
    const uint32_t at = spans.begin + w * spans.step;
    if (at < spans.end && spans.are_whole) {
      const Span<In> loaded = *reinterpret_cast<const Span<In>*>(from + at);
      Span<Out> cast;
#pragma unroll
      for (uint32_t h = 0; h < kSpan; ++h) cast.values[h] = from_float<Out>(to_float(loaded.values[h]));
      *reinterpret_cast<Span<Out>*>(to + at) = cast;
    }
    for (uint32_t h = at; !spans.are_whole && h < at + kSpan && h < spans.end; ++h) {
      to[h] = from_float<Out>(to_float(from[h]));
    }
  }
#else
  for (uint32_t h = spans.begin; h < spans.end; ++h) to[h] = from_float<Out>(to_float(from[h]));
#endif
}

// Not a number, in all of them.
template <class T>
M2N_HD void fill_with_nan(T* to, const Spans& spans) {
  for (uint32_t w = 0; w < kWide; ++w) {
    const uint32_t begin = spans.begin + w * spans.step;
    const uint32_t end = begin + kSpan < spans.end ? begin + kSpan : spans.end;
    for (uint32_t h = begin; h < end; ++h) to[h] = from_float<T>(bits_to_float(0x7FC00000u));
  }
}

}  // namespace m2n
