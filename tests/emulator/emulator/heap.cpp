// heap.cpp - the device heap with its shadow memory, and the engine's settings.
#include <sys/mman.h>

#include <cstdlib>

#include "engine.h"

namespace emu {
char* dev;
uint8_t* dev_state;
Cell* dev_cell;
size_t dev_size;

// Offset to size. Addresses are handed out once, so that a use after free keeps being seen; holes are reused only when
// fresh addresses run out.
static std::map<size_t, size_t> heap, holes;
static size_t top = 1 << 20;

constexpr size_t PAGE = 4096, LARGE = 64 << 10;
static size_t footprint(size_t n) { return (n + RED_ZONE + 511) & ~size_t(511); }

void* dev_alloc(size_t n) {
  size_t need = footprint(n), off = top;
  if (off + need <= dev_size) {
    top += need;
  } else {
    auto it = holes.begin();
    while (it != holes.end() && it->second < need) ++it;
    if (it == holes.end()) return nullptr;
    off = it->first;
    size_t rest = it->second - need;
    holes.erase(it);
    if (rest) holes[off + need] = rest;
  }
  heap[off] = n;
  // 0xff is NaN in f32 and bf16; a large allocation stays untouched until it is used
  if (n <= 1 << 20 || !E.check) memset(dev + off, 0xff, n);
  memset(dev_state + off / 2, ALLOC, (n + 1) / 2);
  return dev + off;
}
static void zero(void* p, size_t n) {  // whole pages go back to the system
  uintptr_t a = (uintptr_t)p, lo = (a + PAGE - 1) & ~(PAGE - 1), hi = (a + n) & ~(PAGE - 1);
  if (n < LARGE) {
    memset(p, 0, n);
    return;
  }
  madvise((void*)lo, hi - lo, MADV_DONTNEED);
  memset(p, 0, lo - a);
  memset((void*)hi, 0, a + n - hi);
}
bool dev_free(void* p) {
  size_t off = (char*)p - dev;
  auto it = heap.find(off);
  if (it == heap.end()) return false;
  size_t n = it->second;
  heap.erase(it);
  holes[off] = footprint(n);
  memset(dev_state + off / 2, 0, (n + 1) / 2);
  zero(dev_cell + off / 2, (n + 1) / 2 * sizeof(Cell));
  if (n >= LARGE) zero(dev + off, n);
  return true;
}
size_t dev_block(const void* p, size_t n, const char** why) {
  size_t off = (const char*)p - dev;
  auto it = heap.upper_bound(off);
  if (off >= dev_size || it == heap.begin()) {
    *why = "not device memory";
    return 0;
  }
  --it;
  if (off + n > it->first + it->second) {
    *why = "past the end of the allocation, or freed";
    return 0;
  }
  return it->second + (it->second == 0);
}
void dev_near(size_t offset, long& distance, long& size) {
  auto it = heap.upper_bound(offset);
  distance = -1;
  size = 0;
  if (it == heap.begin()) return;
  --it;
  distance = offset - it->first;
  size = it->second;
}
void dev_mark_init(void* p, size_t n) { memset(dev_state + ((char*)p - dev) / 2, ALLOC | INIT, (n + 1) / 2); }
bool dev_is_init(const void* p, size_t n) {
  const uint8_t* s = dev_state + ((const char*)p - dev) / 2;
  for (size_t i = 0; i < (n + 1) / 2; i++) {
    if (!(s[i] & INIT)) return false;
  }
  return true;
}

static void* map(size_t n) {
  void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}
void init_engine() {
  if (dev) return;
  for (dev_size = 256ull << 30; dev_size >= 1ull << 30; dev_size /= 2) {  // address space only; less under ulimit -v
    dev = (char*)map(dev_size);
    dev_state = (uint8_t*)map(dev_size / 2);
    dev_cell = (Cell*)map(dev_size / 2 * sizeof(Cell));
    if (dev && dev_state && dev_cell) break;
    if (dev) munmap(dev, dev_size);
    if (dev_state) munmap(dev_state, dev_size / 2);
    if (dev_cell) munmap(dev_cell, dev_size / 2 * sizeof(Cell));
    dev = nullptr;
  }
  if (!dev) {
    fprintf(stderr, "cuda-emulator: no address space for the device heap\n");
    abort();
  }
  if (const char* s = getenv("CUDA_EMULATOR_SCHEDULE")) {  // forward | reverse | random[:seed]
    E.policy = !strncmp(s, "reverse", 7) ? REVERSE : !strncmp(s, "random", 6) ? RANDOM : FORWARD;
    if (E.policy == RANDOM && strchr(s, ':')) E.rng ^= strtoull(strchr(s, ':') + 1, nullptr, 10) * 2654435761u;
  }
  if (const char* s = getenv("CUDA_EMULATOR_CHECK")) E.check = *s != '0';
}
}  // namespace emu
