// fiber.cpp - fibers, and the rendezvous of warp operations and barriers.
// One fiber per CUDA thread. A lane runs alone until its next warp operation or barrier; the last lane to arrive
// executes the operation for all. So lanes drift apart as far as CUDA allows, which reveals missing synchronisation.
#include <algorithm>
#include <cstdlib>

#include "engine.h"

extern "C" void emu_switch(void** save, void* to) __attribute__((visibility("hidden")));
asm(R"(.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
namespace emu {
__thread Now now{};
__thread Engine E;
uint64_t rnd() {
  E.rng ^= E.rng << 13;
  E.rng ^= E.rng >> 7;
  return E.rng ^= E.rng << 17;
}
void to_sched() { emu_switch(&E.f->sp, E.sp); }
void resume(void** save, Fiber* f) {
  E.f = f;
  now.thread = f->th;
  now.block = f->b->idx;
  emu_switch(save, f->sp);
}
int pick(uint32_t m) {
  if (settings.policy == FORWARD && !E.spins) return __builtin_ctz(m);
  if (settings.policy == REVERSE && !E.spins) return 31 - __builtin_clz(m);
  // random; also while lanes poll, so that none is starved
  for (int k = rnd() % __builtin_popcount(m); k; k--) m &= m - 1;
  return __builtin_ctz(m);
}
EMU_PLAIN void copy(void* d, const void* s, unsigned n) { memcpy(d, s, n); }
void yield() {
  if (settings.policy == RANDOM && !E.at) to_sched();
}
void spin() {
  if (++E.spins > 4000000) {
    fail(
        "spin-wait without progress: it waits for something no running thread does (blocks of a launch that is not "
        "cooperative need not run at the same time)");
  }
  if (E.spins > 1) {
    E.spun = true;
    if (!E.at) to_sched();  // a warp of compiled code returns when it sees spun
  }
}
void entry() {
  E.l->s.k->run(E.l->params.data());
  Fiber* f = E.f;
  Warp& w = f->b->warp[f->th->warp];
  unsigned bit = 1u << f->th->lane;
  if (f->async.open() || !f->wopen.empty() || !f->wgroups.empty())
    fail("thread exits with an asynchronous copy or wgmma not waited for");
  f->st = DONE;
  w.ready &= ~bit;
  w.done |= bit;
  E.spins = 0;
  if (w.ready && settings.policy != RANDOM) resume(&f->sp, &f->b->f[f->th->warp * 32 + pick(w.ready)]);
  to_sched();
  abort();
}
void wake(Fiber& f) {
  f.st = READY;
  f.b->warp[f.th->warp].ready |= 1u << f.th->lane;
  E.spins = 0;
}
// Straight to the next ready lane of this warp, else to the scheduler. In compiled code the warp goes on with its other
// lanes when this returns.
void wait(State s, Site site, const char* op) {
  Fiber* f = E.f;
  Warp& w = f->b->warp[f->th->warp];
  f->st = s;
  f->site = site;
  f->op = op;
  w.ready &= ~(1u << f->th->lane);
  if (E.at) return;
  if (w.ready)
    resume(&f->sp, &f->b->f[f->th->warp * 32 + pick(w.ready)]);
  else
    to_sched();
}
// --- barriers
static void arrive(int id, int n, Site s, int want) {
  if (id < 0 || id > 15) fail("barrier %d does not exist at %s:%d", id, s.file, s.line);
  Bar& r = E.f->b->bar[id];
  bool elsewhere = !E.at && (r.site.line != s.line || strcmp(r.site.file, s.file));  // a compiler may copy a barrier
  if (r.arrived && (r.want != want || (n < 0 && elsewhere)))
    fail("divergent barrier %d: %s:%d while others wait at %s:%d", id, s.file, s.line, r.site.file, r.site.line);
  if (n >= 0 && (n % 32 || !n))
    fail("barrier %d: thread count %d is not a multiple of 32 at %s:%d", id, n, s.file, s.line);
  r.site = s;
  r.want = want;
  r.arrived++;
}
static void complete(Block* b, int id) {
  Bar& r = b->bar[id];
  uint32_t j[32], fj[32] = {};
  Known known, fenced;
  memcpy(j, r.given, sizeof j);
  for (int w = 0; w < b->nwarps; w++)
    if (r.warps >> w & 1) {
      for (int o = 0; o < b->nwarps; o++) {
        j[o] = std::max(j[o], b->vc[w][o]);
        fj[o] = std::max(fj[o], b->fvc[w][o]);
      }
      for (int l = 0; l < 32 && w * 32 + l < (int)b->f.size(); l++) {
        Fiber& f = b->f[w * 32 + l];
        fj[w] = std::max(fj[w], f.fence_clk);
        known = join(known, f.known);
        fenced = join(fenced, f.fence_known);
      }
    }
  for (int w = 0; w < b->nwarps; w++)
    if (r.warps >> w & 1) {
      memcpy(b->vc[w], j, sizeof j);
      memcpy(b->fvc[w], fj, sizeof fj);
      b->wsync[w] = ++clock_of(b, w);
    }
  for (auto& f : b->f)
    if (r.warps >> f.th->warp & 1 && (known || fenced)) {
      f.known = known;
      f.fence_known = fenced;
    }
  for (auto& f : b->f)
    if (f.st == BAR && f.bar == id) wake(f);
  b->bar_result[id] = r.acc;
  r = Bar();
  E.spins = 0;
}
void bar_sync(int id, int n, Site s) {
  E.pc = nullptr;
  Block* b = E.f->b;
  int want = n < 0 ? (int)b->f.size() : n;
  arrive(id, n, s, want);
  Bar& r = b->bar[id];
  r.warps |= 1u << now.thread->warp;
  E.f->bar = id;
  if (r.arrived < want)
    wait(BAR, s, "barrier");
  else
    complete(b, id);
}
void bar_arrive_warp(int id, int n, Site s, int lanes) {
  Block* b = E.f->b;
  unsigned w = now.thread->warp;
  arrive(id, n, s, n);
  Bar& r = b->bar[id];
  r.arrived += lanes - 1;
  for (int o = 0; o < b->nwarps; o++) r.given[o] = std::max(r.given[o], b->vc[w][o]);
  clock_of(b, w)++;
  if (r.arrived >= n) complete(b, id);
}
// Aligned: the whole warp at once, so that nothing after it counts as before it.
void bar_arrive(int id, int n, Site s) {
  struct Args {
    int id, n;
    Site s;
  } a{id, n, s};
  Block* b = E.f->b;
  unsigned lanes = std::min<unsigned>(32, b->f.size() - now.thread->warp * 32);
  auto all = [](unsigned mask, void* const* p) {
    Args& a = *(Args*)p[now.thread->lane];
    bar_arrive_warp(a.id, a.n, a.s, __builtin_popcount(mask));
  };
  warp_op("bar.arrive", (1ull << lanes) - 1, s, all, &a);
}
int bar_reduce(int v, Reduction how, Site s) {
  Block* b = E.f->b;
  b->bar[0].acc += v;
  bar_sync(0, -1, s);
  int r = b->bar_result[0];
  return how == COUNT ? r : how == OR ? r != 0 : r == (int)b->f.size();
}
// --- warp operations
void sync_warp(Block* b, unsigned w, unsigned mask) {
  b->wsync[w] = ++clock_of(b, w);
  Known k, fk;
  uint32_t fc = b->fvc[w][w];
  for (unsigned m = mask; m; m &= m - 1) {
    Fiber& f = b->f[w * 32 + __builtin_ctz(m)];
    k = join(k, f.known);
    fk = join(fk, f.fence_known);
    fc = std::max(fc, f.fence_clk);
  }
  b->fvc[w][w] = fc;
  if (k || fk)
    for (unsigned m = mask; m; m &= m - 1) {
      Fiber& f = b->f[w * 32 + __builtin_ctz(m)];
      f.known = k;
      f.fence_known = fk;
    }
}
void warp_op(const char* op, unsigned mask, Site s, void (*fn)(unsigned, void* const*), void* arg, bool orders_memory) {
  E.pc = nullptr;
  Fiber* f = E.f;
  Block* b = f->b;
  unsigned lane = f->th->lane, base = f->th->warp * 32, here = 1u << lane;
  if (!(mask & here)) fail("%s at %s:%d: mask %08x does not name the calling lane %u", op, s.file, s.line, mask, lane);
  Warp& w = b->warp[f->th->warp];
  Pend* p = nullptr;
  for (uint32_t u = w.used; u; u &= u - 1) {
    Pend& q = w.p[__builtin_ctz(u)];
    if (q.mask == mask && q.site.line == s.line && q.op == op && q.site.file == s.file) {
      p = &q;
      break;
    }
    if (q.mask & mask)
      fail("warp divergence: lane %u at %s %s:%d mask %08x while lanes %08x wait at %s %s:%d mask %08x", lane, op,
           s.file, s.line, mask, q.got, q.op, q.site.file, q.site.line, q.mask);
  }
  if (!p) {
    unsigned n = std::min<unsigned>(32, b->f.size() - base);
    if (n < 32 && mask >> n) fail("%s at %s:%d: mask %08x names lanes beyond the block", op, s.file, s.line, mask);
    unsigned slot = __builtin_ctz(~w.used);
    w.used |= 1u << slot;
    p = &w.p[slot];
    p->op = op;
    p->site = s;
    p->mask = mask;
    p->got = 0;
  }
  if (w.done & mask)
    fail("%s at %s:%d: mask %08x names lanes that have exited (%08x)", op, s.file, s.line, mask, w.done & mask);
  p->got |= here;
  p->args[lane] = arg;
  if (p->got != mask) {
    f->mask = mask;
    return wait(WARP, s, op);
  }
  if (fn) fn(mask, p->args);
  if (orders_memory) sync_warp(b, f->th->warp, mask);
  w.used &= ~(1u << (p - w.p));
  w.ready |= mask;
  E.spins = 0;
  for (unsigned m = mask & ~here; m; m &= m - 1) b->f[base + __builtin_ctz(m)].st = READY;
}
// --- shared memory
void* dyn_shared() { return E.f->b->sh + SHARED_DYN; }
void* static_shared(const void* key, size_t bytes, size_t align, const char* name) {
  Block* b = E.f->b;
  for (auto& s : b->st)
    if (s.key == key) return b->sh + s.off;
  size_t off = (b->st_top + align - 1) / align * align;
  if (off + bytes > 48 * 1024) fail("static shared memory over 48 KiB (%s)", name);
  b->st.push_back({key, off});
  b->st_top = off + bytes + 64;  // a red zone between arrays
  set_state(b->sh + off, bytes, ALLOC, 0);
  memset(b->sh + off, 0xff, bytes);
  return b->sh + off;
}
// --- the grid
void grid_sync(Site s) {
  Launch* l = E.l;
  if (!l->s.cooperative) fail("grid.sync in a launch that is not cooperative at %s:%d", s.file, s.line);
  if (++l->grid_wait < l->live * E.f->b->f.size()) return wait(GRID, s, "grid.sync");
  l->grid_wait = 0;
  l->step_seq();
  for (size_t i = 0; i < l->live; i++)
    for (auto& f : l->arena->blocks[i]->f)
      if (f.st == GRID) wake(f);
}
void pdl_wait(Site s) {
  if (E.l->waiting_allowed) wait(PDL, s, "griddepcontrol.wait");
}
}  // namespace emu
