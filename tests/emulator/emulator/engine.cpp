// engine.cpp - fibers, the rendezvous of warp operations and barriers, the scheduler, and launches.
// One fiber per CUDA thread. A lane runs alone until its next warp operation or barrier; the last lane to arrive carries the
// operation out for all. So lanes drift apart as far as CUDA allows, which is what shows missing synchronisation.
#include <sys/mman.h>
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
Thread* cur; uint3 block_idx; dim3 block_dim, grid_dim;
Engine E;
static std::map<std::string, const Kernel*>& table() { static std::map<std::string, const Kernel*> t; return t; }
void add_kernel(const Kernel* k) { table()[k->name] = k; }
const Kernel* find_kernel(const char* n) { auto it = table().find(n); return it == table().end() ? nullptr : it->second; }

static uint64_t rnd() { E.rng ^= E.rng << 13; E.rng ^= E.rng >> 7; return E.rng ^= E.rng << 17; }
void to_sched() { E.switches++; emu_switch(&E.f->sp, E.sp); }
static void resume(void** save, Fiber* f) { E.f = f; cur = f->th; block_idx = f->b->idx; E.switches++; emu_switch(save, f->sp); }
static int pick(uint32_t m) {
  if (E.policy == 0 && !E.spins) return __builtin_ctz(m);
  if (E.policy == 1 && !E.spins) return 31 - __builtin_clz(m);
  for (int k = rnd() % __builtin_popcount(m); k; k--) m &= m - 1;  // random; also while lanes poll, so that none is starved
  return __builtin_ctz(m);
}
EMU_PLAIN void copy(void* d, const void* s, unsigned n) { memcpy(d, s, n); }
void yield() { if (E.policy == 2) to_sched(); }
void spin() {
  if (++E.spins > 4000000) fail("spin-wait without progress: it waits for something no running thread does (blocks of a launch that is not cooperative need not run at the same time)");
  if (E.spins > 1) { E.spun = true; to_sched(); }
}
static void entry() {
  E.l->s.k->run(E.l->params.data());
  Fiber* f = E.f; Warp& w = f->b->warp[f->th->warp]; unsigned bit = 1u << f->th->lane;
  if (!f->open.empty() || !f->wopen.empty() || !f->wgroups.empty()) fail("thread exits with an asynchronous copy or wgmma not waited for");
  f->st = DONE; w.ready &= ~bit; w.done |= bit; E.spins = 0;
  if (w.ready && E.policy != 2) resume(&f->sp, &f->b->f[f->th->warp * 32 + pick(w.ready)]);
  to_sched(); abort();
}
static void wake(Fiber& f) { f.st = READY; f.b->warp[f.th->warp].ready |= 1u << f.th->lane; E.spins = 0; }
void wait(State s, Site site, const char* op) {  // straight to the next ready lane of this warp, else to the scheduler
  Fiber* f = E.f; Warp& w = f->b->warp[f->th->warp];
  f->st = s; f->site = site; f->op = op; w.ready &= ~(1u << f->th->lane);
  if (w.ready) resume(&f->sp, &f->b->f[f->th->warp * 32 + pick(w.ready)]); else to_sched();
}
// --- barriers
static void arrive(int id, int n, Site s, int want) {
  if (id < 0 || id > 15) fail("barrier %d does not exist at %s:%d", id, s.file, s.line);
  Bar& r = E.f->b->bar[id];
  if (r.arrived && (r.want != want || (n < 0 && (r.site.line != s.line || strcmp(r.site.file, s.file)))))
    fail("divergent barrier %d: %s:%d while others wait at %s:%d", id, s.file, s.line, r.site.file, r.site.line);
  if (n >= 0 && (n % 32 || !n)) fail("barrier %d: thread count %d is not a multiple of 32 at %s:%d", id, n, s.file, s.line);
  r.site = s; r.want = want; r.arrived++;
}
static void complete(Block* b, int id) {
  Bar& r = b->bar[id]; uint32_t j[32], fj[32] = {}; Known known, fenced; memcpy(j, r.given, sizeof j);
  for (int w = 0; w < b->nwarps; w++) if (r.warps >> w & 1) {
    for (int o = 0; o < b->nwarps; o++) { j[o] = std::max(j[o], b->vc[w][o]); fj[o] = std::max(fj[o], b->fvc[w][o]); }
    for (int l = 0; l < 32 && w * 32 + l < (int)b->f.size(); l++) { Fiber& f = b->f[w * 32 + l]; fj[w] = std::max(fj[w], f.fence_clk); known = join(known, f.known); fenced = join(fenced, f.fence_known); }
  }
  for (int w = 0; w < b->nwarps; w++) if (r.warps >> w & 1) { memcpy(b->vc[w], j, sizeof j); memcpy(b->fvc[w], fj, sizeof fj); b->wsync[w] = ++clock_of(b, w); }
  for (auto& f : b->f) if (r.warps >> f.th->warp & 1 && (known || fenced)) { f.known = known; f.fence_known = fenced; }
  for (auto& f : b->f) if (f.st == BAR && f.bar == id) wake(f);
  b->bar_result[id] = r.acc; r = Bar(); E.spins = 0;
}
void bar_sync(int id, int n, Site s) {
  E.pc = nullptr; Block* b = E.f->b; int want = n < 0 ? (int)b->f.size() : n;
  arrive(id, n, s, want); Bar& r = b->bar[id]; r.warps |= 1u << cur->warp; E.f->bar = id;
  if (r.arrived < want) wait(BAR, s, "barrier"); else complete(b, id);
}
void bar_arrive(int id, int n, Site s) {  // aligned: the whole warp at once, so that nothing after it counts as before it
  struct Args { int id, n; Site s; } a{id, n, s}; Block* b = E.f->b; unsigned lanes = std::min<unsigned>(32, b->f.size() - cur->warp * 32);
  warp_op("bar.arrive", (1ull << lanes) - 1, s, [](unsigned mask, void* const* p) {
    Args& a = *(Args*)p[cur->lane]; Block* b = E.f->b; unsigned w = cur->warp;
    arrive(a.id, a.n, a.s, a.n); Bar& r = b->bar[a.id]; r.arrived += __builtin_popcount(mask) - 1;
    for (int o = 0; o < b->nwarps; o++) r.given[o] = std::max(r.given[o], b->vc[w][o]);
    clock_of(b, w)++; if (r.arrived >= a.n) complete(b, a.id);
  }, &a);
}
int bar_reduce(int v, Reduction how, Site s) {
  Block* b = E.f->b; b->bar[0].acc += v; bar_sync(0, -1, s); int r = b->bar_result[0];
  return how == COUNT ? r : how == OR ? r != 0 : r == (int)b->f.size();
}
static void sync_warp(Block* b, unsigned w, unsigned mask) {
  b->wsync[w] = ++clock_of(b, w); Known k, fk; uint32_t fc = b->fvc[w][w];
  for (unsigned m = mask; m; m &= m - 1) { Fiber& f = b->f[w * 32 + __builtin_ctz(m)]; k = join(k, f.known); fk = join(fk, f.fence_known); fc = std::max(fc, f.fence_clk); }
  b->fvc[w][w] = fc;
  if (k || fk) for (unsigned m = mask; m; m &= m - 1) { Fiber& f = b->f[w * 32 + __builtin_ctz(m)]; f.known = k; f.fence_known = fk; }
}
void warp_op(const char* op, unsigned mask, Site s, void (*fn)(unsigned, void* const*), void* arg, bool orders_memory) {
  E.pc = nullptr;
  Fiber* f = E.f; Block* b = f->b; unsigned lane = f->th->lane, base = f->th->warp * 32, here = 1u << lane;
  if (!(mask & here)) fail("%s at %s:%d: mask %08x does not name the calling lane %u", op, s.file, s.line, mask, lane);
  Warp& w = b->warp[f->th->warp]; Pend* p = nullptr;
  for (uint32_t u = w.used; u; u &= u - 1) {
    Pend& q = w.p[__builtin_ctz(u)];
    if (q.mask == mask && q.site.line == s.line && q.op == op && q.site.file == s.file) { p = &q; break; }
    if (q.mask & mask) fail("warp divergence: lane %u at %s %s:%d mask %08x while lanes %08x wait at %s %s:%d mask %08x", lane, op, s.file, s.line, mask, q.got, q.op, q.site.file, q.site.line, q.mask);
  }
  if (!p) {
    unsigned n = std::min<unsigned>(32, b->f.size() - base);
    if (n < 32 && mask >> n) fail("%s at %s:%d: mask %08x names lanes beyond the block", op, s.file, s.line, mask);
    unsigned slot = __builtin_ctz(~w.used); w.used |= 1u << slot; p = &w.p[slot]; p->op = op; p->site = s; p->mask = mask; p->got = 0;
  }
  if (w.done & mask) fail("%s at %s:%d: mask %08x names lanes that have exited (%08x)", op, s.file, s.line, mask, w.done & mask);
  p->got |= here; p->args[lane] = arg;
  if (p->got != mask) { f->mask = mask; return wait(WARP, s, op); }
  if (fn) fn(mask, p->args);
  if (orders_memory) sync_warp(b, f->th->warp, mask);
  w.used &= ~(1u << (p - w.p)); w.ready |= mask; E.spins = 0;
  for (unsigned m = mask & ~here; m; m &= m - 1) b->f[base + __builtin_ctz(m)].st = READY;
}
void* dyn_shared() { return E.f->b->sh + SHARED_DYN; }
void* static_shared(const void* key, size_t bytes, size_t align, const char* name) {
  Block* b = E.f->b;
  for (auto& s : b->st) if (s.key == key) return b->sh + s.off;
  size_t off = (b->st_top + align - 1) / align * align;
  if (off + bytes > 48 * 1024) fail("static shared memory over 48 KiB (%s)", name);
  b->st.push_back({key, off}); b->st_top = off + bytes + 64;  // a red zone between arrays
  set_state(b->sh + off, bytes, ALLOC, 0); memset(b->sh + off, 0xff, bytes);
  return b->sh + off;
}
void Launch::step_seq() {
  first_seq = E.seq + 1;
  for (size_t i = 0; i < live; i++) arena->blocks[i]->gseq = hi = ++E.seq;
}
void grid_sync(Site s) {
  Launch* l = E.l;
  if (!l->s.cooperative) fail("grid.sync in a launch that is not cooperative at %s:%d", s.file, s.line);
  if (++l->grid_wait < l->live * E.f->b->f.size()) return wait(GRID, s, "grid.sync");
  l->grid_wait = 0; l->step_seq();
  for (size_t i = 0; i < l->live; i++) for (auto& f : l->arena->blocks[i]->f) if (f.st == GRID) wake(f);
}
void pdl_wait(Site s) { if (E.l->waiting_allowed) wait(PDL, s, "griddepcontrol.wait"); }

