// checker.cpp - bounds, initialisation and race checks (FastTrack vector clocks at warp granularity), and the callbacks
// of -fsanitize=thread. libtsan itself is never linked: the compiler only inserts the calls.
#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdlib>

#include "engine.h"

namespace emu {
Known join(const Known& a, const Known& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto r = std::make_shared<KnownSet>(*a);
  for (auto& e : *b) {
    Know& k = (*r)[e.first];
    for (int i = 0; i < 32; i++) k.clk[i] = std::max(k.clk[i], e.second.clk[i]);
    for (auto& t : e.second.thread) {
      uint32_t& c = k.thread[t.first];
      c = std::max(c, t.second);
    }
  }
  return r;
}
// --- faults
static std::string fault_at_pc() {  // " at file:line" of the access
  Dl_info di;
  std::string r;
  if (!E.pc || !dladdr(E.pc, &di)) return r;
  char cmd[600], l[400];
  snprintf(cmd, sizeof cmd, "addr2line -i -e '%s' 0x%zx 2>/dev/null", di.dli_fname,
           (size_t)((char*)E.pc - 1 - (char*)di.dli_fbase));
  if (FILE* p = popen(cmd, "r")) {
    while (fgets(l, sizeof l, p)) {  // innermost frame first: take the first that is not a wrapper
      l[strcspn(l, " \n")] = 0;
      if (l[0] == '?') break;
      r = std::string(" at ") + l;
      if (!strstr(l, "/include/emulated_") && !strstr(l, "device.cuh")) break;
    }
    pclose(p);
  }
  return r;
}
void fail(const char* fmt, ...) {
  char buf[1024];
  va_list v;
  va_start(v, fmt);
  vsnprintf(buf, sizeof buf, fmt, v);
  va_end(v);
  if (!E.f) {
    fprintf(stderr, "cuda-emulator: %s\n", buf);
    abort();
  }
  char where[256];
  const uint3& t = now.thread->tid;
  snprintf(where, sizeof where, " [%s block (%u,%u,%u) thread (%u,%u,%u)]", E.l->s.k->name, now.block.x, now.block.y,
           now.block.z, t.x, t.y, t.z);
  E.l->err = std::string(buf) + where + (E.at ? ptx::where(*E.at) : fault_at_pc());
  E.failed = true;
  E.l->code = !strncmp(buf, "out-of-bounds", 13) || !strncmp(buf, "null", 4) ? 700
              : !strncmp(buf, "misaligned", 10)                              ? 716
                                                                             : 719;
  if (E.at) throw Fault();
  to_sched();
  abort();
}
// --- ordering
static bool overlapping(uint32_t seq) { return E.other && E.other->has(seq); }
void here() { E.pc = __builtin_return_address(0); }
static std::string who(Block* b, uint64_t a, bool shared) {
  uint32_t seq = a >> 32;
  std::string thread = "thread " + std::to_string(a & 1023) + (a >> 12 & 1 ? " (atomic)" : "");
  if (seq == (shared ? b->sseq : b->gseq)) return thread;
  if (overlapping(seq)) {
    return thread + " of " + E.other->s.k->name +
           ", which overlaps by programmatic dependent launch: griddepcontrol.wait must come first";
  }
  return thread +
         " of another block (release by the writer: __threadfence before the atomic, or a _release wrapper; acquire by "
         "the reader: the atomic, then __threadfence, or an _acquire wrapper)";
}
static bool ordered(Block* b, uint64_t a, bool shared) {
  uint32_t seq = a >> 32, clk = a >> 13 & 0x7ffff, tid = a & 1023, mine = shared ? b->sseq : b->gseq;
  unsigned w = now.thread->warp, o = tid >> 5;
  if (seq == mine) {
    if (tid == w * 32 + now.thread->lane) return true;
    return o == w ? clk < b->wsync[w] : clk <= b->vc[w][o];
  }
  if (overlapping(seq)) return false;
  if (seq < E.l->first_seq) return true;
  const Known& k = E.f->known;
  if (!k) return false;
  auto it = k->find(seq);
  if (it == k->end()) return false;
  if (clk <= it->second.clk[o]) return true;
  auto t = it->second.thread.find(tid);
  return t != it->second.thread.end() && clk <= t->second;
}
static inline uint64_t stamp_of(Block* b, bool shared, unsigned bytes, bool atomic) {
  return (uint64_t)(shared ? b->sseq : b->gseq) << 32 | (uint64_t)(clock_of(b, now.thread->warp) & 0x7ffff) << 13 |
         (uint64_t)atomic << 12 | bytes << 10 | (now.thread->warp * 32 + now.thread->lane);
}
uint64_t stamp(Block* b, bool shared, unsigned bytes, bool atomic) { return stamp_of(b, shared, bytes, atomic); }
static bool races(Block* b, uint64_t a, bool atomic, unsigned bytes, bool shared, const void* p) {
  uint32_t seq = a >> 32, was_bytes = a >> 10 & 3;
  bool was_atomic = a >> 12 & 1, same_block = seq == (shared ? b->sseq : b->gseq);
  bool in_scope = same_block || (bytes && was_bytes);  // of each other: PTX ISA, "Morally strong operations"
  if (!a || (shared && !same_block) || (atomic && was_atomic && in_scope)) return false;
  if (bytes && was_bytes && !(bytes & was_bytes)) return false;
  if (ordered(b, a, shared)) return false;
  // the counter of an arrive protocol may be reset by the block that saw it complete
  bool foreign_counter = !shared && was_atomic && seq != b->gseq && !overlapping(seq);
  return !foreign_counter || std::find(b->observed.begin(), b->observed.end(), p) == b->observed.end();
}
extern "C" char __ehdr_start __attribute__((visibility("hidden")));
extern "C" char _end __attribute__((visibility("hidden")));
static void host_access(const void* p, unsigned n, bool write) {  // not device, not this block's shared memory
  auto within = [&](const void* begin, size_t size) {
    size_t at = (const char*)p - (const char*)begin;
    return at < size && n <= size - at;
  };
  if (within(E.stacks, E.stack_bytes)) return;                         // of compiled code, place() has looked closer
  if (!E.at && (char*)p >= &__ehdr_start && (char*)p < &_end) return;  // constants
  if ((uintptr_t)p < 65536) fail("null pointer %s", write ? "write" : "read");
  if (within(E.l->s.args.data(), E.l->s.args.size() * 8)) {
    if (!write || !E.at) return;
    fail("out-of-bounds write: parameters are only read");
  }
  for (auto& r : *E.l->host)
    if (within(r.p, r.n)) return;
  fail("out-of-bounds %s of host memory, or of another block's shared memory, at %p", write ? "write" : "read", p);
}
[[noreturn]] static void out_of_bounds(Block* b, bool shared, size_t off, unsigned n, size_t at, const char* what) {
  if (shared) {
    size_t offset = off >= SHARED_DYN ? off - SHARED_DYN : off;
    fail("out-of-bounds shared %s of %u bytes at offset %zu (dynamic part %zu bytes)", what, n, offset, b->dyn_n);
  }
  long distance, size;
  dev_near(off + at, distance, size);
  fail("out-of-bounds global %s of %u bytes, %ld bytes into an allocation of %ld (or of freed memory)", what, n,
       distance, size);
}
struct Access {  // one access, as far as it does not depend on the address
  Block* b;
  const void* p;
  uint64_t me, recent;
  unsigned bytes;
  bool write, atomic, shared, async_issue;
  const char *where, *what;
};
static inline void race(const Access& a, uint64_t before, const char* after) {
  if (before < a.recent || !races(a.b, before, a.atomic, a.bytes, a.shared, a.p)) return;
  fail("%s memory race: %s after unsynchronised %s by %s", a.where, a.what, after, who(a.b, before, a.shared).c_str());
}
static inline void update(const Access& a, Cell& x) {
  if (!a.write && x.r0 == a.me) return;  // read again: nothing new
  race(a, x.w, "write");
  if (!a.write) {
    if ((x.r0 ^ a.me) & 1023) x.r1 = x.r0;
    x.r0 = a.me;
    return;
  }
  race(a, x.r0, "read");
  race(a, x.r1, "read");
  if (!a.async_issue) x = {a.me, 0, 0};
}
static void refine(const Cell& coarse, Cell* fine, Grain& g, Grain to) {  // so that parts of 16 bytes may differ
  for (int i = 0; i < 8; i++) fine[i] = g == G16 ? coarse : fine[i & ~1];
  g = to;
}
// Bounds, initialisation, copies in flight.
static void check_state(const Access& a, uint8_t* st, size_t off, unsigned bytes) {
  bool reads = !a.write || a.atomic;
  for (unsigned i = 0; i < (bytes + 1) / 2; i++) {
    if (!(st[i] & ALLOC)) out_of_bounds(a.b, a.shared, off, bytes, i * 2, a.what);
    if (!settings.check) continue;
    if (st[i] & ASYNC && !a.async_issue) {
      fail("%s %s of memory with an asynchronous copy in flight (no wait)", a.where, a.what);
    }
    if (reads && !(st[i] & INIT)) fail("read of uninitialised %s memory", a.where);
  }
}
template <class T> static inline bool all_plain(const uint8_t* st) {
  T states;
  memcpy(&states, st, sizeof states);
  return states == (T)0x0303030303030303ull;  // ALLOC | INIT
}
static inline bool is_plain(const uint8_t* st, unsigned bytes) {  // allocated, initialised, nothing in flight
  switch (bytes) {
    case 16: return all_plain<uint64_t>(st);
    case 8: return all_plain<uint32_t>(st);
    case 4: return all_plain<uint16_t>(st);
    case 2:
    case 1: return all_plain<uint8_t>(st);
    default: return false;
  }
}
void check(const void* p, unsigned n, bool write, bool atomic, bool async_issue, bool in_block) {
  Fiber* f = E.f;
  if (!f || E.failed) return;
  Block* b = f->b;
  size_t off = (const char*)p - dev;
  bool shared = off >= dev_size;
  if (shared && (off = (const char*)p - b->sh) >= SHARED_SLOT) return host_access(p, n, write);
  unsigned bytes = in_block ? 0 : n == 1 ? 1u << ((uintptr_t)p & 1) : 3;
  // older accesses are ordered, or are another block's use of the memory
  uint64_t recent = (uint64_t)(shared ? b->sseq : E.other ? 0 : E.l->first_seq) << 32;
  Access a{b,
           p,
           stamp_of(b, shared, bytes, atomic),
           recent,
           bytes,
           write,
           atomic,
           shared,
           async_issue,
           shared ? "shared" : "global",
           write ? "write" : "read"};
  const Shadow& shadow = shared ? b->shadow : dev_shadow;
  uint8_t* st = shadow.state + off / 2;
  bool plain = is_plain(st, n);
  if (!plain) check_state(a, st, off, n);
  if (!settings.check) return;

  size_t first = off / 2, end = first + (n + 1) / 2;
  for (size_t at = first; at < end;) {  // 16 bytes at a time
    size_t base = at & ~size_t(7), stop = std::min(end, base + 8);
    Cell &coarse = shadow.coarse[base / 8], *fine = shadow.fine + base;
    Grain &g = shadow.grain[base / 8], mine = stop - at == 8 ? G16 : (at | stop) & 1 ? G2 : G4;
    if (mine > g) refine(coarse, fine, g, mine);
    if (g == G16) {
      update(a, coarse);
    } else {
      for (size_t i = at - base; i < stop - base; i += g == G4 ? 2 : 1) update(a, fine[i]);
      if (write && mine == G16 && !async_issue) {
        g = G16;
        coarse = {a.me, 0, 0};
      }
    }
    at = stop;
  }
  if (write && !async_issue && !plain) {
    for (size_t i = 0; i < end - first; i++) st[i] |= INIT;
  }
}
void check_plain(const void* p, unsigned n, bool write) {
  E.pc = __builtin_return_address(0);
  check(p, n, write);
}
void set_state(const void* p, size_t n, uint8_t set, uint8_t clear) {
  uint8_t* s = E.f->b->shadow.state + ((const char*)p - E.f->b->sh) / 2;
  for (size_t i = 0; i < (n + 1) / 2; i++) s[i] = (s[i] & ~clear) | set;
}
void land_write(Block* b, const void* p, size_t n, uint64_t me) {
  Shadow s = b->shadow.at((const char*)p - b->sh);  // both multiples of 16
  for (size_t i = 0; i < n / 2; i++) s.state[i] = (s.state[i] & ~ASYNC) | INIT;
  for (size_t i = 0; i < n / 16; i++) {
    s.grain[i] = G16;
    s.coarse[i] = {me, 0, 0};
  }
}
// --- fences and atomics: what passes between blocks
static void fence_as(bool acquire) {
  Fiber* f = E.f;
  Block* b = f->b;
  unsigned w = now.thread->warp;
  if (acquire) {  // what earlier atomic reads saw
    f->known = join(f->known, f->pending);
    f->pending = nullptr;
  }
  for (int o = 0; o < 32; o++) b->fvc[w][o] = std::max(b->fvc[w][o], o == (int)w ? b->wsync[w] - 1 : b->vc[w][o]);
  f->fence_clk = clock_of(b, w)++;
  f->fence_known = f->known;
}
void fence() { fence_as(true); }
void atomic_begin(const void* p, unsigned n, Order o, bool write, bool read, bool in_block) {
  E.pc = __builtin_return_address(0);
  if ((uintptr_t)p & (n - 1)) fail("misaligned atomic at %p", p);
  if (write && o & RELEASE && !in_block) fence_as(false);
  check(p, n, write, true, false, in_block);
  if (write) E.spins = 0;
  if (in_block || !settings.check || (size_t)((const char*)p - dev) >= dev_size) return;
  Fiber* f = E.f;
  Block* b = f->b;
  unsigned w = now.thread->warp;
  if (std::find(b->observed.begin(), b->observed.end(), p) == b->observed.end()) b->observed.push_back(p);
  Known& s = (*E.l->released)[p];
  if (read && s) {
    f->pending = join(f->pending, s);
    if (o & ACQUIRE) f->known = join(f->known, s);
  }
  if (write) {
    KnownSet mine;
    Know& k = mine[b->gseq];
    memcpy(k.clk, b->fvc[w], sizeof k.clk);
    if (f->fence_clk) k.thread[w * 32 + now.thread->lane] = f->fence_clk;
    Known m = join(std::make_shared<const KnownSet>(mine), f->fence_known);
    s = read ? join(s, m) : m;
    clock_of(b, w)++;
  }
}
}  // namespace emu
using namespace emu;
extern "C" {
// most calls are for the fiber's own stack: leave before anything else is looked at
static inline bool ours(const void* p) {
  bool stack = (size_t)((const char*)p - E.stacks) < E.stack_bytes;
  bool now = (size_t)((const char*)p - (const char*)&emu::now) < sizeof(Now);
  return !stack && !now && !((const char*)p >= &__ehdr_start && (const char*)p < &_end);
}
#define CALLBACK(name, n, write)        \
  void name(void* p) {                  \
    if (!ours(p)) return;               \
    E.pc = __builtin_return_address(0); \
    check(p, n, write);                 \
  }
#define CALLBACKS(n)                           \
  CALLBACK(__tsan_read##n, n, false)           \
  CALLBACK(__tsan_write##n, n, true)           \
  CALLBACK(__tsan_unaligned_read##n, n, false) \
  CALLBACK(__tsan_unaligned_write##n, n, true)
CALLBACKS(1)
CALLBACKS(2)
CALLBACKS(4)
CALLBACKS(8)
CALLBACKS(16)
void __tsan_read_range(void* p, size_t n) {
  if (!ours(p)) return;
  E.pc = __builtin_return_address(0);
  check(p, n, false);
}
void __tsan_write_range(void* p, size_t n) {
  if (!ours(p)) return;
  E.pc = __builtin_return_address(0);
  check(p, n, true);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
}
