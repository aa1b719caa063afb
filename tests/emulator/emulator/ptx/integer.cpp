// integer.cpp - integers, bits and predicates: PTX ISA, "Integer Arithmetic", "Logic and Shift", "Comparison and
// Selection".
#include <algorithm>
#include <limits>

#include "ptx.h"

namespace ptx {
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
template <class T> using Signed = std::make_signed_t<T>;
template <class T> constexpr int BITS = sizeof(T) * 8;
template <class T> static std::string suffix(char kind) { return std::string(".") + kind + std::to_string(BITS<T>); }
template <class T> struct Twice;
template <> struct Twice<u16> {
  using type = u32;
};
template <> struct Twice<u32> {
  using type = u64;
};
template <> struct Twice<s16> {
  using type = s32;
};
template <> struct Twice<s32> {
  using type = s64;
};

// --- arithmetic. Sums and low products wrap, and are the same for signed numbers.
template <class T> static T quotient(T a, T b) {  // by zero: unspecified; all ones here
  if (b == 0) return (T)-1;
  if (std::numeric_limits<T>::is_signed && b == (T)-1) return (T)(0 - (u64)a);
  return a / b;
}
template <class T> static T remainder(T a, T b) {
  if (b == 0) return a;
  return std::numeric_limits<T>::is_signed && b == (T)-1 ? 0 : a % b;
}
template <class T> static T high(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    using Wide = std::conditional_t<std::numeric_limits<T>::is_signed, __int128, unsigned __int128>;
    return (T)((Wide)a * b >> 64);
  } else {
    return (T)((typename Twice<T>::type)a * b >> BITS<T>);
  }
}
template <class T> static void arithmetic_of() {  // T unsigned
  using S = Signed<T>;
  for (char kind : {'u', 's'}) {
    std::string t = suffix<T>(kind);
    define2<[](T a, T b) { return (T)(a + b); }, T, T, T>("add" + t);
    define2<[](T a, T b) { return (T)(a - b); }, T, T, T>("sub" + t);
    define2<[](T a, T b) { return (T)((u64)a * b); }, T, T, T>("mul.lo" + t);
    define3<[](T a, T b, T c) { return (T)((u64)a * b + c); }, T, T, T, T>("mad.lo" + t);
  }
  std::string u = suffix<T>('u'), s = suffix<T>('s');
  define1<[](T a) { return (T)(0 - a); }, T, T>("neg" + s);
  define1<[](S a) { return (T)(a < 0 ? 0 - (T)a : (T)a); }, T, S>("abs" + s);
  define2<quotient<T>, T, T, T>("div" + u), define2<quotient<S>, S, S, S>("div" + s);
  define2<remainder<T>, T, T, T>("rem" + u), define2<remainder<S>, S, S, S>("rem" + s);
  define2<high<T>, T, T, T>("mul.hi" + u), define2<high<S>, S, S, S>("mul.hi" + s);
  define3<[](T a, T b, T c) { return (T)(high(a, b) + c); }, T, T, T, T>("mad.hi" + u);
  define3<[](S a, S b, T c) { return (T)((T)high(a, b) + c); }, T, S, S, T>("mad.hi" + s);
  define2<[](T a, T b) { return std::min(a, b); }, T, T, T>("min" + u);
  define2<[](T a, T b) { return std::max(a, b); }, T, T, T>("max" + u);
  define2<[](S a, S b) { return std::min(a, b); }, S, S, S>("min" + s);
  define2<[](S a, S b) { return std::max(a, b); }, S, S, S>("max" + s);
}
template <class T> static void wide_of() {
  using W = typename Twice<T>::type;
  using US = std::make_unsigned_t<W>;
  std::string t = suffix<T>(std::numeric_limits<T>::is_signed ? 's' : 'u');
  define2<[](T a, T b) { return (W)a * (W)b; }, W, T, T>("mul.wide" + t);
  define3<[](T a, T b, W c) { return (W)((US)((W)a * (W)b) + (US)c); }, W, T, T, W>("mad.wide" + t);
}

