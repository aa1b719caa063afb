// How keys and values lie in a page of the cache, and what they mean: src/ops/paged.rs in the kernels.
// bf16:  [ATTN_TILE, D] of each head.
// fp8:   [ATTN_TILE, D] codes of e4m3 and then [ATTN_TILE] scales, bytes, of each head; a value is code * 2^(scale - 127). 16 codes
//        are 16 bytes at a multiple of 16.
// exact: an e4m3 is exact in bf16, and a power of two commutes with rounding: it is applied to what a row's codes are summed to.
#pragma once
#include "device.cuh"
#include "tiles.h"

struct KvBf16 {
  typedef bf16 Element;
  static constexpr bool FP8 = false;
  DEV static constexpr int head(int d) { return ATTN_TILE * d; }  // elements of a head in a page
};

struct KvFp8 {
  typedef unsigned char Element;
  static constexpr bool FP8 = true;
  DEV static constexpr int head(int d) { return ATTN_TILE * (d + 1); }
};

// The low or high halves of two words side by side.
DEV uint32_t lows(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
DEV uint32_t highs(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

// Bytes 0 and 2 of a word of e4m3, or 1 and 3, as a pair of bf16: sign, exponent and mantissa where bf16 has them are 2^-120 of
// the value.
DEV uint32_t e4m3_even(uint32_t codes) {
  return mul_bf16x2(and_or(codes << 4, 0x07F007F0u, codes << 8 & 0x80008000u), 0x7B807B80u);
}
DEV uint32_t e4m3_odd(uint32_t codes) {
  return mul_bf16x2(and_or(codes >> 4, 0x07F007F0u, codes & 0x80008000u), 0x7B807B80u);
}

// The power of two of a byte of scale; 255 is NaN.
DEV float kv_scale(uint32_t byte) { return __uint_as_float(byte << 23 | (byte == 255 ? 1u << 22 : 0u)); }

// The code nearest to x, ties to even; beyond 448 it is 448.
DEV uint32_t e4m3_code(float x) {
  uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 128;
  float top = fminf(__uint_as_float(bits & 0x7fffffffu), 448.f);
  bits = __float_as_uint(top);
  if (top < 0.015625f) return sign | (__float_as_uint(fmaf(top, 512.f, 12582912.f)) & 15u);  // steps of 2^-9
  return sign | ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - (120 << 3);
}

// Stores row `from` of d bf16, d % 16 == 0, as row t of the head of a page at `head`; a full warp. The scale is the smallest power
// of two with which the largest magnitude rounds to at most 448: a function of the row alone.
DEV void store_fp8(unsigned char* head, int t, const bf16* from, int d) {
  int lane = threadIdx.x & 31;
  uint32_t top = 0;  // magnitudes of bf16, whose bits are in their order
  for (int i = lane * 4; i < d; i += 128) {
    uint2 u = *reinterpret_cast<const uint2*>(from + i);
    top = max(max(top, max(u.x & 0x7fffu, u.x >> 16 & 0x7fffu)), max(u.y & 0x7fffu, u.y >> 16 & 0x7fffu));
  }
#pragma unroll
  for (int i = 16; i > 0; i /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, i));
  uint32_t scale = top >= 0x7f80u ? 255 : min(max((top + 23) >> 7, 18u) - 8, 246u);
  float inverse = __uint_as_float((254 - min(scale, 254u)) << 23);
  for (int i = lane * 4; i < d; i += 128) {
    uint2 u = *reinterpret_cast<const uint2*>(from + i);
    uint32_t codes = e4m3_code(bf_lo(u.x) * inverse) | e4m3_code(bf_hi(u.x) * inverse) << 8 |
                     e4m3_code(bf_lo(u.y) * inverse) << 16 | e4m3_code(bf_hi(u.y) * inverse) << 24;
    *reinterpret_cast<uint32_t*>(head + t * d + i) = scale == 255 ? 0x7f7f7f7fu : codes;
  }
  if (lane == 0) head[ATTN_TILE * d + t] = scale;
}
