// SPDX-License-Identifier: Apache-2.0
// Results do not depend on what a host program has set for its own arithmetic: rounding, flushing to zero, traps.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace m2n {

// While it lives, this thread rounds to nearest even, keeps subnormal numbers and traps nothing. Where that is so
// already, as nearly always, it costs a read of one register.
class PlainFloats {
 public:
  PlainFloats() : found_(read()) {
    if ((found_ & kControls) != kPlain) write((found_ & ~kControls) | kPlain);
  }
  ~PlainFloats() {
    if ((found_ & kControls) != kPlain) write(found_);
  }
  PlainFloats(const PlainFloats&) = delete;
  PlainFloats& operator=(const PlainFloats&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kControls = 0xFFC0;  // of MXCSR: all but what has happened
  static constexpr uint64_t kPlain = 0x1F80;     // every trap is masked
  static uint64_t read() { return _mm_getcsr(); }
  static void write(uint64_t value) { _mm_setcsr(static_cast<uint32_t>(value)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kControls = 0x07FF9F00;  // of FPCR: traps, rounding, flushing, default NaN, half precision
  static constexpr uint64_t kPlain = 0;
  static uint64_t read() {
    uint64_t value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void write(uint64_t value) { asm volatile("msr fpcr, %0" ::"r"(value)); }
#else
#error "m2n knows the floating-point environment of x86-64 and arm64"
#endif
  uint64_t found_;
};

}  // namespace m2n