// --- bits
template <class T> static T shift_left(T a, u32 n) { return n >= BITS<T> ? 0 : (T)(a << n); }
template <class T> static T shift_right(T a, u32 n) { return (T)(a >> std::min<u32>(n, BITS<T> - 1)); }  // T signed
template <class T> static T shift_right_zero(T a, u32 n) { return n >= BITS<T> ? 0 : (T)(a >> n); }
template <class T> static void bits_of_width() {
  std::string b = suffix<T>('b');
  define2<[](T a, T b) { return (T)(a & b); }, T, T, T>("and" + b);
  define2<[](T a, T b) { return (T)(a | b); }, T, T, T>("or" + b);
  define2<[](T a, T b) { return (T)(a ^ b); }, T, T, T>("xor" + b);
  define1<[](T a) { return (T)~a; }, T, T>("not" + b);
  define1<[](T a) { return (T)(a == 0); }, T, T>("cnot" + b);
  define2<shift_left<T>, T, T, u32>("shl" + b);
  for (char kind : {'b', 'u'}) define2<shift_right_zero<T>, T, T, u32>("shr" + suffix<T>(kind));
  define2<shift_right<Signed<T>>, Signed<T>, Signed<T>, u32>("shr" + suffix<T>('s'));
}
template <class T> static T reversed(T a) {
  T r = 0;
  for (int i = 0; i < BITS<T>; i++) r = (T)(r << 1 | (a >> i & 1));
  return r;
}
template <class T> static u32 zeros(T a) { return a ? __builtin_clzll(a) - (64 - BITS<T>) : BITS<T>; }
template <class T> static u32 found(T a) { return a ? BITS<T> - 1 - zeros(a) : ~0u; }
template <class T> static T signless(Signed<T> a) { return a < 0 ? (T)~a : (T)a; }
template <class T> static T inserted(T a, T b, u32 position, u32 length) {  // bits of a into b
  position &= 255, length &= 255;
  if (position >= BITS<T> || !length) return b;
  T field = length >= BITS<T> ? (T)~T(0) : (T)((T(1) << length) - 1);
  return (T)((b & ~(field << position)) | (a & field) << position);
}
template <class T> static T extracted(T a, u32 position, u32 length) {  // T signed: the field's top bit is repeated
  using U = std::make_unsigned_t<T>;
  position &= 255, length &= 255;
  constexpr bool is_signed = std::numeric_limits<T>::is_signed;
  u32 top = std::min<u32>(position + length - 1, BITS<T> - 1);
  U sign = !is_signed || !length ? 0 : (U)a >> top & 1, r = 0;
  for (u32 i = 0; i < BITS<T>; i++) {
    bool bit = i < length && position + i < BITS<T> ? (U)a >> (position + i) & 1 : sign;
    r |= (U)bit << i;
  }
  return (T)r;
}
template <class T> static void insert(Warp& w, const Instr& in, u32 lanes) {
  T *d = w.reg<T>(in.op[0]), *a = w.reg<T>(in.op[1]), *b = w.reg<T>(in.op[2]);
  u32 *position = w.reg<u32>(in.op[3]), *length = w.reg<u32>(in.op[4]);
  each(lanes, [&](int i) { d[i] = inserted(a[i], b[i], position[i], length[i]); });
}
template <class T> static void fields_of() {
  std::string b = suffix<T>('b'), u = suffix<T>('u'), s = suffix<T>('s');
  define1<reversed<T>, T, T>("brev" + b);
  define1<[](T a) { return (u32)__builtin_popcountll(a); }, u32, T>("popc" + b);
  define1<zeros<T>, u32, T>("clz" + b);
  define1<found<T>, u32, T>("bfind" + u);
  define1<[](T a) { return a ? zeros(a) : ~0u; }, u32, T>("bfind.shiftamt" + u);
  define1<[](Signed<T> a) { return found(signless<T>(a)); }, u32, Signed<T>>("bfind" + s);
  define1<[](Signed<T> a) {
    T b = signless<T>(a);
    return b ? zeros(b) : ~0u;
  },
          u32, Signed<T>>("bfind.shiftamt" + s);
  define("bfi" + b, {insert<T>, operands<T, T, T, u32, u32>()});
  define3<extracted<T>, T, T, u32, u32>("bfe" + u);
  define3<extracted<Signed<T>>, Signed<T>, Signed<T>, u32, u32>("bfe" + s);
}
static u32 permuted(u32 a, u32 b, u32 selector) {  // a byte for each nibble; its top bit: the byte's sign instead
  u64 bytes = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 s = selector >> 4 * i, byte = bytes >> 8 * (s & 7) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << 8 * i;
  }
  return r;
}
static void lop3(Warp& w, const Instr& in, u32 lanes) {  // the immediate is a truth table
  u32 *d = w.reg<u32>(in.op[0]), *a = w.reg<u32>(in.op[1]), *b = w.reg<u32>(in.op[2]), *c = w.reg<u32>(in.op[3]);
  u32 table = (u32)in.op[4].number;
  each(lanes, [&](int i) {
    u32 r = 0;
    for (int k = 0; k < 8; k++) {
      if (table >> k & 1) r |= (k & 4 ? a[i] : ~a[i]) & (k & 2 ? b[i] : ~b[i]) & (k & 1 ? c[i] : ~c[i]);
    }
    d[i] = r;
  });
}
// shf: of the 64 bits b:a the upper (l) or the lower (r) half after the shift.
static u64 pair(u32 a, u32 b) { return (u64)b << 32 | a; }
static u32 funnel_left(u32 a, u32 b, u32 n) { return (u32)(pair(a, b) << n >> 32); }  // n up to 32
static u32 funnel_right(u32 a, u32 b, u32 n) { return (u32)(pair(a, b) >> n); }

