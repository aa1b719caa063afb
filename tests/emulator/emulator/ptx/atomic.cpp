// atomic.cpp - atom and red: PTX ISA, "Parallel Synchronization and Communication Instructions".
#include <algorithm>

#include "space.h"

namespace ptx {
using u32 = uint32_t;
using u64 = uint64_t;

struct Atomic {  // Form::x
  u32 space : 4, order : 4, block : 1, returns : 1;  // block: the scope is no more than that
};
// d, [a], b{, c}
template <class T, auto f, bool compares> static void atomic(Warp& w, const Instr& in, u32 lanes) {
  Atomic how = bits_of<Atomic>(in.x);
  int first = how.returns;
  for (u32 m = lanes; m; m &= m - 1) {
    int lane = __builtin_ctz(m);
    w.as(lane);
    char* p = place(w, in.op[first], lane, (Space)how.space, sizeof(T));
    emu::atomic_begin(p, sizeof(T), (emu::Order)how.order, true, true, how.block);
    T old, b = w.reg<T>(in.op[first + 1])[lane], c = compares ? w.reg<T>(in.op[first + 2])[lane] : T();
    memcpy(&old, p, sizeof old);
    T now = f(old, b, c);
    memcpy(p, &now, sizeof now);
    if (how.returns) w.reg<T>(in.op[0])[lane] = old;
  }
}
struct Operation {
  Run run;
  unsigned bytes;
  bool compares;
};
using Operations = std::map<std::string, Operation>;
template <class T, auto f, bool compares = false> static void add(Operations& all, const std::string& name) {
  all[name] = {atomic<T, f, compares>, sizeof(T), compares};
}
template <class T> static void add_ordered(Operations& all, const std::string& type) {
  add<T, [](T o, T b, T) { return std::min(o, b); }>(all, "min" + type);
  add<T, [](T o, T b, T) { return std::max(o, b); }>(all, "max" + type);
}
template <class T> static void add_bits(Operations& all, const std::string& type) {
  add<T, [](T o, T b, T) { return (T)(o & b); }>(all, "and" + type);
  add<T, [](T o, T b, T) { return (T)(o | b); }>(all, "or" + type);
  add<T, [](T o, T b, T) { return (T)(o ^ b); }>(all, "xor" + type);
  add<T, [](T, T b, T) { return b; }>(all, "exch" + type);
  add<T, [](T o, T b, T c) { return o == b ? c : o; }, true>(all, "cas" + type);
}
static const Operations& operations() {
  static const Operations all = [] {
    Operations r;
    for (const char* t : {".u32", ".s32"}) add<u32, [](u32 o, u32 b, u32) { return o + b; }>(r, std::string("add") + t);
    for (const char* t : {".u64", ".s64"}) add<u64, [](u64 o, u64 b, u64) { return o + b; }>(r, std::string("add") + t);
    add<float, [](float o, float b, float) { return o + b; }>(r, "add.f32");
    add<double, [](double o, double b, double) { return o + b; }>(r, "add.f64");
    add<u32, [](u32 o, u32 b, u32) { return (o >= b ? 0 : o + 1); }>(r, "inc.u32");
    add<u32, [](u32 o, u32 b, u32) { return (o == 0 || o > b ? b : o - 1); }>(r, "dec.u32");
    add_ordered<u32>(r, ".u32"), add_ordered<int32_t>(r, ".s32");
    add_ordered<u64>(r, ".u64"), add_ordered<int64_t>(r, ".s64");
    add_bits<u32>(r, ".b32"), add_bits<u64>(r, ".b64");
    return r;
  }();
  return all;
}
static bool atomic_form(const Parts& name, Form& form) {
  Parts p(name.begin() + 1, name.end());
  Atomic how{};
  how.returns = name[0] == "atom";
  how.order = remove(p, "acquire")   ? emu::ACQUIRE
              : remove(p, "release") ? emu::RELEASE
              : remove(p, "acq_rel") ? emu::ACQ_REL
                                     : emu::RELAXED;
  if (how.order == emu::RELAXED) remove(p, "relaxed");
  Scope scope;  // without one the device's
  remove_scope(p, scope);
  how.block = scope == CTA;
  Space space;
  remove_space(p, space);
  how.space = space;
  if (p.size() != 2 || space == LOCAL) return false;
  auto found = operations().find(p[0] + "." + p[1]);
  if (found == operations().end()) return false;
  char reg = found->second.bytes == 8 ? '8' : '4';
  form.run = found->second.run;
  form.operands = (how.returns ? std::string{reg} : "") + ":a" + std::string(1 + found->second.compares, reg);
  form.x = bits_of<u32>(how);
  return true;
}

void atomic_forms() {
  define_family("atom", atomic_form);
  define_family("red", atomic_form);
}
}  // namespace ptx
