// grid.cpp - the blocks of a launch: their memory, the scheduler that runs them, and what stays live while another
// kernel overlaps.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "engine.h"

namespace emu {
// --- kernels by name
static std::map<std::string, const Kernel*>& table() {
  static std::map<std::string, const Kernel*> t;
  return t;
}
void add_kernel(const Kernel* k) { table()[k->name] = k; }
const Kernel* find_kernel(const char* n) {
  auto it = table().find(n);
  return it == table().end() ? nullptr : it->second;
}

// --- parameters: each at a multiple of 16 bytes, or where the compiler puts it
static size_t words(unsigned bytes) { return (bytes + 15) / 16 * 2; }
std::vector<uint64_t> pack_args(const Kernel* k, void** params) {
  std::vector<uint64_t> a;
  if (k->entry) {
    a.resize((k->entry->param_bytes + 7) / 8);
    for (unsigned i = 0; i < k->nparams; i++)
      memcpy((char*)a.data() + k->entry->params[i].offset, params[i], k->sizes[i]);
    return a;
  }
  for (unsigned i = 0; i < k->nparams; i++) {
    size_t at = a.size();
    a.resize(at + words(k->sizes[i]));
    memcpy(&a[at], params[i], k->sizes[i]);
  }
  return a;
}
std::vector<void*> unpack_args(const Kernel* k, const std::vector<uint64_t>& args) {
  std::vector<void*> params;
  size_t at = 0;
  for (unsigned i = 0; k->entry && i < k->nparams; i++)
    params.push_back((char*)args.data() + k->entry->params[i].offset);
  if (k->entry) return params;
  for (unsigned i = 0; i < k->nparams; i++) {
    params.push_back((void*)&args[at]);
    at += words(k->sizes[i]);
  }
  return params;
}

// --- arenas
[[noreturn]] static void out_of_address_space() {
  perror("cuda-emulator: mmap");
  abort();
}
static void reserve(Arena& a, size_t slots, size_t threads) {
  if (a.slots < slots) {
    if (a.slots) {
      munmap(a.sh, a.slots * SHARED_SLOT);
      a.shadow.release(a.slots * SHARED_SLOT);
    }
    a.slots = slots;
    a.sh = (char*)reserve_pages(slots * SHARED_SLOT);
    if (!a.sh || !a.shadow.reserve(slots * SHARED_SLOT)) out_of_address_space();
    while (a.blocks.size() < slots) a.blocks.push_back(std::make_unique<Block>());
  }
  if (a.nstacks < slots * threads) {
    if (a.nstacks) munmap(a.stacks, a.nstacks * STACK);
    a.nstacks = std::max<size_t>(1024, slots * threads);
    a.stacks = (char*)reserve_pages(a.nstacks * STACK);
    if (!a.stacks) out_of_address_space();
  }
}

// --- launches
static std::vector<Arena*> pool;  // those that no launch has
Launch::Launch(const Spec& spec, const Launch* overlapping)
    : s(spec), total((size_t)spec.grid.x * spec.grid.y * spec.grid.z) {
  params = unpack_args(s.k, s.args);
  released = overlapping ? overlapping->released : std::make_shared<Released>();
  if (pool.empty())
    arena = new Arena;
  else {
    arena = pool.back();
    pool.pop_back();
  }
  order();
}
Launch::~Launch() { pool.push_back(arena); }
// Seqs grow from launch to launch; each takes some at once, because others run at the same time.
uint32_t Launch::reserve_seqs() {
  static std::atomic<uint32_t> next{2};
  uint32_t n = (uint32_t)std::min<size_t>(total, 4096), begin = next.fetch_add(n);
  seqs.push_back({begin, begin, begin + n});
  return begin;
}
uint32_t Launch::fresh_seq() {
  if (seqs.back().next == seqs.back().end) reserve_seqs();
  return seqs.back().next++;
}
bool Launch::has(uint32_t seq) const {
  return std::any_of(seqs.begin(), seqs.end(), [seq](const Seqs& s) { return s.begin <= seq && seq < s.next; });
}
void Launch::order() { first_seq = reserve_seqs(); }
static void init_block(Launch* l, Block& b, size_t slot, uint3 idx) {
  unsigned nt = l->s.block.x * l->s.block.y * l->s.block.z;
  size_t smem = l->s.smem;
  dim3 d = l->s.block;
  if (b.f.size() != nt) b.f.resize(nt);
  b.sh = l->arena->sh + slot * SHARED_SLOT;
  b.shadow = l->arena->shadow.at(slot * SHARED_SLOT);
  memset(b.shadow.state, 0, b.st_top / 2 + 1);
  memset(b.shadow.state + SHARED_DYN / 2, 0, (b.dyn_n + 1) / 2);  // what the slot's last block used
  b.mbar.clear();
  b.bulk.clear();
  b.st.clear();
  b.observed.clear();
  b.idx = idx;
  b.dyn_n = smem;
  b.st_top = 64;
  b.nwarps = (nt + 31) / 32;
  b.sseq = b.gseq = l->fresh_seq();
  memset(b.vc, 0, sizeof b.vc);
  memset(b.fvc, 0, sizeof b.fvc);
  for (int w = 0; w < b.nwarps; w++) {
    b.vc[w][w] = b.wsync[w] = 1;
    b.warp[w].ready = (1ull << std::min<unsigned>(32, nt - w * 32)) - 1;
    b.warp[w].done = b.warp[w].used = 0;
  }
  for (auto& r : b.bar) r = Bar();
  memset(b.shadow.state + SHARED_DYN / 2, ALLOC, (smem + 1) / 2);
  memset(b.sh + SHARED_DYN, 0xff, smem);  // NaN poison
  for (unsigned t = 0; t < nt; t++) {
    Fiber& f = b.f[t];
    // the Thread lives above the stack: reads of threadIdx are stack reads
    char* top = l->arena->stacks + (slot * (size_t)nt + t + 1) * STACK - 64;
    f.th = (Thread*)top;
    *f.th = {{t % d.x, t / d.x % d.y, t / d.x / d.y}, t & 31, t >> 5};
    f.b = &b;
    f.st = READY;
    f.fence_clk = 0;
    f.known = f.pending = f.fence_known = nullptr;
    f.async.clear();
    f.wgroups.clear();
    f.wopen.clear();
    void** sp = (void**)(top - 8);  // rsp = 16n + 8 on entry, as after a call
    *sp = nullptr;
    *--sp = (void*)entry;
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    f.sp = sp;
  }
  if (const ptx::Entry* e = l->s.k->entry) {
    for (auto& a : e->shared) {
      memset(b.shadow.state + a.offset / 2, ALLOC, (a.size + 1) / 2);
      memset(b.sh + a.offset, 0xff, a.size);
    }
    b.st_top = e->shared_top;
    b.compiled.resize(b.nwarps);
    for (int w = 0; w < b.nwarps; w++) b.compiled[w].begin(l->s, &b, w);
  }
}
void Launch::fill(size_t n) {
  reserve(*arena, n, (size_t)s.block.x * s.block.y * s.block.z);
  live = n;
  for (size_t j = 0; j < n; j++, next++) {
    size_t q = settings.policy == REVERSE ? total - 1 - next : next;
    init_block(this, *arena->blocks[j], j,
               {(unsigned)(q % s.grid.x), (unsigned)(q / s.grid.x % s.grid.y), (unsigned)(q / s.grid.x / s.grid.y)});
  }
}
static uint32_t lanes_of(const Block* b, int w) {  // of warp w that exist
  return (uint32_t)((1ull << std::min<int>(32, b->f.size() - w * 32)) - 1);
}
// Runs each warp as far ahead as it can; false: fault or nothing could run. all_done: no thread is left.
bool Launch::run_ready(std::vector<std::pair<Block*, int>>& order, bool& all_done) {
  bool progress = false;
  all_done = true;
  for (auto& [b, w] : order) {
    Warp& warp = b->warp[w];
    while (warp.ready) {
      E.spun = false;
      if (s.k->entry) {
        ptx::run(b, w);
      } else {
        resume(&E.sp, &b->f[w * 32 + pick(warp.ready)]);
      }
      if (E.failed) return false;
      progress = true;
      if (E.spun || (settings.policy == RANDOM && rnd() % 64 == 0)) break;
    }
    all_done &= warp.done == lanes_of(b, w);
  }
  return progress || all_done;
}
// Nothing can run. True if the rest waits at griddepcontrol.wait for the predecessor; else a deadlock, with a census.
bool Launch::stuck() {
  auto& blocks = arena->blocks;
  auto suspended = [](auto& b) { return std::any_of(b->f.begin(), b->f.end(), [](auto& f) { return f.st == PDL; }); };
  if (std::any_of(blocks.begin(), blocks.begin() + live, suspended)) return true;
  std::map<std::string, int> groups;
  for (size_t i = 0; i < live; i++) {
    for (auto& f : blocks[i]->f) {
      char text[400];
      snprintf(text, sizeof text, "%s %s:%d", f.op, f.site.file, f.site.line);
      if (f.st == WARP) snprintf(text + strlen(text), 20, " mask %08x", f.mask);
      groups[f.st == DONE ? "exited" : text]++;
    }
  }
  E.failed = true;
  code = 719;
  err = std::string("deadlock in ") + s.k->name + ":";
  for (auto& [what, n] : groups) err += " " + std::to_string(n) + " threads: " + what + ";";
  return false;
}
// Until all live blocks are done, or (true as well) the rest waits for the predecessor.
bool Launch::run_live() {
  E.l = this;
  E.stacks = arena->stacks;
  E.stack_bytes = arena->nstacks * STACK;
  E.failed = false;
  E.spins = 0;
  if (!E.rng) E.rng = settings.seed;
  now.block_dim = s.block;
  now.grid_dim = s.grid;
  std::vector<std::pair<Block*, int>> order;
  for (size_t i = 0; i < live; i++) {
    for (int w = 0; w < arena->blocks[i]->nwarps; w++) order.push_back({arena->blocks[i].get(), w});
  }
  if (settings.policy == REVERSE) std::reverse(order.begin(), order.end());
  for (;;) {
    if (settings.policy == RANDOM) {
      for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[rnd() % i]);
    }
    bool all_done, progress = run_ready(order, all_done);
    E.f = nullptr;
    if (E.failed) return false;
    if (all_done) {
      live = 0;
      return true;
    }
    for (size_t i = 0; i < live && !progress; i++) progress = land(arena->blocks[i].get());
    if (!progress) return stuck();
  }
}
void Launch::step_seq() {
  order();
  for (size_t i = 0; i < live; i++) arena->blocks[i]->gseq = fresh_seq();
}
bool Launch::begin() {
  waiting_allowed = true;
  while (next < total) {
    fill(s.cooperative ? total : std::min(settings.early_blocks, total - next));
    if (!run_live()) return false;
    if (live) break;
  }
  return true;
}
bool Launch::finish() {
  if (waiting_allowed) {  // the predecessor is done: what it did is ordered before everything from here on
    waiting_allowed = false;
    step_seq();
    for (size_t i = 0; i < live; i++)
      for (auto& f : arena->blocks[i]->f)
        if (f.st == PDL) wake(f);
    if (live && !run_live()) return false;
  }
  while (next < total) {
    fill(s.cooperative ? total : 1);
    if (!run_live()) return false;
  }
  return true;
}
}  // namespace emu
