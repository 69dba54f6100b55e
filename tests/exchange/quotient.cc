// SPDX-License-Identifier: Apache-2.0
// exchange/rows/quantize.h's Divider beside divisions: the same quotient to the last bit, and where remainders
// underflow the same float8. Usage: quotient SEED ROUNDS.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "exchange/rows/quantize.h"

namespace {

using namespace m2n;

std::mt19937_64 g_random;
constexpr float kUnderflows = 0x1p-100f;  // of a remainder of what is smaller some bits may be lost

float random_fraction() { return bits_to_float(0x3F800000u | (g_random() & 0x7FFFFFu)); }  // from 1 up to 2

void require_same(float x, float scale) {
  const float expected = x / scale;
  const float quotient = Divider(scale)(x);
  const bool is_same = std::fabs(x) < kUnderflows || float_to_bits(quotient) == float_to_bits(expected);
  if (is_same && from_float<Float8E4M3>(quotient).bits == from_float<Float8E4M3>(expected).bits) return;
  std::printf("%a / %a is %a, not %a\n", x, scale, expected, quotient);
  std::exit(1);
}

}  // namespace

int main(int, char** arguments) {
  g_random.seed(std::atoll(arguments[1]));
  for (long i = 0; i < std::atol(arguments[2]); ++i) {
    const int exponent = static_cast<int>(g_random() % 160) - 80;
    const float scale = std::ldexp(i % 16 == 0 ? bits_to_float(0x3FFFFFFFu) : random_fraction(), exponent);
    if (!Divider::can_divide_by(scale)) continue;
    const float sign = g_random() % 2 == 0 ? 1.0f : -1.0f;
    const int smaller = static_cast<int>(g_random() % 4 == 0 ? g_random() % 140 : g_random() % 20);
    require_same(sign * std::ldexp(random_fraction(), 8 - smaller) * scale, scale);
    // Half way between two numbers of float8, and the neighbours of that.
    const float low = static_cast<float>(16 + g_random() % 16) + 0.5f;
    float x = sign * std::ldexp(low, 4 - static_cast<int>(g_random() % 16)) * scale;
    for (int step = 0; step < 2; ++step) x = std::nextafter(x, 0.0f);
    for (int step = 0; step < 5; ++step, x = std::nextafter(x, sign * INFINITY)) require_same(x, scale);
  }
  for (const float scale : {0x1p-80f, 0x1p80f, 1.0f}) {
    for (const float x : {0.0f, -0.0f, 448 * scale, -448 * scale, 0x1p-149f, NAN}) require_same(x, scale);
  }
  std::printf("as divided\n");
}
