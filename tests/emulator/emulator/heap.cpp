// heap.cpp - the device heap with its shadow memory, and the engine's settings.
#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <sstream>

#include "engine.h"

namespace emu {
Settings settings;
char* dev;
size_t dev_size;
Shadow dev_shadow;
PinnedList pinned = std::make_shared<const std::vector<Pinned>>();

// Offset to size. Addresses are handed out once, so that a use after free keeps being seen; holes are reused only when
// fresh addresses run out.
static std::map<size_t, size_t> heap, holes;
static size_t top = 1 << 20;
static std::mutex mutex;  // of these three: a kernel that ends by a fault asks for the allocation next to it

constexpr size_t PAGE = 4096, LARGE = 64 << 10;
static size_t footprint(size_t n) { return (n + RED_ZONE + 511) & ~size_t(511); }

// --- shadow memory
void* reserve_pages(size_t n) {
  void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
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
bool Shadow::reserve(size_t bytes) {
  state = (uint8_t*)reserve_pages(bytes / 2);
  grain = (Grain*)reserve_pages(bytes / 16);
  coarse = (Cell*)reserve_pages(bytes / 16 * sizeof(Cell));
  fine = (Cell*)reserve_pages(bytes / 2 * sizeof(Cell));
  if (state && grain && coarse && fine) return true;
  release(bytes);
  return false;
}
void Shadow::release(size_t bytes) {
  if (state) munmap(state, bytes / 2);
  if (grain) munmap(grain, bytes / 16);
  if (coarse) munmap(coarse, bytes / 16 * sizeof(Cell));
  if (fine) munmap(fine, bytes / 2 * sizeof(Cell));
  *this = {};
}
void Shadow::clear(size_t offset, size_t n) {
  Shadow s = at(offset);
  zero(s.state, (n + 1) / 2);
  zero(s.grain, (n + 15) / 16);
  zero(s.coarse, (n + 15) / 16 * sizeof(Cell));
  // the fine cells are written before they are used
  if (n >= LARGE) zero(s.fine, (n + 1) / 2 * sizeof(Cell));
}

// --- allocations
void* dev_alloc(size_t n) {
  std::lock_guard lock(mutex);
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
  if (n <= 1 << 20 || !settings.check) memset(dev + off, 0xff, n);
  memset(dev_shadow.state + off / 2, ALLOC, (n + 1) / 2);
  return dev + off;
}
bool dev_free(void* p) {
  std::lock_guard lock(mutex);
  size_t off = (char*)p - dev;
  auto it = heap.find(off);
  if (it == heap.end()) return false;
  size_t n = it->second;
  heap.erase(it);
  holes[off] = footprint(n);
  dev_shadow.clear(off, n);
  if (n >= LARGE) zero(dev + off, n);
  return true;
}
size_t dev_block(const void* p, size_t n, const char** why) {
  std::lock_guard lock(mutex);
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
  std::lock_guard lock(mutex);
  auto it = heap.upper_bound(offset);
  distance = -1;
  size = 0;
  if (it == heap.begin()) return;
  --it;
  distance = offset - it->first;
  size = it->second;
}
void dev_mark_init(void* p, size_t n) { memset(dev_shadow.state + ((char*)p - dev) / 2, ALLOC | INIT, (n + 1) / 2); }
bool dev_is_init(const void* p, size_t n) {
  const uint8_t* s = dev_shadow.state + ((const char*)p - dev) / 2;
  for (size_t i = 0; i < (n + 1) / 2; i++) {
    if (!(s[i] & INIT)) return false;
  }
  return true;
}

void init_engine() {
  if (dev) return;
  for (dev_size = 256ull << 30; dev_size >= 1ull << 30; dev_size /= 2) {  // address space only; less under ulimit -v
    dev = (char*)reserve_pages(dev_size);
    if (dev && dev_shadow.reserve(dev_size)) break;
    if (dev) munmap(dev, dev_size);
    dev = nullptr;
  }
  if (!dev) {
    fprintf(stderr, "cuda-emulator: no address space for the device heap\n");
    abort();
  }
  if (const char* s = getenv("CUDA_EMULATOR_SCHEDULE")) {  // forward | reverse | random[:seed]
    settings.policy = !strncmp(s, "reverse", 7) ? REVERSE : !strncmp(s, "random", 6) ? RANDOM : FORWARD;
    if (settings.policy == RANDOM && strchr(s, ':'))
      settings.seed ^= strtoull(strchr(s, ':') + 1, nullptr, 10) * 2654435761u;
  }
  if (const char* s = getenv("CUDA_EMULATOR_PTX")) {  // directories, separated by colons
    std::string list = s, directory;
    for (std::stringstream in(list); std::getline(in, directory, ':');) ptx::add_directory(directory);
  }
  if (const char* s = getenv("CUDA_EMULATOR_CHECK")) settings.check = *s != '0';
  if (const char* s = getenv("CUDA_EMULATOR_STEPS")) settings.most_steps = strtoull(s, nullptr, 10);
}
}  // namespace emu