// --- launches
static void* map(size_t n) { void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); if (p == MAP_FAILED) { perror("cuda-emulator: mmap"); abort(); } return p; }
static void reserve(Arena& a, size_t slots, size_t threads) {
  if (a.slots < slots) {
    if (a.slots) { munmap(a.sh, a.slots * SHARED_SLOT); munmap(a.sstate, a.slots * SHARED_SLOT / 2); munmap(a.scell, a.slots * SHARED_SLOT / 2 * sizeof(Cell)); }
    a.slots = slots; a.sh = (char*)map(slots * SHARED_SLOT); a.sstate = (uint8_t*)map(slots * SHARED_SLOT / 2); a.scell = (Cell*)map(slots * SHARED_SLOT / 2 * sizeof(Cell));
    while (a.blocks.size() < slots) a.blocks.push_back(std::make_unique<Block>());
  }
  if (a.nstacks < slots * threads) { if (a.nstacks) munmap(a.stacks, a.nstacks * STACK); a.nstacks = std::max<size_t>(1024, slots * threads); a.stacks = (char*)map(a.nstacks * STACK); }
}
Launch::Launch(const Spec& spec) : s(spec), total((size_t)spec.grid.x * spec.grid.y * spec.grid.z) {
  size_t at = 0; for (unsigned i = 0; i < s.k->nparams; i++) { params.push_back(&s.args[at]); at += (s.k->sizes[i] + 15) / 16 * 2; }
  if (E.pool.empty()) arena = new Arena; else { arena = E.pool.back(); E.pool.pop_back(); }
  lo = first_seq = E.seq + 1;
}
Launch::~Launch() { E.pool.push_back(arena); }
static void init_block(Launch* l, Block& b, size_t slot, uint3 idx) {
  unsigned nt = l->s.block.x * l->s.block.y * l->s.block.z; size_t smem = l->s.smem; dim3 d = l->s.block;
  if (b.f.size() != nt) b.f.resize(nt);
  b.sh = l->arena->sh + slot * SHARED_SLOT; b.sstate = l->arena->sstate + slot * SHARED_SLOT / 2; b.scell = l->arena->scell + slot * SHARED_SLOT / 2;
  memset(b.sstate, 0, b.st_top / 2 + 1); memset(b.sstate + SHARED_DYN / 2, 0, (b.dyn_n + 1) / 2);  // what the slot's last block used
  b.mbar.clear(); b.bulk.clear(); b.st.clear(); b.observed.clear(); b.idx = idx; b.dyn_n = smem; b.st_top = 64; b.nwarps = (nt + 31) / 32;
  b.sseq = b.gseq = l->hi = ++E.seq; memset(b.vc, 0, sizeof b.vc); memset(b.fvc, 0, sizeof b.fvc);
  for (int w = 0; w < b.nwarps; w++) {
    b.vc[w][w] = b.wsync[w] = 1; b.warp[w].ready = (1ull << std::min<unsigned>(32, nt - w * 32)) - 1; b.warp[w].done = b.warp[w].used = 0;
  }
  for (auto& r : b.bar) r = Bar();
  memset(b.sstate + SHARED_DYN / 2, ALLOC, (smem + 1) / 2); memset(b.sh + SHARED_DYN, 0xff, smem);  // NaN poison
  for (unsigned t = 0; t < nt; t++) {
    Fiber& f = b.f[t]; char* top = l->arena->stacks + (slot * (size_t)nt + t + 1) * STACK - 64;  // the Thread lives above the stack: reads of threadIdx are stack reads
    f.th = (Thread*)top; *f.th = {{t % d.x, t / d.x % d.y, t / d.x / d.y}, t & 31, t >> 5};
    f.b = &b; f.st = READY; f.fence_clk = 0; f.known = f.pending = f.fence_known = nullptr; f.groups.clear(); f.open.clear(); f.wgroups.clear(); f.wopen.clear();
    void** sp = (void**)(top - 8);  // rsp = 16n + 8 on entry, as after a call
    *sp = nullptr; *--sp = (void*)entry; for (int i = 0; i < 6; i++) *--sp = nullptr;
    f.sp = sp;
  }
}
void Launch::fill(size_t n) {
  reserve(*arena, n, (size_t)s.block.x * s.block.y * s.block.z); live = n;
  for (size_t j = 0; j < n; j++, next++) {
    size_t q = E.policy == 1 ? total - 1 - next : next;
    init_block(this, *arena->blocks[j], j, {(unsigned)(q % s.grid.x), (unsigned)(q / s.grid.x % s.grid.y), (unsigned)(q / s.grid.x / s.grid.y)});
  }
}
bool Launch::run_live() {  // until all live blocks are done, or (true as well) the rest waits for the predecessor
  E.l = this; E.stacks = arena->stacks; E.stack_bytes = arena->nstacks * STACK; E.failed = false; E.err.clear(); E.spins = 0; block_dim = s.block; grid_dim = s.grid;
  std::vector<std::pair<Block*, int>> order;
  for (size_t i = 0; i < live; i++) for (int w = 0; w < arena->blocks[i]->nwarps; w++) order.push_back({arena->blocks[i].get(), w});
  if (E.policy == 1) std::reverse(order.begin(), order.end());
  for (;;) {
    bool progress = false, all = true;
    if (E.policy == 2) for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[rnd() % i]);
    for (auto& [b, w] : order) {
      Warp& wp = b->warp[w];
      while (wp.ready) {  // a warp runs as far ahead as it can
        E.spun = false; resume(&E.sp, &b->f[w * 32 + pick(wp.ready)]);
        if (E.failed) { E.f = nullptr; return false; }
        progress = true;
        if (E.spun || (E.policy == 2 && rnd() % 64 == 0)) break;
      }
      all &= wp.done == (uint32_t)((1ull << std::min<int>(32, b->f.size() - w * 32)) - 1);
    }
    if (all) { E.f = nullptr; live = 0; return true; }
    if (!progress) { for (size_t i = 0; i < live; i++) progress |= land(arena->blocks[i].get()); if (!progress) break; }
  }
  E.f = nullptr; char buf[400]; std::map<std::string, int> groups; bool suspended = false;
  for (size_t i = 0; i < live; i++) for (auto& f : arena->blocks[i]->f) {
    suspended |= f.st == PDL;
    if (f.st == DONE) groups["exited"]++;
    else { snprintf(buf, sizeof buf, "%s %s:%d", f.op, f.site.file, f.site.line); if (f.st == WARP) snprintf(buf + strlen(buf), 20, " mask %08x", f.mask); groups[buf]++; }
  }
  if (suspended) return true;
  E.failed = true; E.code = 719; E.err = std::string("deadlock in ") + s.k->name + ":";
  for (auto& g : groups) { snprintf(buf, sizeof buf, " %d threads: %s;", g.second, g.first.c_str()); E.err += buf; }
  return false;
}
bool Launch::begin() {
  waiting_allowed = true;
  while (next < total) {
    fill(s.cooperative ? total : std::min<size_t>(EARLY_BLOCKS, total - next));
    if (!run_live()) return false;
    if (live) break;
  }
  return true;
}
bool Launch::finish() {
  if (waiting_allowed) {  // the predecessor is done: what it did is ordered before everything from here on
    waiting_allowed = false; step_seq();
    for (size_t i = 0; i < live; i++) for (auto& f : arena->blocks[i]->f) if (f.st == PDL) wake(f);
    first_seq = live ? first_seq : E.seq + 1;
    if (live && !run_live()) return false;
  }
  while (next < total) { fill(s.cooperative ? total : 1); if (!run_live()) return false; }
  return true;
}
}  // namespace emu
