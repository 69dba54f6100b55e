// SPDX-License-Identifier: Apache-2.0
// Rows that become float8 on their way into a peer's window. The arithmetic is fixed, each step one operation of
// float32, so that host, device and oracle agree bit for bit: of a block of 128 elements amax = max |x|, where NaN does
// not count; scale = amax / 448, and 1 where that is not above 0; q = x / scale, to the nearest (even), at most +-448.
// NaN stays NaN, and an infinite x makes the scale infinite: the whole block is NaN for who multiplies again.
#pragma once

#include <cstdint>

#include "core/arrive.h"
#include "exchange/rows/dtype.h"
#include "exchange/rows/layout.h"
#include "exchange/rows/sum.h"

namespace m2n {

#if defined(__CUDA_ARCH__)
inline constexpr uint32_t kQuantSpan = 16;  // elements of a lane, in registers: 16 bytes in the window
#else
inline constexpr uint32_t kQuantSpan = kScaleBlock;
#endif
inline constexpr uint32_t kBlockLanes = kScaleBlock / kQuantSpan;  // so many lanes have a block together

// The largest magnitude, as bits, which have the order of the numbers.
template <class In>
M2N_HD inline __attribute__((always_inline)) uint32_t widen_elements(float* values, const In* from, uint32_t count) {
#if defined(__CUDA_ARCH__)
  float largest = 0;
  for (uint32_t h = 0; h < count; ++h) {
    values[h] = to_float(from[h]);
    largest = fmaxf(largest, fabsf(values[h]));  // of a NaN and a number the number
  }
  return float_to_bits(largest);
#else
  uint32_t largest = 0;
  for (uint32_t h = 0; h < count; ++h) {
    values[h] = to_float(from[h]);
    const uint32_t magnitude = float_to_bits(values[h]) & 0x7FFFFFFFu;
    const uint32_t number = magnitude & (0u - uint32_t{magnitude <= 0x7F800000u});  // NaN: 0, without a branch
    largest = number > largest ? number : largest;
  }
  return largest;
#endif
}
M2N_HD inline __attribute__((always_inline)) void narrow_elements(unsigned char* to, const float* values,
                                                                  uint32_t count, float scale) {
  for (uint32_t h = 0; h < count; ++h) to[h] = from_float<Float8E4M3>(values[h] / scale).bits;
}

// x / scale for all x of a block, without a division each: a product with 1 / scale, and what it is off by added twice,
// which leaves the quotient to the nearest, as a division gives it (Markstein 1990; tests/exchange/quotient.cc). What
// is lost of an x whose remainders underflow changes no bit of float8: with such a scale its quotient is far below
// 2^-10, or 0.
struct Divider {
  float scale, inverse;

  M2N_HD explicit Divider(float scale) : scale(scale), inverse(1.0f / scale) {}
  M2N_HD static bool can_divide_by(float scale) { return scale >= 0x1p-80f && scale <= 0x1p80f; }
  M2N_HD float operator()(float x) const {
    const float product = x * inverse;
    const float once = add_product(product, add_product(x, product, -scale), inverse);
    const float twice = add_product(once, add_product(x, once, -scale), inverse);
    const uint32_t sign = float_to_bits(x) & 0x80000000u;  // of -0 it would be lost
    return bits_to_float((float_to_bits(twice) & 0x7FFFFFFFu) | sign);
  }

 private:
  M2N_HD static float add_product(float sum, float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, sum);
#else
    return __builtin_fmaf(a, b, sum);
#endif
  }
};

#if defined(__CUDA_ARCH__)
template <class In>
struct alignas(16) QuantSpan {
  In values[kQuantSpan];
};

// Two elements of float8, the first in the lower byte.
__device__ inline uint32_t narrow_pair(float first, float second) {
#if __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return from_float<Float8E4M3>(first).bits | uint32_t{from_float<Float8E4M3>(second).bits} << 8;
#endif
}
template <class Divide>
__device__ void narrow_words(uint32_t* words, const float* values, Divide&& divide) {
#pragma unroll
  for (uint32_t h = 0; h < kQuantSpan; h += 4) {
    words[h / 4] = narrow_pair(divide(values[h]), divide(values[h + 1])) |
                   narrow_pair(divide(values[h + 2]), divide(values[h + 3])) << 16;
  }
}

