// packed.cuh - weights of 4 and 8 bits as the products of a decode step take them: in records.
//
// record:   8 rows of w times 64 columns, with the bytes that a lane needs side by side. First the codes: lane l = 4g + c of a
//           warp has those of row g and of columns 2c, 2c + 1, 2c + 8 and 2c + 9 of each 16, which are its share of the mma's
//           operand: 16 bytes (8 bits) or 8 bytes (4 bits). Then 4 bytes for each row: scales.
//           8 bits: word j has 16 columns: bytes 0 and 2 columns 2c and 2c + 1, bytes 1 and 3 columns 2c + 8 and 2c + 9.
//           4 bits: word h has 32 columns: nibbles t and t + 4 are a pair; pairs as bytes are, first of the first 16 columns.
// order:    the records of 8 rows one after the other, filled up to whole 64 columns: columns beyond k have the value 0.
// value:    scale * code, by kind: q8: integers with sign, an f16 scale for each 32 columns (GGUF's Q8_0); i8: the same with
//           one f32 for 64; f8: e4m3, f32; q4: 0 to 15 minus 8, f16 for each 32 (Q4_0); i4: 0 to 15 minus a zero point,
//           f16 scale and integer zero point for 64.
// exact:    codes minus zero points and e4m3 are exact in bf16, so the products on tensor cores are; the scale is applied in
//           f32 to the sum over its columns, of a stage of 64 at most.
// packing:  src/backend/cuda/packed.rs.
#pragma once
#include "device.cuh"

enum Codes { INT8, E4M3, INT4 };
enum Scales { F16_EACH_32, F32_EACH_64, F16_AND_ZERO };

// Plain bf16: not packed.
struct Bf16 {
  typedef bf16 Element;
  static constexpr bool PACKED = false;
  static constexpr int RECORD = 0, GROUP = 64;
};

// The f16 in the high half of a word: its bits where f32 has them, times 2^112. Exact.
DEV float half_value(uint32_t high) {
  return __uint_as_float((uint32_t)((int32_t)high >> 3) & 0x8FFFE000u) * __uint_as_float(0x77800000u);
}

// What a lane has of one record.
template <Codes C, Scales S> struct Packed {
  typedef unsigned char Element;
  static constexpr bool PACKED = true;
  static constexpr int CODES = C == INT4 ? 256 : 512, RECORD = CODES + 32;  // bytes
  static constexpr int GROUP = S == F16_EACH_32 ? 32 : 64;                  // columns of a scale
  uint32_t code[C == INT4 ? 2 : 4];
  float scale[64 / GROUP];
  uint32_t zero = 0xC308C308u;  // INT4: -(128 + zero point), twice

  // record: in global or shared memory.
  DEV void load(const void* record) {
    int lane = threadIdx.x & 31;
    const unsigned char* at = static_cast<const unsigned char*>(record);
    if constexpr (C == INT4) {
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
      scale[0] = half_value(s << 16);
      if constexpr (S == F16_EACH_32) scale[1] = half_value(s);
      if constexpr (S == F16_AND_ZERO) zero = 0xC300C300u | s >> 16 | (s & 0xffff0000u);
    }
  }

  // The weights of columns 2c and 2c + 1 (part 0) or 2c + 8 and 2c + 9 (part 1) of 16 columns, without their scale.
  DEV uint32_t pair(int sixteen, int part) const {
    constexpr uint32_t ONE = 0x3F803F80u;
    if constexpr (C == INT4) {
      uint32_t x = code[sixteen / 2] >> (sixteen % 2 * 8 + part * 4);
      return fma_bf16x2(and_or(x, 0x000F000Fu, 0x43004300u), ONE, zero);  // 128 + q, less 128 + the zero point
    } else {
      if constexpr (C == E4M3) {  // sign, exponent and mantissa where bf16 has them: 2^-120 of the value
        uint32_t sign = part ? code[sixteen] : code[sixteen] << 8, rest = part ? code[sixteen] >> 4 : code[sixteen] << 4;
        return mul_bf16x2(and_or(rest, 0x07F007F0u, sign & 0x80008000u), 0x7B807B80u);
      }
      uint32_t x = part ? code[sixteen] >> 8 : code[sixteen];
      return fma_bf16x2(and_or(x, 0x007F007Fu, 0x43004300u), ONE, and_or(x, 0x00800080u, 0xC300C300u));  // less 128 or 256
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
