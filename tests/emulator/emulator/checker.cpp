// checker.cpp - bounds, initialisation and race checks (FastTrack vector clocks at warp granularity), the device heap,
// and the callbacks of -fsanitize=thread. libtsan itself is never linked: the compiler only inserts the calls.
#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <algorithm>
#include <cstdarg>
#include <cstdlib>
#include "engine.h"
namespace emu {
char* dev; uint8_t* dev_state; Cell* dev_cell; size_t dev_size;
static std::map<size_t, size_t> heap, holes;  // offset -> size; holes are reused only when fresh addresses run out
static size_t dev_top = 1 << 20;

Known join(const Known& a, const Known& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto r = std::make_shared<KnownSet>(*a);
  for (auto& e : *b) {
    Know& k = (*r)[e.first];
    for (int i = 0; i < 32; i++) k.clk[i] = std::max(k.clk[i], e.second.clk[i]);
    for (auto& t : e.second.thread) { uint32_t& c = k.thread[t.first]; c = std::max(c, t.second); }
  }
  return r;
}
// --- faults
std::string fault_at_pc() {
  Dl_info di; std::string r;
  if (!E.pc || !dladdr(E.pc, &di)) return r;
  char cmd[600], l[400]; snprintf(cmd, sizeof cmd, "addr2line -i -e '%s' 0x%zx 2>/dev/null", di.dli_fname, (size_t)((char*)E.pc - 1 - (char*)di.dli_fbase));
  if (FILE* p = popen(cmd, "r")) {
    while (fgets(l, sizeof l, p)) {  // innermost frame first: take the first that is not a wrapper
      l[strcspn(l, " \n")] = 0; if (l[0] == '?') break;
      r = std::string(" at ") + l; if (!strstr(l, "/include/emulated_") && !strstr(l, "device.cuh")) break;
    }
    pclose(p);
  }
  return r;
}
void fail(const char* fmt, ...) {
  char buf[1024]; va_list v; va_start(v, fmt); vsnprintf(buf, sizeof buf, fmt, v); va_end(v);
  if (!E.f) { fprintf(stderr, "cuda-emulator: %s\n", buf); abort(); }
  char where[256]; const uint3& t = cur->tid;
  snprintf(where, sizeof where, " [%s block (%u,%u,%u) thread (%u,%u,%u)]", E.l->s.k->name, block_idx.x, block_idx.y, block_idx.z, t.x, t.y, t.z);
  E.err = std::string(buf) + where + fault_at_pc(); E.failed = true;
  E.code = !strncmp(buf, "out-of-bounds", 13) || !strncmp(buf, "null", 4) ? 700 : !strncmp(buf, "misaligned", 10) ? 716 : 719;
  to_sched(); abort();
}
// --- ordering
static bool overlapping(uint32_t seq) { return E.other && seq >= E.other->lo && seq <= E.other->hi; }
void here() { E.pc = __builtin_return_address(0); }
static std::string who(Block* b, uint64_t a, bool shared) {
  char s[200]; uint32_t seq = a >> 32; const char* at = a >> 12 & 1 ? " (atomic)" : "";
  if (seq == (shared ? b->sseq : b->gseq)) snprintf(s, sizeof s, "thread %u%s", (unsigned)(a & 1023), at);
  else if (overlapping(seq)) snprintf(s, sizeof s, "thread %u%s of %s, which overlaps by programmatic dependent launch: griddepcontrol.wait must come first", (unsigned)(a & 1023), at, E.other->s.k->name);
  else snprintf(s, sizeof s, "thread %u%s of another block (release by the writer: __threadfence before the atomic, or a _release wrapper; acquire by the reader: the atomic, then __threadfence, or an _acquire wrapper)", (unsigned)(a & 1023), at);
  return s;
}
static bool ordered(Block* b, uint64_t a, bool shared) {
  uint32_t seq = a >> 32, clk = a >> 13 & 0x7ffff, tid = a & 1023, mine = shared ? b->sseq : b->gseq;
  unsigned w = cur->warp, o = tid >> 5;
  if (seq == mine) {
    if (tid == w * 32 + cur->lane) return true;
    return o == w ? clk < b->wsync[w] : clk <= b->vc[w][o];
  }
  if (overlapping(seq)) return false;
  if (seq < E.l->first_seq) return true;
  const Known& k = E.f->known; if (!k) return false;
  auto it = k->find(seq); if (it == k->end()) return false;
  if (clk <= it->second.clk[o]) return true;
  auto t = it->second.thread.find(tid); return t != it->second.thread.end() && clk <= t->second;
}
inline uint64_t stamp_of(Block* b, bool shared, unsigned bytes, bool atomic) {
  return (uint64_t)(shared ? b->sseq : b->gseq) << 32 | (uint64_t)(clock_of(b, cur->warp) & 0x7ffff) << 13 | (uint64_t)atomic << 12 | bytes << 10 | (cur->warp * 32 + cur->lane);
}
uint64_t stamp(Block* b, bool shared, unsigned bytes, bool atomic) { return stamp_of(b, shared, bytes, atomic); }
static bool races(Block* b, uint64_t a, bool atomic, unsigned bytes, bool shared, const void* p) {
  if (!a || (shared && a >> 32 != b->sseq) || (atomic && (a >> 12 & 1)) || !((a >> 10 & 3) & bytes) || ordered(b, a, shared)) return false;
  // the counter of an arrive protocol may be reset by the block that saw it complete
  if (!shared && (a >> 12 & 1) && a >> 32 != b->gseq && !overlapping(a >> 32) && std::find(b->observed.begin(), b->observed.end(), p) != b->observed.end()) return false;
  return true;
}
extern "C" char __ehdr_start __attribute__((visibility("hidden"))); extern "C" char _end __attribute__((visibility("hidden")));
static void host_access(const void* p, bool write) {  // not device, not this block's shared memory
  if ((size_t)((char*)p - E.stacks) < E.stack_bytes) return;
  if ((char*)p >= &__ehdr_start && (char*)p < &_end) return;  // constants
  if ((uintptr_t)p < 65536) fail("null pointer %s", write ? "write" : "read");
  size_t args = (char*)p - (char*)E.l->s.args.data(); if (args < E.l->s.args.size() * 8) return;
  for (auto& r : E.pinned) if ((size_t)((char*)p - r.first) < r.second) return;
  fail("out-of-bounds %s of host memory, or of another block's shared memory, at %p", write ? "write" : "read", p);
}
void check(const void* p, unsigned n, bool write, bool atomic, bool async_issue) {
  Fiber* f = E.f; if (!f || E.failed) return;
  Block* b = f->b; size_t off = (const char*)p - dev; Cell* c; uint8_t* st; bool shared = false;
  E.accesses++;
  if (off < dev_size) { c = dev_cell + off / 2; st = dev_state + off / 2; }
  else if ((off = (const char*)p - b->sh) < SHARED_SLOT) { shared = true; c = b->scell + off / 2; st = b->sstate + off / 2; }
  else return host_access(p, write);
  const char* where = shared ? "shared" : "global"; const char* what = write ? "write" : "read";
  unsigned bytes = n == 1 ? 1u << ((uintptr_t)p & 1) : 3; uint64_t me = stamp_of(b, shared, bytes, atomic);
  uint64_t recent = (uint64_t)(shared ? b->sseq : E.other ? 0 : E.l->first_seq) << 32;  // older accesses are ordered, or another block's use of the memory
  for (unsigned i = 0; i < (n + 1) / 2; i++) {
    Cell& x = c[i];
    if (!write && x.r0 == me && st[i] == (ALLOC | INIT)) continue;  // read again: nothing new
    if (!(st[i] & ALLOC)) {
      if (shared) fail("out-of-bounds shared %s of %u bytes at offset %zu (dynamic part %zu bytes)", what, n, off >= SHARED_DYN ? off - SHARED_DYN : off, b->dyn_n);
      auto it = heap.upper_bound(off + i * 2); long near = -1, size = 0;
      if (it != heap.begin()) { --it; near = off - it->first; size = it->second; }
      fail("out-of-bounds global %s of %u bytes, %ld bytes into an allocation of %ld (or of freed memory)", what, n, near, size);
    }
    if (!E.check) continue;
    if (st[i] & ASYNC && !async_issue) fail("%s %s of memory with an asynchronous copy in flight (no wait)", where, what);
    if ((!write || atomic) && !(st[i] & INIT)) fail("read of uninitialised %s memory", where);
    if (x.w >= recent && races(b, x.w, atomic, bytes, shared, p)) fail("%s memory race: %s after unsynchronised write by %s", where, what, who(b, x.w, shared).c_str());
    if (write) {
      if (x.r0 >= recent && races(b, x.r0, atomic, bytes, shared, p)) fail("%s memory race: write after unsynchronised read by %s", where, who(b, x.r0, shared).c_str());
      if (x.r1 >= recent && races(b, x.r1, atomic, bytes, shared, p)) fail("%s memory race: write after unsynchronised read by %s", where, who(b, x.r1, shared).c_str());
      if (!async_issue) { st[i] |= INIT; x.w = me; x.r0 = x.r1 = 0; }
    } else if (x.r0 != me) { if ((x.r0 ^ me) & 1023) x.r1 = x.r0; x.r0 = me; }
  }
}
void check_plain(const void* p, unsigned n, bool write) { E.pc = __builtin_return_address(0); check(p, n, write); }
void set_state(const void* p, size_t n, uint8_t set, uint8_t clear) {
  uint8_t* s = E.f->b->sstate + ((const char*)p - E.f->b->sh) / 2;
  for (size_t i = 0; i < (n + 1) / 2; i++) s[i] = (s[i] & ~clear) | set;
}
void land_write(Block* b, const void* p, size_t n, uint64_t me) {
  size_t o = ((const char*)p - b->sh) / 2;
  for (size_t i = 0; i < n / 2; i++) { b->sstate[o + i] = (b->sstate[o + i] & ~ASYNC) | INIT; b->scell[o + i] = {me, 0, 0}; }
}
// --- fences and atomics: what passes between blocks
static void fence_as(bool acquire) {
  Fiber* f = E.f; Block* b = f->b; unsigned w = cur->warp;
  if (acquire) { f->known = join(f->known, f->pending); f->pending = nullptr; }  // what earlier atomic reads saw
  for (int o = 0; o < 32; o++) b->fvc[w][o] = std::max(b->fvc[w][o], o == (int)w ? b->wsync[w] - 1 : b->vc[w][o]);
  f->fence_clk = clock_of(b, w)++; f->fence_known = f->known;
}
void fence() { fence_as(true); }
void atomic_begin(const void* p, unsigned n, Order o, bool write, bool read) {
  E.pc = __builtin_return_address(0);
  if ((uintptr_t)p & (n - 1)) fail("misaligned atomic at %p", p);
  if (write && o & RELEASE) fence_as(false);
  check(p, n, write, true);
  if (write) E.spins = 0;
  if (!E.check || (size_t)((const char*)p - dev) >= dev_size) return;
  Fiber* f = E.f; Block* b = f->b; unsigned w = cur->warp;
  if (std::find(b->observed.begin(), b->observed.end(), p) == b->observed.end()) b->observed.push_back(p);
  Known& s = E.sync[p];
  if (read && s) { f->pending = join(f->pending, s); if (o & ACQUIRE) { f->known = join(f->known, s); } }
  if (write) {
    KnownSet mine; Know& k = mine[b->gseq]; memcpy(k.clk, b->fvc[w], sizeof k.clk);
    if (f->fence_clk) k.thread[w * 32 + cur->lane] = f->fence_clk;
    Known m = join(std::make_shared<const KnownSet>(mine), f->fence_known);
    s = read ? join(s, m) : m; clock_of(b, w)++;
  }
}
// --- device heap: addresses are handed out once, so that a use after free keeps being seen
void* dev_alloc(size_t n) {
  size_t need = (n + RED_ZONE + 511) & ~size_t(511), off = dev_top;
  if (off + need > dev_size) {
    auto it = holes.begin(); while (it != holes.end() && it->second < need) ++it;
    if (it == holes.end()) return nullptr;
    off = it->first; size_t rest = it->second - need; holes.erase(it); if (rest) holes[off + need] = rest;
  } else dev_top += need;
  heap[off] = n; if (n <= 1 << 20 || !E.check) memset(dev + off, 0xff, n);
  memset(dev_state + off / 2, ALLOC, (n + 1) / 2);  // 0xff: NaN in f32 and bf16; a large one stays untouched until used
  return dev + off;
}
bool dev_free(void* p) {
  size_t off = (char*)p - dev; auto it = heap.find(off); if (it == heap.end()) return false;
  size_t n = it->second, need = (n + RED_ZONE + 511) & ~size_t(511); heap.erase(it); holes[off] = need;
  memset(dev_state + off / 2, 0, (n + 1) / 2); memset((void*)(dev_cell + off / 2), 0, n < 65536 ? (n + 1) / 2 * sizeof(Cell) : 0);
  auto drop = [](void* a, size_t len) { uintptr_t lo = ((uintptr_t)a + 4095) & ~4095ul, hi = ((uintptr_t)a + len) & ~4095ul; if (hi > lo) madvise((void*)lo, hi - lo, MADV_DONTNEED); };
  if (n >= 65536) { drop(dev + off, n); Cell* c = dev_cell + off / 2; size_t len = (n + 1) / 2 * sizeof(Cell); drop(c, len);
    uintptr_t a = (uintptr_t)c, lo = (a + 4095) & ~4095ul, hi = (a + len) & ~4095ul; memset((void*)c, 0, lo - a); memset((void*)hi, 0, a + len - hi); }
  return true;
}
size_t dev_block(const void* p, size_t n, const char** why) {
  size_t off = (const char*)p - dev; auto it = heap.upper_bound(off);
  if (off >= dev_size || it == heap.begin()) { *why = "not device memory"; return 0; }
  --it; if (off + n > it->first + it->second) { *why = "past the end of the allocation, or freed"; return 0; }
  return it->second + (it->second == 0);
}
void dev_mark_init(void* p, size_t n) { memset(dev_state + ((char*)p - dev) / 2, ALLOC | INIT, (n + 1) / 2); }
bool dev_is_init(const void* p, size_t n) { const uint8_t* s = dev_state + ((const char*)p - dev) / 2; for (size_t i = 0; i < (n + 1) / 2; i++) if (!(s[i] & INIT)) return false; return true; }
static void* map(size_t n) { void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); return p == MAP_FAILED ? nullptr : p; }
void init_engine() {
  if (dev) return;
  for (dev_size = 256ull << 30; dev_size >= 1ull << 30; dev_size /= 2) {  // address space only; smaller under ulimit -v
    dev = (char*)map(dev_size); dev_state = (uint8_t*)map(dev_size / 2); dev_cell = (Cell*)map(dev_size / 2 * sizeof(Cell));
    if (dev && dev_state && dev_cell) break;
    if (dev) munmap(dev, dev_size);
    if (dev_state) munmap(dev_state, dev_size / 2);
    if (dev_cell) munmap(dev_cell, dev_size / 2 * sizeof(Cell));
    dev = nullptr;
  }
  if (!dev) { fprintf(stderr, "cuda-emulator: no address space for the device heap\n"); abort(); }
  if (const char* s = getenv("CUDA_EMULATOR_SCHEDULE")) {  // forward | reverse | random[:seed]
    E.policy = !strncmp(s, "reverse", 7) ? 1 : !strncmp(s, "random", 6) ? 2 : 0;
    if (s[0] == 'r' && strchr(s, ':')) E.rng ^= strtoull(strchr(s, ':') + 1, nullptr, 10) * 2654435761u;
  }
  if (const char* s = getenv("CUDA_EMULATOR_CHECK")) E.check = *s != '0';
}
}  // namespace emu
using namespace emu;
extern "C" {
// most calls are for the fiber's own stack: leave before anything else is looked at
static inline bool ours(const void* p) { return (size_t)((const char*)p - E.stacks) >= E.stack_bytes && !((const char*)p >= &__ehdr_start && (const char*)p < &_end); }
#define CB(name, n, w) void name(void* p) { if (ours(p)) { E.pc = __builtin_return_address(0); check(p, n, w); } }
CB(__tsan_read1, 1, 0) CB(__tsan_read2, 2, 0) CB(__tsan_read4, 4, 0) CB(__tsan_read8, 8, 0) CB(__tsan_read16, 16, 0)
CB(__tsan_write1, 1, 1) CB(__tsan_write2, 2, 1) CB(__tsan_write4, 4, 1) CB(__tsan_write8, 8, 1) CB(__tsan_write16, 16, 1)
CB(__tsan_unaligned_read2, 2, 0) CB(__tsan_unaligned_read4, 4, 0) CB(__tsan_unaligned_read8, 8, 0) CB(__tsan_unaligned_read16, 16, 0)
CB(__tsan_unaligned_write2, 2, 1) CB(__tsan_unaligned_write4, 4, 1) CB(__tsan_unaligned_write8, 8, 1) CB(__tsan_unaligned_write16, 16, 1)
void __tsan_read_range(void* p, size_t n) { if (ours(p)) { E.pc = __builtin_return_address(0); check(p, n, false); } }
void __tsan_write_range(void* p, size_t n) { if (ours(p)) { E.pc = __builtin_return_address(0); check(p, n, true); } }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
}
