// copies.cpp - asynchronous copies: cp.async, mbarrier, TMA and bulk copies. They finish as late as is allowed; until
// then their destination holds poison (values that show when they are used).
#include <algorithm>

#include "engine.h"

namespace emu {
bool in_shared(const void* p) { return (size_t)((const char*)p - E.f->b->sh) < SHARED_SLOT; }
uint32_t smem_addr(const void* p) {
  if (!in_shared(p)) fail("not a shared memory address: %p", p);
  return (uint32_t)((const char*)p - E.f->b->sh);
}
void* smem_ptr(uint32_t addr) {
  if (addr >= SHARED_SLOT) fail("not a shared memory address: %#x", addr);
  return E.f->b->sh + addr;
}
uint32_t swizzled(uint32_t a, int mode) { return a ^ ((a >> 7 & ((1 << mode) - 1)) << 4); }
static void poison(void* d, unsigned n) {  // until the copy lands
  check(d, n, true, false, true);
  memset(d, 0xff, n);
  if (settings.check) set_state(d, n, ASYNC, 0);
}

// --- cp.async: lands at the wait
void cp_async(void* d, const void* g, unsigned n, unsigned valid, Site s) {
  E.pc = __builtin_return_address(0);
  if (((uintptr_t)d | (uintptr_t)g) & (n - 1)) fail("misaligned cp.async at %s:%d", s.file, s.line);
  if (!in_shared(d)) fail("cp.async: destination is not shared at %s:%d", s.file, s.line);
  if (valid) check(g, valid, false);
  poison(d, n);
  E.f->async.copies.push_back({d, g, n, valid});
}
void cp_commit() { E.f->async.ends.push_back(E.f->async.copies.size()); }
void cp_wait(int keep) {
  Asyncs& q = E.f->async;
  E.pc = __builtin_return_address(0);
  for (; (long)(q.ends.size() - q.waited) > keep; q.waited++) {
    for (; q.done < q.ends[q.waited]; q.done++) {
      const Async& a = q.copies[q.done];
      set_state(a.dst, a.n, 0, ASYNC);
      check(a.dst, a.n, true);
      memset(a.dst, 0, a.n);
      memcpy(a.dst, a.src, a.valid);
    }
  }
  if (q.waited == q.ends.size() && !q.open()) q.clear();
}

// --- mbarrier
static MBar& mbar_of(uint64_t* p, const char* op) {
  auto& m = E.f->b->mbar;
  auto it = m.find(p);
  if (it == m.end()) fail("%s on an mbarrier that was not initialised", op);
  return it->second;
}
static void join(uint32_t* a, const uint32_t* b) {
  for (int i = 0; i < 32; i++) a[i] = std::max(a[i], b[i]);
}
void mbar_init(uint64_t* p, int n) {
  E.pc = __builtin_return_address(0);
  if ((uintptr_t)p & 7) fail("misaligned mbarrier");
  check(p, 8, true);
  MBar m;
  m.count = m.pending = n;
  E.f->b->mbar[p] = m;
}
static void try_complete(Block* b, uint64_t* p, MBar& m) {
  if (m.pending || m.tx) return;
  m.pending = m.count;
  m.phase++;
  memcpy(m.vc, m.next, sizeof m.vc);
  E.spins = 0;
  for (auto& f : b->f) {
    if (f.st == MBAR && f.mb == p) wake(f);
  }
}
void mbar_arrive(uint64_t* p, unsigned tx) {
  E.pc = __builtin_return_address(0);
  check(p, 8, false);  // a read: orders the use after mbar_init's barrier
  MBar& m = mbar_of(p, "arrive");
  Block* b = E.f->b;
  if (!m.pending) fail("mbarrier: more arrivals than its count %d", m.count);
  join(m.next, b->vc[now.thread->warp]);
  clock_of(b, now.thread->warp)++;
  m.tx += tx;
  m.pending--;
  try_complete(b, p, m);
}
void mbar_wait(uint64_t* p, unsigned parity, Site s) {
  E.pc = __builtin_return_address(0);
  check(p, 8, false);
  MBar& m = mbar_of(p, "wait");
  while ((m.phase & 1) == parity) {
    E.f->mb = p;
    wait(MBAR, s, "mbarrier");
  }
  Block* b = E.f->b;
  unsigned w = now.thread->warp;
  join(b->vc[w], m.vc);
  b->wsync[w] = std::max(b->wsync[w], m.vc[w] + 1);
}

// --- TMA and bulk copies: land when nothing else in the block can run
static void issue(void* d, unsigned bytes, uint64_t* mb, Bulk t) {
  Block* b = E.f->b;
  MBar& m = mbar_of(mb, "bulk copy");
  poison(d, bytes);
  t.stamp = stamp(b, true, 3, false);
  join(m.next, b->vc[now.thread->warp]);
  clock_of(b, now.thread->warp)++;
  t.dst = (char*)d;
  t.bytes = bytes;
  t.mb = mb;
  b->bulk.push_back(t);
}
void tma_load_2d(void* d, const TensorMap* map, uint64_t* mb, int x, int y) {
  E.pc = __builtin_return_address(0);
  Bulk t{};
  memcpy(&t.m, map, sizeof t.m);
  if (t.m.magic != TENSOR_MAP_MAGIC) fail("TMA: not a tensor map");
  unsigned align = 128u << t.m.swizzle, offset = smem_addr(d);
  if (offset % align) fail("misaligned TMA destination: offset %u, needs %u for its swizzle", offset, align);
  t.tensor = true;
  t.x = x;
  t.y = y;
  issue(d, t.m.bx * t.m.by * t.m.elem, mb, t);
}
void bulk_load(void* d, const void* g, unsigned bytes, uint64_t* mb) {
  E.pc = __builtin_return_address(0);
  if (((uintptr_t)d | (uintptr_t)g | bytes) & 15) {
    fail("misaligned cp.async.bulk: addresses and size must be multiples of 16");
  }
  smem_addr(d);
  check(g, bytes, false);
  Bulk t{};
  t.src = (const char*)g;
  issue(d, bytes, mb, t);
}
static void copy_box(Block* b, const Bulk& t) {  // what lies outside the tensor becomes zero
  const TensorMap& m = t.m;
  uint32_t base = t.dst - b->sh;
  for (unsigned r = 0; r < m.by; r++) {
    for (unsigned c = 0; c < m.bx; c++) {
      long gx = t.x + (long)c, gy = t.y + (long)r;
      char* to = b->sh + swizzled(base + (r * m.bx + c) * m.elem, m.swizzle);
      if (gx >= 0 && gx < m.w && gy >= 0 && gy < m.h) {
        memcpy(to, (const char*)m.base + gy * m.stride + gx * m.elem, m.elem);
      } else {
        memset(to, 0, m.elem);
      }
    }
  }
}
bool land(Block* b) {
  if (b->bulk.empty()) return false;
  Bulk t = b->bulk.front();
  b->bulk.erase(b->bulk.begin());
  if (t.tensor) {
    copy_box(b, t);
  } else {
    memcpy(t.dst, t.src, t.bytes);
  }
  land_write(b, t.dst, t.bytes, t.stamp);
  MBar& m = b->mbar[t.mb];
  m.tx -= t.bytes;
  try_complete(b, t.mb, m);
  return true;
}
}  // namespace emu