// --- predicates
template <class T, auto f> __attribute__((noinline)) static u32 compare(Warp& w, const Instr& in) {  // in all lanes
  const T *a = w.reg<T>(in.op[in.x]), *b = w.reg<T>(in.op[in.x + 1]);
  u32 r = 0;
  for (int i = 0; i < 32; i++) r |= (u32)f(a[i], b[i]) << i;
  return r;
}
// setp d{|q}, a, b{, c}: with c, the comparison is combined with it. Form::x is the place of a.
enum Combine { ALONE, AND, OR, XOR };
template <class T, auto f, Combine how> static void set_predicate(Warp& w, const Instr& in, u32 lanes) {
  u32 r = compare<T, f>(w, in), not_r = ~r;
  if (how != ALONE) {
    u32 c = w.pred(in.op[in.x + 2]);
    auto combined = [&](u32 v) { return how == AND ? v & c : how == OR ? v | c : v ^ c; };
    r = combined(r), not_r = combined(not_r);
  }
  if (in.x == 2) w.set_pred(in.op[1], lanes, not_r);
  w.set_pred(in.op[0], lanes, r);
}
template <class T, auto f> static void define_comparison(const std::string& name, const std::string& type) {
  std::string ab = operands<u32, T, T>().substr(1);  // ":44"
  define("setp." + name + type, {set_predicate<T, f, ALONE>, "p" + ab, PLAIN, 1});
  define("setp." + name + type, {set_predicate<T, f, ALONE>, "pp" + ab, PLAIN, 2});
  auto with = [&](const char* op, Run run) {
    define("setp." + name + op + type, {run, "p" + ab + "p", PLAIN, 1});
    define("setp." + name + op + type, {run, "pp" + ab + "p", PLAIN, 2});
  };
  with(".and", set_predicate<T, f, AND>), with(".or", set_predicate<T, f, OR>), with(".xor", set_predicate<T, f, XOR>);
}
template <class T> static void comparisons_of(char kind) {
  std::string t = suffix<T>(kind);
  define_comparison<T, [](T a, T b) { return a == b; }>("eq", t);
  define_comparison<T, [](T a, T b) { return a != b; }>("ne", t);
  if (kind == 'b') return;
  auto define_both = [&]<auto f>(const char* name, const char* of_unsigned) {
    define_comparison<T, f>(name, t);
    if (kind == 'u') define_comparison<T, f>(of_unsigned, t);
  };
  define_both.template operator()<[](T a, T b) { return a < b; }>("lt", "lo");
  define_both.template operator()<[](T a, T b) { return a <= b; }>("le", "ls");
  define_both.template operator()<[](T a, T b) { return (a > b); }>("gt", "hi");
  define_both.template operator()<[](T a, T b) { return (a >= b); }>("ge", "hs");
}
template <class T> static void float_comparisons_of(const std::string& t) {  // ..u is also true of a NaN
  auto define_both = [&]<auto f>(const char* name) {
    define_comparison<T, [](T a, T b) { return f(a, b) && a == a && b == b; }>(name, t);
    define_comparison<T, [](T a, T b) { return f(a, b) || a != a || b != b; }>(name + std::string("u"), t);
  };
  define_both.template operator()<[](T a, T b) { return a == b; }>("eq");
  define_both.template operator()<[](T a, T b) { return a != b; }>("ne");
  define_both.template operator()<[](T a, T b) { return a < b; }>("lt");
  define_both.template operator()<[](T a, T b) { return a <= b; }>("le");
  define_both.template operator()<[](T a, T b) { return (a > b); }>("gt");
  define_both.template operator()<[](T a, T b) { return (a >= b); }>("ge");
  define_comparison<T, [](T a, T b) { return a == a && b == b; }>("num", t);
  define_comparison<T, [](T a, T b) { return a != a || b != b; }>("nan", t);
}
template <class T> static void select(Warp& w, const Instr& in, u32 lanes) {
  T *d = w.reg<T>(in.op[0]), *a = w.reg<T>(in.op[1]), *b = w.reg<T>(in.op[2]);
  u32 p = w.pred(in.op[3]);
  each(lanes, [&](int i) { d[i] = p >> i & 1 ? a[i] : b[i]; });
}
template <auto f> static void logic(Warp& w, const Instr& in, u32 lanes) {
  w.set_pred(in.op[0], lanes, f(w.pred(in.op[1]), w.pred(in.op[2])));
}
template <bool invert> static void copy_predicate(Warp& w, const Instr& in, u32 lanes) {
  w.set_pred(in.op[0], lanes, w.pred(in.op[1]) ^ (invert ? ~0u : 0));
}

