// emulated_math.h - arithmetic, conversions and integer intrinsics under CUDA's names. Functions that end in _rn, _rz,
// _rd or _ru give the device's bits (the build never contracts a * b + c); approximations such as __expf are libm's and
// do not.
#pragma once
#include "emulated_types.h"

// --- explicitly rounded
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __dsqrt_rn(double a) { return sqrt(a); }

// --- approximate on the device
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return exp10f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1.0f : 0.0f; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// --- to integers: out of range saturates, NaN gives 0 (64-bit: the top bit alone)
template <class I> inline I emu_to_int(double x) {
  constexpr double top = sizeof(I) == 4 ? 4294967296.0 : 18446744073709551616.0;
  constexpr bool is_signed = I(-1) < I(0);
  constexpr double above = is_signed ? top / 2 : top, below = is_signed ? -top / 2 : 0;
  constexpr I top_bit = (I)(1ull << (sizeof(I) * 8 - 1)), most = is_signed ? (I)~top_bit : (I)-1;
  if (x != x) return sizeof(I) == 4 ? 0 : top_bit;
  return x >= above ? most : x < below ? (is_signed ? top_bit : (I)0) : (I)x;
}
#define EMU_TO_INT(type, name)                                                            \
  inline type __float2##name##_rn(float x) { return emu_to_int<type>(rint((double)x)); }  \
  inline type __float2##name##_rz(float x) { return emu_to_int<type>(trunc((double)x)); } \
  inline type __float2##name##_rd(float x) { return emu_to_int<type>(floor((double)x)); } \
  inline type __float2##name##_ru(float x) { return emu_to_int<type>(ceil((double)x)); }  \
  inline type __double2##name##_rn(double x) { return emu_to_int<type>(rint(x)); }        \
  inline type __double2##name##_rz(double x) { return emu_to_int<type>(trunc(x)); }
EMU_TO_INT(int, int)
EMU_TO_INT(unsigned, uint)
EMU_TO_INT(long long, ll)
EMU_TO_INT(unsigned long long, ull)
#undef EMU_TO_INT

// --- from integers, to nearest even
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
inline float __ll2float_rn(long long x) { return (float)x; }
inline float __ull2float_rn(unsigned long long x) { return (float)x; }
inline double __int2double_rn(int x) { return x; }
inline double __uint2double_rn(unsigned x) { return x; }
inline double __ll2double_rn(long long x) { return (double)x; }
inline double __ull2double_rn(unsigned long long x) { return (double)x; }
inline float __double2float_rn(double x) { return (float)x; }

// --- integers
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
  unsigned long long bytes = (unsigned long long)y << 32 | x;
  unsigned v = 0;
  for (int i = 0; i < 4; i++) v |= (unsigned)(bytes >> (s >> 4 * i & 7) * 8 & 255) << 8 * i;
  return v;
}
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
  return r;
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
  return (unsigned)(((unsigned long long)hi << 32 | lo) << (n & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
  return (unsigned)(((unsigned long long)hi << 32 | lo) >> (n & 31));
}

#define EMU_MINMAX(T)                              \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
EMU_MINMAX(int)
EMU_MINMAX(unsigned)
EMU_MINMAX(long)
EMU_MINMAX(unsigned long)
EMU_MINMAX(long long)
EMU_MINMAX(unsigned long long)
#undef EMU_MINMAX
inline float min(float a, float b) { return fminf(a, b); }  // a NaN loses
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// --- cached and streaming accesses are plain ones
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
template <class T> inline void __stcg(T* p, T v) { *p = v; }
