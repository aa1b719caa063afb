// float.cpp - floating point: PTX ISA, "Floating Point" and "Half Precision Floating Point Instructions". What a GPU
// approximates (.approx) is computed in double and rounded once: that is within the error that the ISA allows, but does
// not give the hardware's bits.
#include "numbers.h"

namespace ptx {
using u32 = uint32_t;
using u16 = uint16_t;

// --- f32 and f64, to nearest even unless the name says otherwise
template <class T> static T clamped(T x) { return x > 0 ? x < 1 ? x : 1 : 0; }  // .sat: a NaN becomes 0
template <class T> static T least(T a, T b) {
  if (a != a || b != b) return a == a ? a : canonical(b);
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T> static T greatest(T a, T b) {
  if (a != a || b != b) return a == a ? a : canonical(b);
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}
template <class T> static T fused(T a, T b, T c) { return canonical(std::fma(a, b, c)); }
// Each lane by the processor's own instruction where it has one.
__attribute__((target_clones("fma", "default"))) static void fma_f32(Warp& w, const Instr& in, u32 lanes) {
  float* d = w.reg<float>(in.op[0]);
  const float *a = w.reg<float>(in.op[1]), *b = w.reg<float>(in.op[2]), *c = w.reg<float>(in.op[3]);
  if (lanes == ~0u) {
#pragma GCC ivdep
    for (int i = 0; i < 32; i++) d[i] = canonical(__builtin_fmaf(a[i], b[i], c[i]));
  } else {
    for (u32 m = lanes; m; m &= m - 1) {
      int i = __builtin_ctz(m);
      d[i] = canonical(__builtin_fmaf(a[i], b[i], c[i]));
    }
  }
}
template <class T> static void arithmetic_of(const std::string& t) {
  for (const char* rounding : {"", ".rn"}) {
    define2<[](T a, T b) { return canonical(a + b); }, T, T, T>(std::string("add") + rounding + t);
    define2<[](T a, T b) { return canonical(a - b); }, T, T, T>(std::string("sub") + rounding + t);
    define2<[](T a, T b) { return canonical(a * b); }, T, T, T>(std::string("mul") + rounding + t);
  }
  define2<[](T a, T b) { return canonical(a / b); }, T, T, T>("div.rn" + t);
  define1<[](T a) { return canonical(1 / a); }, T, T>("rcp.rn" + t);
  define1<[](T a) { return canonical(std::sqrt(a)); }, T, T>("sqrt.rn" + t);
  define1<[](T a) { return -a; }, T, T>("neg" + t);
  define1<[](T a) { return std::fabs(a); }, T, T>("abs" + t);
  define2<least<T>, T, T, T>("min" + t);
  define2<greatest<T>, T, T, T>("max" + t);
  define2<[](T a, T b) { return std::copysign(b, a); }, T, T, T>("copysign" + t);
}
template <Rounding how> static void directed_of(const std::string& r) {  // products of two f32 are exact in f64
  define3<[](float a, float b, float c) { return canonical(rounded(sum((double)a * b, c, how), how)); }, float, float, float,
          float>("fma" + r + ".f32");
  define2<[](float a, float b) { return canonical(rounded(sum(a, b, how), how)); }, float, float, float>("add" + r + ".f32");
  define2<[](float a, float b) { return canonical(rounded(sum(a, -b, how), how)); }, float, float, float>("sub" + r +
                                                                                                     ".f32");
  define2<[](float a, float b) { return canonical(rounded({(double)a * b, 0}, how)); }, float, float, float>("mul" + r +
                                                                                                             ".f32");
}
static void saturating_forms() {
  for (const char* r : {".sat", ".rn.sat"}) {
    std::string t = std::string(r) + ".f32";
    define2<[](float a, float b) { return clamped(a + b); }, float, float, float>("add" + t);
    define2<[](float a, float b) { return clamped(a - b); }, float, float, float>("sub" + t);
    define2<[](float a, float b) { return clamped(a * b); }, float, float, float>("mul" + t);
  }
  define3<[](float a, float b, float c) { return clamped(fmaf(a, b, c)); }, float, float, float, float>(
      "fma.rn.sat.f32");
}

// --- approximations
template <auto f> static void approximate(const std::string& name) {
  define1<[](float a) { return canonical((float)f((double)a)); }, float, float>(name + ".approx.f32");
  define1<[](float a) { return canonical(flushed((float)f((double)flushed(a)))); }, float, float>(name +
                                                                                                  ".approx.ftz.f32");
}
static void approximate_forms() {
  approximate<[](double a) { return std::exp2(a); }>("ex2");
  approximate<[](double a) { return std::log2(a); }>("lg2");
  approximate<[](double a) { return std::sin(a); }>("sin");
  approximate<[](double a) { return std::cos(a); }>("cos");
  approximate<[](double a) { return 1 / std::sqrt(a); }>("rsqrt");
  approximate<[](double a) { return std::sqrt(a); }>("sqrt");
  approximate<[](double a) { return 1 / a; }>("rcp");
  define1<[](float a) { return canonical((float)std::tanh((double)a)); }, float, float>("tanh.approx.f32");
  for (const char* kind : {"div.approx", "div.full"}) {
    define2<[](float a, float b) { return canonical(a / b); }, float, float, float>(std::string(kind) + ".f32");
    define2<[](float a, float b) { return canonical(flushed(flushed(a) / flushed(b))); }, float, float, float>(
        std::string(kind) + ".ftz.f32");
  }
}

// --- bf16, rounded once
static u16 bf16_of(Exact x) { return to_bf16(odd(x)); }
static u16 bf16_fma(u16 a, u16 b, u16 c) { return bf16_of(sum((double)from_bf16(a) * from_bf16(b), from_bf16(c))); }
static u16 bf16_add(u16 a, u16 b) { return bf16_of(sum(from_bf16(a), from_bf16(b))); }
static u16 bf16_sub(u16 a, u16 b) { return bf16_of(sum(from_bf16(a), -(double)from_bf16(b))); }
static u16 bf16_mul(u16 a, u16 b) { return bf16_of({(double)from_bf16(a) * from_bf16(b), 0}); }
static u16 bf16_min(u16 a, u16 b) { return to_bf16(least(from_bf16(a), from_bf16(b))); }
static u16 bf16_max(u16 a, u16 b) { return to_bf16(greatest(from_bf16(a), from_bf16(b))); }
template <auto f> static u32 both(u32 a, u32 b) {
  return f((u16)a, (u16)b) | (u32)f((u16)(a >> 16), (u16)(b >> 16)) << 16;
}
template <auto f> static u32 both3(u32 a, u32 b, u32 c) {
  return f((u16)a, (u16)b, (u16)c) | (u32)f((u16)(a >> 16), (u16)(b >> 16), (u16)(c >> 16)) << 16;
}
template <auto f> static void bf16_forms(const std::string& name) {
  define2<f, u16, u16, u16>(name + ".bf16");
  define2<both<f>, u32, u32, u32>(name + ".bf16x2");
}

void float_forms() {
  arithmetic_of<float>(".f32");
  arithmetic_of<double>(".f64");
  define("fma.rn.f32", {fma_f32, "4:444"});
  define3<fused<double>, double, double, double, double>("fma.rn.f64");
  directed_of<ZERO>(".rz"), directed_of<DOWN>(".rm"), directed_of<UP>(".rp");
  saturating_forms();
  approximate_forms();
  define3<bf16_fma, u16, u16, u16, u16>("fma.rn.bf16");
  define3<both3<bf16_fma>, u32, u32, u32, u32>("fma.rn.bf16x2");
  bf16_forms<bf16_min>("min"), bf16_forms<bf16_max>("max");
  for (const char* r : {"", ".rn"}) {
    bf16_forms<bf16_add>(std::string("add") + r);
    bf16_forms<bf16_sub>(std::string("sub") + r);
    bf16_forms<bf16_mul>(std::string("mul") + r);
  }
}
}  // namespace ptx
