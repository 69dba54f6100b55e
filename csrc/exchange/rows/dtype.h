// SPDX-License-Identifier: Apache-2.0
// Element types of rows, and their exact conversions: round to nearest even, as torch does.
#pragma once

#include <bit>
#include <cstdint>
#include <utility>

#include "core/platform.h"

namespace m2n {

// kFloat8E4M3 (e4m3fn): only of rows on their way to experts, with their scales (quantize.h).
enum class DType : uint32_t { kFloat32, kBFloat16, kFloat16, kFloat8E4M3 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8E4M3 {
  uint8_t bits;
};

M2N_HD constexpr uint32_t dtype_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat8E4M3 ? 1 : 2;
}

#if defined(__CUDA_ARCH__)
M2N_HD inline float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
M2N_HD inline uint32_t float_to_bits(float value) { return __float_as_uint(value); }
#else
M2N_HD inline float bits_to_float(uint32_t bits) { return std::bit_cast<float>(bits); }
M2N_HD inline uint32_t float_to_bits(float value) { return std::bit_cast<uint32_t>(value); }
#endif

M2N_HD inline float to_float(float value) { return value; }

M2N_HD inline float to_float(BFloat16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

M2N_HD inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7FFFu;
  // Moved into float's fields and scaled by 2^112: exact for normal and subnormal values alike.
  uint32_t bits = float_to_bits(bits_to_float(rest << 13) * 0x1p112f);
  if (rest >= 0x7C00u) bits |= 0x7F800000u;  // infinity or NaN
  return bits_to_float(bits | sign);
}

template <class T>
M2N_HD T from_float(float value);

template <>
M2N_HD inline float from_float<float>(float value) {
  return value;
}

template <>
M2N_HD inline BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return BFloat16{static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded)};
}

template <>
M2N_HD inline Float16 from_float<Float16>(float value) {
  const uint32_t all = float_to_bits(value);
  const uint32_t sign = (all & 0x80000000u) >> 16;
  const uint32_t bits = all & 0x7FFFFFFFu;
  uint32_t half;
  if (bits >= 0x47800000u) {  // 65536 and above, infinity, NaN
    half = bits > 0x7F800000u ? 0x7E00u : 0x7C00u;
  } else if (bits < 0x38800000u) {  // below 2^-14: let one addition round the subnormal
    half = float_to_bits(bits_to_float(bits) + 0.5f) - 0x3F000000u;
  } else {
    half = (bits - 0x38000000u + 0xFFFu + ((bits >> 13) & 1u)) >> 13;
  }
  return Float16{static_cast<uint16_t>(half | sign)};
}

// Beyond +-448 it is +-448; NaN is 0x7F, whatever its sign, which processors do not agree on. Masks in place of ?:, of
// which compilers make branches: so the host does several at a time.
template <>
M2N_HD inline Float8E4M3 from_float<Float8E4M3>(float value) {
  constexpr uint32_t kLargest = 0x43E00000u;      // 448
  constexpr uint32_t kLeastNormal = 0x3C800000u;  // 2^-6
  const uint32_t all = float_to_bits(value);
  const uint32_t sign = (all >> 24) & 0x80u;
  const uint32_t magnitude = all & 0x7FFFFFFFu;
  const uint32_t bits = magnitude < kLargest ? magnitude : kLargest;
  // Of 2^14 a unit in the last place is 2^-9, as of the subnormals: let one addition round them.
  const uint32_t subnormal = float_to_bits(bits_to_float(bits) + 0x1p14f) - 0x46800000u;
  const uint32_t normal = (bits - 0x3C000000u + 0x7FFFFu + ((bits >> 20) & 1u)) >> 20;
  const uint32_t is_subnormal = 0u - uint32_t{bits < kLeastNormal};  // all bits, or none
  const uint32_t is_nan = 0u - uint32_t{magnitude > 0x7F800000u};
  const uint32_t number = (subnormal & is_subnormal) | (normal & ~is_subnormal) | sign;
  return Float8E4M3{static_cast<uint8_t>((0x7Fu & is_nan) | (number & ~is_nan))};
}

// +0 + value, rounded: the value, but +0 for -0, and a quiet NaN for any NaN.
M2N_HD inline float plus_zero(float value) { return 0.0f + value; }
M2N_HD inline BFloat16 plus_zero(BFloat16 value) {
  const auto magnitude = static_cast<int16_t>(value.bits & 0x7FFFu);
  const uint16_t number = magnitude == 0 ? uint16_t{0} : value.bits;
  return BFloat16{magnitude > 0x7F80 ? uint16_t{0x7FC0} : number};
}
M2N_HD inline Float16 plus_zero(Float16 value) {
  const auto magnitude = static_cast<int16_t>(value.bits & 0x7FFFu);
  const uint16_t number = magnitude == 0 ? uint16_t{0} : value.bits;
  return Float16{magnitude > 0x7C00 ? static_cast<uint16_t>((value.bits & 0x8000u) | 0x7E00u) : number};
}

// Calls `body` with a value of the element type; one that can be computed with.
template <class Body>
void with_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kFloat8E4M3:
      return;
  }
}

template <class Body>
void with_dtypes(DType first, DType second, Body&& body) {
  with_dtype(first, [&](auto in) { with_dtype(second, [&](auto out) { body(in, out); }); });
}

}  // namespace m2n
