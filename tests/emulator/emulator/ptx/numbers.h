// numbers.h - roundings that C++ does not have.
#pragma once
#include <cfloat>
#include <cmath>
#include <limits>

#include "ptx.h"

namespace ptx {
// Arithmetic makes no other NaN than this.
inline float canonical(float x) { return x == x ? x : bits_of<float>(0x7fffffffu); }
inline double canonical(double x) { return x == x ? x : bits_of<double>(0x7fffffffffffffffull); }
inline float flushed(float x) { return fabsf(x) < FLT_MIN ? copysignf(0, x) : x; }  // .ftz

enum Rounding { NEAREST, ZERO, DOWN, UP };
// A number as an unrounded sum: high is it rounded to double, low what that leaves.
struct Exact {
  double high, low;
};
inline Exact sum(double a, double b, Rounding how = NEAREST) {
  double s = a + b, t = s - a;
  if (s == 0 && std::signbit(a) != std::signbit(b)) s = how == DOWN ? -0.0 : 0.0;  // IEEE 754, 6.3
  return {s, std::isfinite(s) ? (a - (s - t)) + (b - t) : 0};
}
inline float rounded(Exact x, Rounding how) {  // to f32, directed
  float r = (float)x.high;
  if (!std::isfinite(x.high) || how == NEAREST) return r;
  double excess = (double)r - x.high;  // exact; an infinite r is above or below all of it
  bool above = excess > 0 || (excess == 0 && x.low < 0), below = excess < 0 || (excess == 0 && x.low > 0);
  bool down = how == DOWN || (how == ZERO && x.high > 0), up = how == UP || (how == ZERO && x.high < 0);
  if (above && down) return nextafterf(r, -INFINITY);
  if (below && up) return nextafterf(r, INFINITY);
  return r;
}
// To f32 so that a later rounding to fewer bits is the only one: what is inexact becomes odd.
inline float odd(Exact x) {
  float r = rounded(x, ZERO);
  bool exact = (double)r == x.high && x.low == 0;
  return exact || !std::isfinite(r) ? r : bits_of<float>(bits_of<uint32_t>(r) | 1);
}
inline float from_bf16(uint16_t b) { return bits_of<float>((uint32_t)b << 16); }
inline uint16_t to_bf16(float x) {  // to nearest even
  uint32_t u = bits_of<uint32_t>(x);
  return x == x ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : 0x7fff;
}
inline float from_f16(uint16_t h) {
  int exponent = h >> 10 & 31, fraction = h & 1023;
  float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                    : exponent     ? ldexpf(1024 + fraction, exponent - 25)
                                   : ldexpf(fraction, -24);
  return h & 0x8000 ? -magnitude : magnitude;
}
inline uint16_t to_f16(float x) {  // to nearest even
  if (x != x) return 0x7fff;
  uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  float a = fabsf(x);
  if (a >= 65520) return sign | 0x7c00;  // halfway to the next power of two
  if (a < 0x1p-14f) return sign | (uint16_t)rintf(ldexpf(a, 24));
  int exponent;
  float fraction = frexpf(a, &exponent);  // in [0.5, 1)
  return sign | (uint16_t)(((exponent + 14) << 10) + (int)rintf(ldexpf(fraction, 11)) - 1024);
}
}  // namespace ptx
