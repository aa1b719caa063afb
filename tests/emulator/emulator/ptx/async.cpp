// async.cpp - asynchronous copies, dependent launches, and the clock.
#include "space.h"

namespace ptx {
using u32 = uint32_t;
using u64 = uint64_t;
template <class F> static void as_each(Warp& w, u32 lanes, F f) {
  for (u32 m = lanes; m; m &= m - 1) {
    int lane = __builtin_ctz(m);
    w.as(lane);
    f(lane);
  }
}

// --- cp.async [shared], [global], bytes{, how many of them are read}{, a cache policy}. Form::x: whether the fourth is
// there
static void copy(Warp& w, const Instr& in, u32 lanes) {
  unsigned bytes = (unsigned)in.op[2].number;
  as_each(w, lanes, [&](int lane) {
    if (bytes != 4 && bytes != 8 && bytes != 16) emu::fail("cp.async of %u bytes", bytes);
    unsigned valid = in.x ? w.reg<u32>(in.op[3])[lane] : bytes;
    if (valid > bytes) emu::fail("cp.async reads %u bytes to write %u", valid, bytes);
    char* to = place(w, in.op[0], lane, SHARED, bytes);
    // of what is not read only the alignment counts
    const char* from = valid ? place(w, in.op[1], lane, GLOBAL, bytes) : (const char*)address(w, in.op[1], lane);
    emu::cp_async(to, from, bytes, valid, site(in));
  });
}
static void no_policy(Warp& w, const Instr& in, u32 lanes) {  // of caches that are not there
  each(lanes, [&](int i) { w.reg<u64>(in.op[0])[i] = 0; });
}
static void commit(Warp& w, const Instr&, u32 lanes) {
  as_each(w, lanes, [](int) { emu::cp_commit(); });
}
static void wait_group(Warp& w, const Instr& in, u32 lanes) {
  if (in.op[0].number < 0) emu::fail("cp.async.wait_group of %ld groups", (long)in.op[0].number);
  as_each(w, lanes, [&](int) { emu::cp_wait((int)in.op[0].number); });
}
static void wait_all(Warp& w, const Instr&, u32 lanes) {
  as_each(w, lanes, [](int) {
    emu::cp_commit();
    emu::cp_wait(0);
  });
}

// --- programmatic dependent launch
static void wait_for_predecessor(Warp& w, const Instr& in, u32 lanes) {
  as_each(w, lanes, [&](int) { emu::pdl_wait(site(in)); });
}
static void nothing(Warp&, const Instr&, u32) {}  // the dependent starts as early as the model allows anyway

// --- registers that are read anew each time
template <class T, auto f> static void read(Warp& w, const Instr& in, u32 lanes) {
  as_each(w, lanes, [&](int lane) { w.reg<T>(in.op[0])[lane] = (T)f(); });
}

void async_forms() {
  for (const char* cache : {"ca", "cg"}) {
    for (const char* prefetch : {"", ".L2::64B", ".L2::128B", ".L2::256B"}) {
      for (const char* shared : {".shared.global", ".shared::cta.global"}) {
        std::string name = std::string("cp.async.") + cache + shared + prefetch;
        define(name, {copy, ":aai"}), define(name, {copy, ":aai4", PLAIN, 1});
      }
    }
    for (const char* shared : {".shared.global", ".shared::cta.global"}) {
      std::string name = std::string("cp.async.") + cache + shared + ".L2::cache_hint";
      define(name, {copy, ":aai8"}), define(name, {copy, ":aai48", PLAIN, 1});
    }
  }
  for (const char* first :
       {"evict_first", "evict_last", "evict_normal", "evict_unchanged"}) {  // how much of it is that
    std::string name = std::string("createpolicy.fractional.L2::") + first + ".b64";
    define(name, {no_policy, "8:"}), define(name, {no_policy, "8:i"});
  }
  define("cp.async.commit_group", {commit, ":"});
  define("cp.async.wait_group", {wait_group, ":i"});
  define("cp.async.wait_all", {wait_all, ":"});
  define("griddepcontrol.wait", {wait_for_predecessor, ":", SUSPEND});
  define("griddepcontrol.launch_dependents", {nothing, ":"});
  define("mov.u64 %globaltimer", {read<u64, emu::timer>, "8:"});
  define("mov.u64 %clock64", {read<u64, emu::timer>, "8:"});
  define("mov.u32 %clock", {read<u32, emu::timer>, "4:"});
  define("mov.u32 %smid", {read<u32, emu::sm_id>, "4:"});
}
}  // namespace ptx
