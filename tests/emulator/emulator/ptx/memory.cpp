// memory.cpp - loads, stores, addresses and fences: PTX ISA, "Data Movement and Conversion Instructions", membar.
#include "space.h"

namespace ptx {
using u32 = uint32_t;
using u64 = uint64_t;

// Form::x: the space, the order of a strong access, whether only its block is the scope of that, and whether a narrow
// value is extended by its sign.
struct Access {
  u32 space : 4, order : 4, strong : 1, block : 1, sign : 1;
};
static u32 word(Access a) { return bits_of<u32>(a); }
static Access access(const Instr& in) { return bits_of<Access>(in.x); }
static void allow(const char* p, unsigned n, bool write, Access a) {
  if (a.space == LOCAL) return;
  if (a.strong) {
    emu::atomic_begin(p, n, (emu::Order)a.order, write, !write, a.block);
    if (!write) emu::spin();
  } else {
    emu::check(p, n, write);
  }
}
template <class T> static void set(Warp& w, const Operand& o, int lane, T v, bool sign) {
  if (o.width == sizeof(T)) {
    w.reg<T>(o)[lane] = v;
  } else {
    w.put(o, lane, sign ? (u64)(int64_t)(std::make_signed_t<T>)v : (u64)v);
  }
}

// --- ld d{...}, [a] and st [a], d{...}
template <class T, int n> static void load(Warp& w, const Instr& in, u32 lanes) {
  Access a = access(in);
  for (u32 m = lanes; m; m &= m - 1) {
    int lane = __builtin_ctz(m);
    w.as(lane);
    char* p = place(w, in.op[n], lane, (Space)a.space, n * sizeof(T));
    allow(p, n * sizeof(T), false, a);
    T v[n];
    memcpy(v, p, sizeof v);
    for (int k = 0; k < n; k++) set(w, in.op[k], lane, v[k], a.sign);
  }
}
template <class T, int n> static void store(Warp& w, const Instr& in, u32 lanes) {
  Access a = access(in);
  for (u32 m = lanes; m; m &= m - 1) {
    int lane = __builtin_ctz(m);
    w.as(lane);
    char* p = place(w, in.op[0], lane, (Space)a.space, n * sizeof(T));
    allow(p, n * sizeof(T), true, a);
    T v[n];
    for (int k = 0; k < n; k++) v[k] = *(const T*)(w.registers + in.op[1 + k].at + lane * in.op[1 + k].width);
    memcpy(p, v, sizeof v);
  }
}
template <class T> static void load_parameter(Warp& w, const Instr& in, u32 lanes) {
  T v;
  uint64_t at = (uint64_t)in.op[1].number, bytes = w.entry->param_bytes;
  if (at >= bytes || sizeof v > bytes - at || at % sizeof v) {
    emu::fail("%s read of a parameter: %zu bytes at offset %ld of %zu", at % sizeof v ? "misaligned" : "out-of-bounds",
              sizeof v, (long)at, (size_t)bytes);
  }
  memcpy(&v, w.params + at, sizeof v);
  bool sign = access(in).sign;
  each(lanes, [&](int i) { set(w, in.op[0], i, v, sign); });
}
template <class T> static Run run_for(bool write, int n) {
  switch (n) {
    case 1: return write ? store<T, 1> : load<T, 1>;
    case 2: return write ? store<T, 2> : load<T, 2>;
    case 4: return write ? store<T, 4> : load<T, 4>;
    case 8: return write ? store<T, 8> : load<T, 8>;
  }
  return nullptr;
}
static bool access_form(const Parts& name, Form& form) {
  Parts p(name.begin() + 1, name.end());
  bool write = name[0] == "st", param = false;
  Access a{};
  bool ordered = remove(p, write ? "release" : "acquire");
  if (ordered || remove(p, "relaxed")) {
    Scope scope;
    if (!remove_scope(p, scope)) return false;  // which these do not go without
    a.strong = 1, a.block = scope == CTA;
    if (ordered) a.order = write ? emu::RELEASE : emu::ACQUIRE;
  } else if (remove(p, "volatile")) {
    a.strong = 1;
  } else {
    remove(p, "weak");
  }
  Space space;
  if (!remove_space(p, space) && remove(p, "param")) param = true;
  a.space = space;
  while (!p.empty()) {  // how it is cached
    bool hint = p[0].rfind("L1::", 0) == 0 || (p[0].rfind("L2::", 0) == 0 && p[0] != "L2::cache_hint");
    for (const char* h : {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"}) hint |= p[0] == h;
    if (!hint) break;
    p.erase(p.begin());
  }
  int n = remove(p, "v2") ? 2 : remove(p, "v4") ? 4 : remove(p, "v8") ? 8 : 1;
  if (p.size() != 1 || p[0].size() < 2 || !strchr("busf", p[0][0])) return false;
  a.sign = p[0][0] == 's';
  int bits = atoi(p[0].c_str() + 1);
  if (n * bits > 256 || (param && (write || n > 1))) return false;
  char registers = bits == 8 ? 'b' : bits == 16 ? 'h' : bits == 32 ? 'w' : 'd';
  std::string values(n, registers);
  form.operands = write ? ":a" + values : values + (param ? ":m" : ":a");
  form.kind = a.strong && !write ? POLL : PLAIN;
  form.x = word(a);
  switch (bits) {
    case 8: form.run = param ? load_parameter<uint8_t> : run_for<uint8_t>(write, n); break;
    case 16: form.run = param ? load_parameter<uint16_t> : run_for<uint16_t>(write, n); break;
    case 32: form.run = param ? load_parameter<u32> : run_for<u32>(write, n); break;
    case 64: form.run = param ? load_parameter<u64> : run_for<u64>(write, n); break;
    default: return false;
  }
  return form.run;
}

// --- addresses between spaces. Generic ones are the host's.
enum Conversion { SAME, TO_SHARED, FROM_SHARED, TO_LOCAL, FROM_LOCAL };
template <Conversion how> static void convert_address(Warp& w, const Instr& in, u32 lanes) {
  u64 *d = w.reg<u64>(in.op[0]), *a = w.reg<u64>(in.op[1]), shared = (u64)w.block->sh;
  each(lanes, [&](int i) {
    u64 at = a[i];
    if (how == TO_SHARED && at - shared >= emu::SHARED_SLOT) {
      w.as(i);
      emu::fail("cvta.to.shared of %#lx, which is not shared memory of this block", at);
    }
    if (how == TO_SHARED) at -= shared;
    if (how == FROM_SHARED) at += shared;
    if (how == TO_LOCAL) at -= (u64)local_memory(w, i);
    if (how == FROM_LOCAL) at += (u64)local_memory(w, i);
    d[i] = at;
  });
}
template <bool shared> static void is_in_space(Warp& w, const Instr& in, u32 lanes) {
  u32 r = 0;
  for (int i = 0; i < 32; i++) {
    u64 at = w.reg<u64>(in.op[1])[i];
    bool in_shared = at - (u64)w.block->sh < emu::SHARED_SLOT, in_heap = at - (u64)emu::dev < emu::dev_size;
    r |= (u32)(shared ? in_shared : in_heap) << i;
  }
  w.set_pred(in.op[0], lanes, r);
}

// --- order
static void nothing(Warp&, const Instr&, u32) {}
static void fence(Warp& w, const Instr&, u32 lanes) {
  for (u32 m = lanes; m; m &= m - 1) {
    w.as(__builtin_ctz(m));
    emu::fence();
  }
}
static void sleep(Warp& w, const Instr&, u32 lanes) {
  w.as(__builtin_ctz(lanes));
  emu::spin();
}
static void trap(Warp& w, const Instr&, u32 lanes) {
  w.as(__builtin_ctz(lanes));
  emu::fail("trap");
}

void memory_forms() {
  define_family("ld", access_form);
  define_family("st", access_form);
  for (const char* space : {"global", "const", "param"}) {
    define(std::string("cvta.") + space + ".u64", {convert_address<SAME>, "8:8"});
    define(std::string("cvta.to.") + space + ".u64", {convert_address<SAME>, "8:8"});
  }
  define("cvta.shared.u64", {convert_address<FROM_SHARED>, "8:8"});
  define("cvta.to.shared.u64", {convert_address<TO_SHARED>, "8:8"});
  define("cvta.local.u64", {convert_address<FROM_LOCAL>, "8:8"});
  define("cvta.to.local.u64", {convert_address<TO_LOCAL>, "8:8"});
  define("isspacep.shared", {is_in_space<true>, "p:8"});
  define("isspacep.global", {is_in_space<false>, "p:8"});
  for (const char* hint : {"prefetch.global.L1", "prefetch.global.L2", "prefetch.L1", "prefetch.L2", "prefetchu.L1"}) {
    define(hint, {nothing, ":a"});
  }
  for (const char* f :
       {"membar.gl", "membar.sys", "fence.acq_rel.gpu", "fence.acq_rel.sys", "fence.sc.gpu", "fence.sc.sys"}) {
    define(f, {fence, ":"});
  }
  for (const char* f :
       {"membar.cta", "fence.acq_rel.cta", "fence.sc.cta", "fence.proxy.async", "fence.proxy.async.shared::cta",
        "fence.proxy.async.global", "fence.mbarrier_init.release.cluster"}) {
    define(f, {nothing, ":"});  // within a block, barriers order; the asynchronous proxy is not modelled
  }
  define("nanosleep.u32", {sleep, ":4", POLL});
  define("trap", {trap, ":"});
}
}  // namespace ptx