template <class In>
__device__ uint32_t widen_span(float* values, const In* from, uint32_t count) {
  if (count != kQuantSpan || reinterpret_cast<uint64_t>(from) % 16 != 0) {
#pragma unroll
    for (uint32_t h = 0; h < kQuantSpan; ++h) values[h] = h < count ? to_float(from[h]) : 0.0f;
    return widen_elements(values, values, kQuantSpan);
  }
  const QuantSpan<In> loaded = *reinterpret_cast<const QuantSpan<In>*>(from);
  return widen_elements(values, loaded.values, kQuantSpan);
}
__device__ inline void narrow_span(unsigned char* to, const float* values, uint32_t count, float scale) {
  uint32_t words[kQuantSpan / 4];
  if (Divider::can_divide_by(scale)) {
    narrow_words(words, values, Divider(scale));
  } else {
    narrow_words(words, values, [scale](float x) { return x / scale; });
  }
  if (count == kQuantSpan) {  // rows begin at 16 bytes in the window
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
#pragma unroll
  for (uint32_t h = 0; h < kQuantSpan; ++h) {
    if (h < count) to[h] = static_cast<unsigned char>(words[h / 4] >> (h % 4 * 8));
  }
}
#else
#if defined(__x86_64__) && !defined(__CUDACC__)
template <class In>
__attribute__((target("avx2"))) uint32_t widen_avx2(float* values, const In* from, uint32_t count) {
  return widen_elements(values, from, count);
}
__attribute__((target("avx2"))) inline void narrow_avx2(unsigned char* to, const float* values, uint32_t count,
                                                        float scale) {
  narrow_elements(to, values, count, scale);
}
#endif
template <class In>
uint32_t widen_span(float* values, const In* from, uint32_t count) {
#if defined(__x86_64__) && !defined(__CUDACC__)
  if (kHasAvx2) return widen_avx2(values, from, count);
#endif
  return widen_elements(values, from, count);
}
inline void narrow_span(unsigned char* to, const float* values, uint32_t count, float scale) {
#if defined(__x86_64__) && !defined(__CUDACC__)
  if (kHasAvx2) return narrow_avx2(to, values, count, scale);
#endif
  narrow_elements(to, values, count, scale);
}
#endif

// A group's piece of a row: a span for each lane, from element `begin` on. All lanes must come.
template <class In, class Exec>
M2N_HD void quantize_piece(const Exec& exec, unsigned char* row, const In* from, uint32_t hidden, uint32_t begin) {
#if defined(__CUDA_ARCH__)
  const uint32_t lane = exec.lane();
#else
  const uint32_t lane = 0;
#endif
  const uint32_t at = begin + lane * kQuantSpan;
  const uint32_t left = at < hidden ? hidden - at : 0;
  const uint32_t count = left < kQuantSpan ? left : kQuantSpan;
  float values[kQuantSpan];
  const uint32_t largest = exec.max_of_lanes(widen_span(values, from + at, count), kBlockLanes);
  const float quotient = bits_to_float(largest) / 448.0f;
  const float scale = quotient > 0.0f ? quotient : 1.0f;
  narrow_span(row + at, values, count, scale);
  if (lane % kBlockLanes == 0 && count != 0) {
    reinterpret_cast<float*>(row + scales_offset(hidden))[at / kScaleBlock] = scale;
  }
}

// Rows of In, in the order row_at(i) gives; put_beside as of put_rows.
template <class In, class Exec, class RowAt, class PutBeside>
M2N_HD void put_quantized_rows(const Exec& exec, Deal& deal, unsigned char* to, uint32_t num_rows, uint64_t row_bytes,
                               uint32_t hidden, RowAt&& row_at, PutBeside&& put_beside) {
#if defined(__CUDA_ARCH__)
  const uint32_t num_lanes = exec.num_lanes();
#else
  const uint32_t num_lanes = 1;
#endif
  const uint32_t step = num_lanes * kQuantSpan;
  const uint32_t num_pieces = (hidden + step - 1) / step;
  deal(num_rows * num_pieces, [&](uint32_t i) {
    const uint32_t row = i / num_pieces;
    const uint32_t begin = (i - row * num_pieces) * step;
    quantize_piece(exec, to + row * row_bytes, reinterpret_cast<const In*>(row_at(row)), hidden, begin);
    if (begin == 0) put_beside(row, row + 1);
  });
}

}  // namespace m2n
