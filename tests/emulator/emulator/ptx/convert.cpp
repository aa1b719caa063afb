// convert.cpp - mov and cvt: PTX ISA, "Data Movement and Conversion Instructions".
#include "numbers.h"

namespace ptx {
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

// --- mov. Between registers and between one register and the pieces it is made of, the lowest first.
template <class T> static void move(Warp& w, const Instr& in, u32 lanes) {
  T* d = w.reg<T>(in.op[0]);
  const T* a = w.reg<T>(in.op[1]);
  each(lanes, [&](int i) { d[i] = a[i]; });
}
template <class Whole, class Piece, int n> static void unpack(Warp& w, const Instr& in, u32 lanes) {
  const Whole* a = w.reg<Whole>(in.op[n]);
  Whole v[32];  // the register may be one of the pieces' too
  memcpy(v, a, sizeof v);
  for (int k = 0; k < n; k++) {
    Piece* d = w.reg<Piece>(in.op[k]);
    each(lanes, [&](int i) { d[i] = (Piece)(v[i] >> k * 8 * sizeof(Piece)); });
  }
}
template <class Whole, class Piece, int n> static void pack(Warp& w, const Instr& in, u32 lanes) {
  Whole v[32] = {};
  for (int k = 0; k < n; k++) {
    const Piece* a = w.reg<Piece>(in.op[1 + k]);
    each(lanes, [&](int i) { v[i] |= (Whole)a[i] << k * 8 * sizeof(Piece); });
  }
  Whole* d = w.reg<Whole>(in.op[0]);
  each(lanes, [&](int i) { d[i] = v[i]; });
}
static void move_forms() {
  for (const char* t : {".b16", ".u16", ".s16"}) define(std::string("mov") + t, {move<u16>, "2:2"});
  for (const char* t : {".b32", ".u32", ".s32", ".f32"}) define(std::string("mov") + t, {move<u32>, "4:4"});
  for (const char* t : {".b64", ".u64", ".s64", ".f64"}) define(std::string("mov") + t, {move<u64>, "8:8"});
  define("mov.b32", {unpack<u32, u16, 2>, "22:4"}), define("mov.b32", {pack<u32, u16, 2>, "4:22"});
  define("mov.b64", {unpack<u64, u32, 2>, "44:8"}), define("mov.b64", {pack<u64, u32, 2>, "8:44"});
  define("mov.b64", {unpack<u64, u16, 4>, "2222:8"}), define("mov.b64", {pack<u64, u16, 4>, "8:2222"});
}

// --- cvt. A register may be wider than the type: its low bits are read, and a result is extended as its type says.
template <class T> static T read(Warp& w, const Operand& o, int lane) {
  T v;
  memcpy(&v, w.registers + o.at + lane * o.width, sizeof v);
  return v;
}
template <class T> static void write(Warp& w, const Operand& o, int lane, T v) {
  if constexpr (std::numeric_limits<T>::is_integer) {
    w.put(o, lane, (u64)(int64_t)v);
  } else {
    w.put(o, lane, bits_of<std::conditional_t<sizeof(T) == 4, u32, u64>>(v));
  }
}
template <class D, class S, auto f> static void convert(Warp& w, const Instr& in, u32 lanes) {
  if (in.op[0].width == sizeof(D) && in.op[1].width == sizeof(S)) return map1<f, D, S>(w, in, lanes);
  each(lanes, [&](int i) { write<D>(w, in.op[0], i, f(read<S>(w, in.op[1], i))); });
}
// Conversions that are seldom: one loop for all of two types, so that this file is compiled soon.
template <class D, class S> __attribute__((noinline)) static void convert_by(Warp& w, const Instr& in, u32 lanes, D (*f)(S)) {
  each(lanes, [&](int i) { write<D>(w, in.op[0], i, f(read<S>(w, in.op[1], i))); });
}
template <class D, class S, auto f> static void convert_seldom(Warp& w, const Instr& in, u32 lanes) {
  convert_by<D, S>(w, in, lanes, [](S v) -> D { return f(v); });
}
template <class T> static std::string name() {
  bool integer = std::numeric_limits<T>::is_integer;
  char kind = !integer ? 'f' : std::numeric_limits<T>::is_signed ? 's' : 'u';
  return std::string(".") + kind + std::to_string(sizeof(T) * 8);
}
static char at_least(size_t bytes) { return bytes == 1 ? 'b' : bytes == 2 ? 'h' : bytes == 4 ? 'w' : 'd'; }
template <class D, class S> static void define_run(const std::string& modifiers, Run run) {
  std::string both{at_least(sizeof(D)), ':', at_least(sizeof(S))};
  define("cvt" + modifiers + name<D>() + name<S>(), {run, both});
}
template <class D, class S, auto f> static void define_cvt(const std::string& modifiers) {
  define_run<D, S>(modifiers, convert_seldom<D, S, f>);
}
template <class D, class S> static D saturated(S v) {  // between integers
  using L = std::numeric_limits<D>;
  return (__int128)v<(__int128)L::min() ? L::min() : (__int128)v>(__int128) L::max() ? L::max() : (D)v;
}
// To an integer: out of range becomes the nearest; a NaN 0, or the top bit alone from f64 and to 64 bits.
template <class D> static D clamped(double v, bool wide) {
  using L = std::numeric_limits<D>;
  if (v != v) return wide ? (D)(1ull << (sizeof(D) * 8 - 1)) : 0;
  double above = std::ldexp(1.0, (int)sizeof(D) * 8 - L::is_signed);
  return v >= above ? L::max() : v < (L::is_signed ? -above : 0) ? L::min() : (D)v;
}
template <class D, class S, auto to> static D integer(S v) {
  return clamped<D>(to((double)v), sizeof(S) == 8 || sizeof(D) == 8);
}
template <class D, class S> static void integer_from_float() {
  for (const char* sat : {"", ".sat"}) {  // it saturates anyway
    define_cvt<D, S, integer<D, S, [](double v) { return std::trunc(v); }>>(std::string(".rzi") + sat);
    define_cvt<D, S, integer<D, S, [](double v) { return std::rint(v); }>>(std::string(".rni") + sat);
    define_cvt<D, S, integer<D, S, [](double v) { return std::floor(v); }>>(std::string(".rmi") + sat);
    define_cvt<D, S, integer<D, S, [](double v) { return std::ceil(v); }>>(std::string(".rpi") + sat);
  }
}
template <class T> static void floats_of_integer() {
  define_cvt<float, T, [](T v) { return (float)v; }>(".rn");
  define_cvt<double, T, [](T v) { return (double)v; }>(".rn");
  if (sizeof(T) > 4) return;
  define_cvt<float, T, [](T v) { return rounded({(double)v, 0}, ZERO); }>(".rz");
  define_cvt<float, T, [](T v) { return rounded({(double)v, 0}, DOWN); }>(".rm");
  define_cvt<float, T, [](T v) { return rounded({(double)v, 0}, UP); }>(".rp");
}
template <class D, class... S> static void from_integers() {
  (define_run<D, S>("", convert<D, S, [](S v) { return (D)v; }>), ...);
  (define_cvt<D, S, saturated<D, S>>(".sat"), ...);
  integer_from_float<D, float>(), integer_from_float<D, double>();
  floats_of_integer<D>();
}
template <class... T> static void integers() { (from_integers<T, T...>(), ...); }
static void f32_from_f32() {
  define_cvt<float, float, [](float v) { return (v > 0 ? v < 1 ? v : 1.f : 0.f); }>(".sat");
  define_cvt<float, float, [](float v) { return std::rint(v); }>(".rni");
  define_cvt<float, float, [](float v) { return std::trunc(v); }>(".rzi");
  define_cvt<float, float, [](float v) { return std::floor(v); }>(".rmi");
  define_cvt<float, float, [](float v) { return std::ceil(v); }>(".rpi");
  define_cvt<double, float, [](float v) { return (double)v; }>("");
  define_cvt<float, double, [](double v) { return canonical((float)v); }>(".rn");
  define_cvt<float, double, [](double v) { return canonical(rounded({v, 0}, ZERO)); }>(".rz");
}

// --- the small formats. What has x2 is two in a register, the first operand in the upper half.
static float from_e4m3(uint8_t v) {
  int exponent = v >> 3 & 15, fraction = v & 7;
  float a = (v & 127) == 127 ? NAN : exponent ? ldexpf(8 + fraction, exponent - 10) : ldexpf(fraction, -9);
  return v & 128 ? -a : a;
}
static float from_e5m2(uint8_t v) { return from_f16((u16)(v << 8)); }
template <auto from> static u32 f16x2_of(u16 v) {
  return to_f16(from((uint8_t)v)) | (u32)to_f16(from((uint8_t)(v >> 8))) << 16;
}
template <int fraction_bits, int bias, int top> static uint8_t to_f8(float x) {  // .satfinite: nothing becomes infinite
  uint8_t sign = std::signbit(x) ? 128 : 0;
  if (x != x) return 127;
  float a = fabsf(x), unit = ldexpf(1, 1 - bias - fraction_bits);
  if (a >= ldexpf(1, 1 - bias)) {
    int exponent;
    frexpf(a, &exponent);
    unit = ldexpf(1, exponent - 1 - fraction_bits);
  }
  a = rintf(a / unit) * unit;
  int code = 0;  // the code of a, which is representable or too large
  if (a < ldexpf(1, 1 - bias)) {
    code = (int)(a / ldexpf(1, 1 - bias - fraction_bits));
  } else {
    int exponent;
    float m = frexpf(a, &exponent);
    code = ((exponent - 1 + bias) << fraction_bits) + (int)ldexpf(m, fraction_bits + 1) - (1 << fraction_bits);
  }
  return sign | (uint8_t)(code > top ? top : code);
}
static u16 e4m3(float hi, float lo) { return (u16)(to_f8<3, 7, 0x7e>(hi) << 8 | to_f8<3, 7, 0x7e>(lo)); }
static u16 e5m2(float hi, float lo) { return (u16)(to_f8<2, 15, 0x7b>(hi) << 8 | to_f8<2, 15, 0x7b>(lo)); }
static void small_formats() {
  define2<[](float hi, float lo) { return to_bf16(lo) | (u32)to_bf16(hi) << 16; }, u32, float, float>(
      "cvt.rn.bf16x2.f32");
  define2<[](float hi, float lo) { return to_f16(lo) | (u32)to_f16(hi) << 16; }, u32, float, float>("cvt.rn.f16x2.f32");
  define1<to_bf16, u16, float>("cvt.rn.bf16.f32");
  define1<from_bf16, float, u16>("cvt.f32.bf16");
  define1<to_f16, u16, float>("cvt.rn.f16.f32");
  define1<from_f16, float, u16>("cvt.f32.f16");
  define1<f16x2_of<from_e4m3>, u32, u16>("cvt.rn.f16x2.e4m3x2");
  define1<f16x2_of<from_e5m2>, u32, u16>("cvt.rn.f16x2.e5m2x2");
  define2<e4m3, u16, float, float>("cvt.rn.satfinite.e4m3x2.f32");
  define2<e5m2, u16, float, float>("cvt.rn.satfinite.e5m2x2.f32");
}

void convert_forms() {
  move_forms();
  integers<int8_t, uint8_t, int16_t, u16, int32_t, u32, int64_t, u64>();
  f32_from_f32();
  small_formats();
}
}  // namespace ptx
