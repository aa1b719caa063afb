// packed.cuh - weights of 4 and 8 bits as the products of a decode step take them: in records.
//
// record:   8 rows of w times 64 columns, with the bytes that a lane needs side by side. First the codes: lane l = 4g + c of a
//           warp has those of row g and of columns 8c to 8c + 7 of each half of 32: 16 bytes (8 bits) or 8 bytes (4 bits).
//           They are eight pairs of columns, 0 to 3 of the first half. Then 4 bytes for each row: scales.
//           8 bits: word j has pair 2j in bytes 0 and 2, pair 2j + 1 in bytes 1 and 3.
//           4 bits: word h has pair 4h + t in nibbles t and t + 4.
// mma:      two pairs are a lane's share of the operand, which should be columns 2c, 2c + 1, 2c + 8 and 2c + 9 of 16. The
//           order of columns within a sum is free, so they are others, and x is read alike: a lane's 8 columns of x are 16
//           bytes, and one scale covers 32 columns whatever the order is.
// order:    the records of 8 rows one after the other, filled up to whole 64 columns: columns beyond k have the value 0.
// value:    scale * code, by kind: q8: 0 to 255 minus 128, an f16 scale for each 32 columns (GGUF's Q8_0); i8: the same with
//           one f32 for 64; f8: e4m3, f32; q4: 0 to 15 minus 8, f16 for each 32 (Q4_0); i4: 0 to 15 minus a zero point,
//           f16 scale and, as bf16, minus the zero point / 64 for 64.
// exact:    codes minus zero points and e4m3 are exact in bf16, so the products on tensor cores are; the scale is applied in
//           f32 to the sum over its columns, of a stage of 64 at most.
// integers: in the low bits of bf16 an integer q up to 255 is q * 2^-133, whether that is subnormal (below 128) or not, and
//           fma.rn.bf16x2 knows subnormals. So one fma makes (q - zero) / 64 of bits that were only masked: the product with
//           2^127 is q / 64, that of a nibble four bits higher with 2^123 too. (2^133 is no bf16; the 64 is in UNIT.) The
//           codes of 8 columns take 9 instructions, or 8 with 8 bits, were 11 and 14 with the exponent of 128 put in first.
//           Leaving the zero point to a correction by sums of x would save the fma, but these sums take tensor cores as
//           many instructions as it saves, and x would have to be scaled instead.
// packing:  src/backend/cuda/packed.rs.
#pragma once
#include "device.cuh"

enum Codes { INT8, E4M3, INT4 };
enum Scales { F16_EACH_32, F32_EACH_64, F16_AND_ZERO };

// Plain bf16: not packed.
struct Bf16 {
  typedef bf16 Element;
  static constexpr bool PACKED = false, NARROW = false;
  static constexpr int RECORD = 0, GROUP = 64;
};

// What a lane has of one record.
template <Codes C, Scales S> struct Packed {
  typedef unsigned char Element;
  static constexpr bool PACKED = true, NARROW = C == INT4;
  static constexpr int CODES = NARROW ? 256 : 512, RECORD = CODES + 32;  // bytes
  static constexpr int GROUP = S == F16_EACH_32 ? 32 : 64;               // columns of a scale
  static constexpr float UNIT = C == E4M3 ? 1.f : 64.f;                  // of what pair() gives
  uint32_t code[NARROW ? 2 : 4];
  float scale[64 / GROUP];
  uint32_t zero = C == INT8 ? 0xC000C000u : 0xBE00BE00u;  // integers: -128 / UNIT or -8 / UNIT, twice

  // record: in global or shared memory.
  DEV void load(const void* record) {
    int lane = threadIdx.x & 31;
    const unsigned char* at = static_cast<const unsigned char*>(record);
    if constexpr (NARROW) {
      uint2 v = *reinterpret_cast<const uint2*>(at + lane * 8);
      code[0] = v.x, code[1] = v.y;
    } else {
      uint4 v = ld128(at + lane * 16);
      code[0] = v.x, code[1] = v.y, code[2] = v.z, code[3] = v.w;
    }
    uint32_t s = *reinterpret_cast<const uint32_t*>(at + CODES + (lane >> 2) * 4);
    if constexpr (S == F32_EACH_64) {
      scale[0] = __uint_as_float(s);
    } else {
      scale[0] = half_lo(s);
      if constexpr (S == F16_EACH_32) scale[1] = half_hi(s);
      if constexpr (S == F16_AND_ZERO) zero = __byte_perm(s, 0, 0x3232);
    }
  }

  // The weights of the lane's pair 0 to 7 of columns, without scale, divided by UNIT.
  DEV uint32_t pair(int pair) const {
    if constexpr (C == INT4) {
      uint32_t x = pair % 4 < 2 ? code[pair / 4] : code[pair / 4] >> 8;
      return pair % 2 ? fma_bf16x2(x & 0x00F000F0u, 0x7D007D00u, zero) : fma_bf16x2(x & 0x000F000Fu, 0x7F007F00u, zero);
    } else if constexpr (C == INT8) {
      uint32_t x = code[pair / 2];
      return fma_bf16x2(pair % 2 ? __byte_perm(x, 0, 0x4341) : x & 0x00FF00FFu, 0x7F007F00u, zero);
    } else {  // sign, exponent and mantissa where bf16 has them: 2^-120 of the value
      uint32_t x = code[pair / 2], sign = pair % 2 ? x : x << 8, rest = pair % 2 ? x >> 4 : x << 4;
      return mul_bf16x2(and_or(rest, 0x07F007F0u, sign & 0x80008000u), 0x7B807B80u);
    }
  }
};

typedef Packed<INT8, F16_EACH_32> Q8;
typedef Packed<INT8, F32_EACH_64> I8;
typedef Packed<E4M3, F32_EACH_64> F8;
typedef Packed<INT4, F16_EACH_32> Q4;
typedef Packed<INT4, F16_AND_ZERO> I4;

// KERNEL(name, type) for each kind, name##_kind##rest.
#define EACH_PACKED(KERNEL, name, rest) \
  KERNEL(name##_q8##rest, Q8)           \
  KERNEL(name##_i8##rest, I8)           \
  KERNEL(name##_f8##rest, F8)           \
  KERNEL(name##_q4##rest, Q4)           \
  KERNEL(name##_i4##rest, I4)