void integer_forms() {
  arithmetic_of<u16>(), arithmetic_of<u32>(), arithmetic_of<u64>();
  wide_of<u16>(), wide_of<u32>(), wide_of<s16>(), wide_of<s32>();
  bits_of_width<u16>(), bits_of_width<u32>(), bits_of_width<u64>();
  fields_of<u32>(), fields_of<u64>();
  define3<permuted, u32, u32, u32, u32>("prmt.b32");
  // two products of 16 and 8 bits, added
  define3<[](u32 a, u32 b, u32 c) { return c + (a & 0xffff) * (b & 0xff) + (a >> 16) * (b >> 8 & 0xff); }, u32, u32, u32,
          u32>("dp2a.lo.u32.u32");
  define3<[](u32 a, u32 b, u32 c) { return c + (a & 0xffff) * (b >> 16 & 0xff) + (a >> 16) * (b >> 24); }, u32, u32, u32,
          u32>("dp2a.hi.u32.u32");
  define("lop3.b32", {lop3, "4:444i"});
  define3<[](u32 a, u32 b, u32 n) { return funnel_left(a, b, n & 31); }, u32, u32, u32, u32>("shf.l.wrap.b32");
  define3<[](u32 a, u32 b, u32 n) { return funnel_left(a, b, std::min(n, 32u)); }, u32, u32, u32, u32>(
      "shf.l.clamp.b32");
  define3<[](u32 a, u32 b, u32 n) { return funnel_right(a, b, n & 31); }, u32, u32, u32, u32>("shf.r.wrap.b32");
  define3<[](u32 a, u32 b, u32 n) { return funnel_right(a, b, std::min(n, 32u)); }, u32, u32, u32, u32>(
      "shf.r.clamp.b32");

  comparisons_of<u16>('u'), comparisons_of<u32>('u'), comparisons_of<u64>('u');
  comparisons_of<s16>('s'), comparisons_of<s32>('s'), comparisons_of<s64>('s');
  comparisons_of<u16>('b'), comparisons_of<u32>('b'), comparisons_of<u64>('b');
  float_comparisons_of<float>(".f32"), float_comparisons_of<double>(".f64");
  for (const char* t : {".b16", ".u16", ".s16"}) define(std::string("selp") + t, {select<u16>, "2:22p"});
  for (const char* t : {".b32", ".u32", ".s32", ".f32"}) define(std::string("selp") + t, {select<u32>, "4:44p"});
  for (const char* t : {".b64", ".u64", ".s64", ".f64"}) define(std::string("selp") + t, {select<u64>, "8:88p"});
  define("and.pred", {logic<[](u32 a, u32 b) { return a & b; }>, "p:pp"});
  define("or.pred", {logic<[](u32 a, u32 b) { return a | b; }>, "p:pp"});
  define("xor.pred", {logic<[](u32 a, u32 b) { return a ^ b; }>, "p:pp"});
  define("not.pred", {copy_predicate<true>, "p:p"});
  define("mov.pred", {copy_predicate<false>, "p:p"});
}
}  // namespace ptx
