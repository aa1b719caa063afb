// warp.cpp - operations that the lanes of a warp do together: shuffles, votes, reductions, matrices, barriers.
#include <algorithm>

#include "space.h"

namespace ptx {
using u32 = uint32_t;
using u64 = uint64_t;

// --- shfl.sync d{|p}, a, b, c, mask. c: the clamp in bits 0-4, the lanes' segment in bits 8-12.
enum Shuffle { UP, DOWN, BFLY, IDX };
template <Shuffle how, bool tells> static void shuffle(Warp& w, const Instr& in, u32 lanes) {
  constexpr int first = 1 + tells;
  const u32 *a = w.reg<u32>(in.op[first]), *b = w.reg<u32>(in.op[first + 1]), *c = w.reg<u32>(in.op[first + 2]);
  u32 r[32], inside = 0;
  for (u32 m = lanes; m; m &= m - 1) {
    int lane = __builtin_ctz(m), clamp = c[lane] & 31, segment = c[lane] >> 8 & 31, by = b[lane] & 31;
    int most = (lane & segment) | (clamp & ~segment), least = lane & segment, source;
    bool in_range;
    switch (how) {
      case UP: source = lane - by, in_range = source >= most; break;
      case DOWN: source = lane + by, in_range = source <= most; break;
      case BFLY: source = lane ^ by, in_range = source <= most; break;
      case IDX: source = least | (by & ~segment), in_range = source <= most; break;
    }
    if (!in_range) source = lane;
    if (!(lanes >> source & 1)) {
      w.as(lane);
      emu::fail("shfl reads lane %d which is not in mask %08x (lane %d)", source, lanes, lane);
    }
    r[lane] = a[source];
    inside |= (u32)in_range << lane;
  }
  u32* d = w.reg<u32>(in.op[0]);
  each(lanes, [&](int i) { d[i] = r[i]; });
  if (tells) w.set_pred(in.op[1], lanes, inside);
}
template <Shuffle how> static void define_shuffle(const std::string& name) {
  define("shfl.sync." + name + ".b32", {shuffle<how, false>, "4:4444", MASKED});
  define("shfl.sync." + name + ".b32", {shuffle<how, true>, "4p:4444", MASKED});
}

// --- votes and reductions
static void ballot(Warp& w, const Instr& in, u32 lanes) {
  u32 r = w.pred(in.op[1]) & lanes;
  each(lanes, [&](int i) { w.reg<u32>(in.op[0])[i] = r; });
}
template <auto f> static void vote(Warp& w, const Instr& in, u32 lanes) {
  w.set_pred(in.op[0], lanes, f(w.pred(in.op[1]) & lanes, lanes) ? ~0u : 0);
}
template <class T> static void match(Warp& w, const Instr& in, u32 lanes) {
  u32 r[32];
  const T* a = w.reg<T>(in.op[1]);
  each(lanes, [&](int i) {
    r[i] = 0;
    for (u32 m = lanes; m; m &= m - 1) r[i] |= (u32)(a[__builtin_ctz(m)] == a[i]) << __builtin_ctz(m);
  });
  each(lanes, [&](int i) { w.reg<u32>(in.op[0])[i] = r[i]; });
}
template <class T, auto f> static void reduce(Warp& w, const Instr& in, u32 lanes) {
  const T* a = w.reg<T>(in.op[1]);
  T r = a[__builtin_ctz(lanes)];
  for (u32 m = lanes & (lanes - 1); m; m &= m - 1) r = f(r, a[__builtin_ctz(m)]);
  each(lanes, [&](int i) { w.reg<T>(in.op[0])[i] = r; });
}
template <class T, auto f> static void define_reduction(const std::string& name) {
  define("redux.sync." + name, {reduce<T, f>, "4:44", MASKED});
}
static void elect(Warp& w, const Instr& in, u32 lanes) {  // any lane may be the leader; the lowest here
  u32 leader = __builtin_ctz(lanes);
  each(lanes, [&](int i) { w.reg<u32>(in.op[0])[i] = leader; });
  w.set_pred(in.op[1], lanes, 1u << leader);
}
static void sync_lanes(Warp& w, const Instr&, u32 lanes) { emu::sync_warp(w.block, w.index, lanes); }

// --- matrices
static void whole(Warp& w) {
  if (w.exists != ~0u) emu::fail("a warp of %d threads: matrices take 32", __builtin_popcount(w.exists));
}
static void mma(Warp& w, const Instr& in, u32) {
  whole(w);
  float d[32][4];
  u32 a[32][4], b[32][2];
  for (int l = 0; l < 32; l++) {
    for (int i = 0; i < 4; i++) a[l][i] = w.reg<u32>(in.op[4 + i])[l];
    for (int i = 0; i < 2; i++) b[l][i] = w.reg<u32>(in.op[8 + i])[l];
    for (int i = 0; i < 4; i++) d[l][i] = w.reg<float>(in.op[10 + i])[l];
  }
  emu::Mma lanes[32];
  void* pointers[32];
  for (int l = 0; l < 32; l++) pointers[l] = &(lanes[l] = {d[l], a[l], b[l]});
  emu::mma_warp(~0u, pointers);
  for (int l = 0; l < 32; l++) {
    for (int i = 0; i < 4; i++) w.reg<float>(in.op[i])[l] = d[l][i];
  }
}
template <int n, bool transposed> static void load_matrices(Warp& w, const Instr& in, u32) {
  whole(w);
  u32 r[32][n];
  emu::Ldmatrix lanes[32];
  void* pointers[32];
  for (int l = 0; l < 32; l++) {
    char* row = nullptr;
    if (l < 8 * n) {  // the lanes whose addresses count
      w.as(l);
      row = place(w, in.op[n], l, SHARED, 16);
      emu::check(row, 16, false);
    }
    pointers[l] = &(lanes[l] = {r[l], (const uint16_t*)row, n, transposed});
  }
  emu::ldmatrix_warp(~0u, pointers);
  for (int k = 0; k < n; k++) {
    for (int l = 0; l < 32; l++) w.reg<u32>(in.op[k])[l] = r[l][k];
  }
}
template <int n> static void define_matrices(const std::string& count) {
  for (const char* space : {".shared.b16", ".shared::cta.b16"}) {
    std::string name = "ldmatrix.sync.aligned.m8n8." + count, registers(n, '4');
    define(name + space, {load_matrices<n, false>, registers + ":a", ALIGNED});
    define(name + ".trans" + space, {load_matrices<n, true>, registers + ":a", ALIGNED});
  }
}

// --- barriers: a{, b} is the barrier and how many threads it is for
static void barrier(Warp& w, const Instr& in, u32 lanes) {
  for (u32 m = lanes; m; m &= m - 1) {
    int lane = __builtin_ctz(m);
    w.as(lane);
    emu::bar_sync((int)w.reg<u32>(in.op[0])[lane], in.n > 1 ? (int)w.reg<u32>(in.op[1])[lane] : -1, site(in));
  }
}
static void arrive(Warp& w, const Instr& in, u32 lanes) {
  int lane = __builtin_ctz(lanes);
  w.as(lane);
  int id = (int)w.reg<u32>(in.op[0])[lane], threads = (int)w.reg<u32>(in.op[1])[lane];
  emu::bar_arrive_warp(id, threads, site(in), __builtin_popcount(lanes));
}
static void barrier_reduce(Warp& w, const Instr& in, u32 lanes) {  // d, a, p
  for (u32 m = lanes; m; m &= m - 1) {
    int lane = __builtin_ctz(m), id = (int)w.reg<u32>(in.op[1])[lane];
    w.as(lane);
    if (id < 0 || id > 15) emu::fail("barrier %d does not exist", id);
    w.block->bar[id].acc += w.pred(in.op[2]) >> lane & 1;
    emu::bar_sync(id, -1, site(in));
  }
}
static int reduced(Warp& w, const Instr& in, u32 lanes) {
  return w.block->bar_result[w.reg<u32>(in.op[1])[__builtin_ctz(lanes)]];
}
static void reduced_count(Warp& w, const Instr& in, u32 lanes) {
  u32 r = (u32)reduced(w, in, lanes);
  each(lanes, [&](int i) { w.reg<u32>(in.op[0])[i] = r; });
}
template <bool all> static void reduced_predicate(Warp& w, const Instr& in, u32 lanes) {
  int r = reduced(w, in, lanes), threads = (int)w.block->f.size();
  w.set_pred(in.op[0], lanes, (all ? r == threads : r > 0) ? ~0u : 0);
}
static void barrier_forms() {
  for (const char* b : {"bar", "bar.cta", "barrier", "barrier.cta"}) {
    std::string name = b, aligned = name[3] == 'r' ? ".aligned" : "";
    for (const char* operands : {":4", ":44"}) {
      define(name + ".sync" + aligned, {barrier, operands, ALIGNED});
      if (!aligned.empty()) define(name + ".sync", {barrier, operands, SUSPEND});
    }
    define(name + ".arrive" + aligned, {arrive, ":44", ALIGNED});
    define(name + ".red.popc" + aligned + ".u32", {barrier_reduce, "4:4p", ALIGNED, 0, reduced_count});
    define(name + ".red.and" + aligned + ".pred", {barrier_reduce, "p:4p", ALIGNED, 0, reduced_predicate<true>});
    define(name + ".red.or" + aligned + ".pred", {barrier_reduce, "p:4p", ALIGNED, 0, reduced_predicate<false>});
  }
}

void warp_forms() {
  define_shuffle<UP>("up"), define_shuffle<DOWN>("down"), define_shuffle<BFLY>("bfly"), define_shuffle<IDX>("idx");
  define("vote.sync.ballot.b32", {ballot, "4:p4", MASKED});
  define("vote.sync.any.pred", {vote<[](u32 p, u32) { return p != 0; }>, "p:p4", MASKED});
  define("vote.sync.all.pred", {vote<[](u32 p, u32 all) { return p == all; }>, "p:p4", MASKED});
  define("vote.sync.uni.pred", {vote<[](u32 p, u32 all) { return p == all || !p; }>, "p:p4", MASKED});
  define("match.any.sync.b32", {match<u32>, "4:44", MASKED});
  define("match.any.sync.b64", {match<u64>, "4:84", MASKED});
  define_reduction<u32, [](u32 a, u32 b) { return a + b; }>("add.u32");
  define_reduction<u32, [](u32 a, u32 b) { return a + b; }>("add.s32");
  define_reduction<u32, [](u32 a, u32 b) { return std::min(a, b); }>("min.u32");
  define_reduction<u32, [](u32 a, u32 b) { return std::max(a, b); }>("max.u32");
  define_reduction<int, [](int a, int b) { return std::min(a, b); }>("min.s32");
  define_reduction<int, [](int a, int b) { return std::max(a, b); }>("max.s32");
  define_reduction<u32, [](u32 a, u32 b) { return a & b; }>("and.b32");
  define_reduction<u32, [](u32 a, u32 b) { return a | b; }>("or.b32");
  define_reduction<u32, [](u32 a, u32 b) { return a ^ b; }>("xor.b32");
  define("elect.sync", {elect, "4p:4", MASKED});
  define("bar.warp.sync", {sync_lanes, ":4", MASKED});
  define("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", {mma, "4444:4444444444", ALIGNED});
  define_matrices<1>("x1"), define_matrices<2>("x2"), define_matrices<4>("x4");
  barrier_forms();
}
}  // namespace ptx
