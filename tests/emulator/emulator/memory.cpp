// memory.cpp - the driver API: allocation, page-locked memory, copies, memsets, the memory pool.
#include <algorithm>
#include <cstdlib>

#include "driver.h"

using namespace drv;

static std::map<Ptr, size_t> allocations;
static size_t used;
static bool on_device(Ptr p) { return (size_t)((char*)p - emu::dev) < emu::dev_size; }

// --- device memory
static int allocate(Ptr* p, size_t n) {
  if (!n) return INVALID_VALUE;
  if (used + n > device.memory) return OUT_OF_MEMORY;
  *p = (Ptr)emu::dev_alloc(n);
  if (!*p) return OUT_OF_MEMORY;
  allocations[*p] = n;
  used += n;
  return OK;
}
static int release(Ptr p) {
  auto it = allocations.find(p);
  if (it == allocations.end()) return refuse(INVALID_VALUE, "free of what is not an allocation (freed twice?)");
  used -= it->second;
  allocations.erase(it);
  emu::dev_free((void*)p);
  return OK;
}
API cuMemAlloc_v2(Ptr* p, size_t n) {
  LOCK;
  if (!current_context()) return INVALID_CONTEXT;
  if (int r = unsafe_call("cuMemAlloc")) return r;
  return allocate(p, n);
}
API cuMemFree_v2(Ptr p) {
  LOCK;
  if (!p) return OK;
  if (int r = unsafe_call("cuMemFree")) return r;
  int e = run_all(), r = release(p);
  return r ? r : e;
}
API cuMemAllocAsync(Ptr* p, size_t n, void* s) {
  LOCK;
  if (!current_context()) return INVALID_CONTEXT;
  auto st = stream_of(s);
  if (!st) return INVALID_HANDLE;
  if (st->cap) {
    return invalidate(*st->cap, CAPTURE_UNSUPPORTED,
                      "cuMemAllocAsync (a graph memory node, whose address is only valid during replay: refused here)");
  }
  if (used + n > device.memory) run_all();  // frees may be queued
  return allocate(p, n);
}
API cuMemAllocFromPoolAsync(Ptr* p, size_t n, void*, void* s) { return cuMemAllocAsync(p, n, s); }
API cuMemFreeAsync(Ptr p, void* s) {
  LOCK;
  if (!p) return OK;
  auto st = stream_of(s);
  if (!st) return INVALID_HANDLE;
  if (st->cap) return invalidate(*st->cap, CAPTURE_UNSUPPORTED, "cuMemFreeAsync of memory the graph did not allocate");
  if (!allocations.count(p)) return release(p);
  int e = enqueue(s, EMPTY, [p] { return release(p); });
  return e == INVALID_CONTEXT || e == INVALID_HANDLE ? e : OK;
}
API cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  LOCK;
  if (!current_context()) return INVALID_CONTEXT;
  *free_bytes = device.memory - used;
  *total = device.memory;
  return OK;
}

// --- the one memory pool: its attributes are kept, freed memory always goes back at once
static void* const POOL = (void*)0x10;
static uint64_t pool_attributes[16] = {0, 1, 1, 1};  // by CUmemPool_attribute; 1 to 3: reuse policies, on by default
API cuDeviceGetDefaultMemPool(void** p, int) {
  *p = POOL;
  return OK;
}
API cuDeviceGetMemPool(void** p, int) {
  *p = POOL;
  return OK;
}
API cuDeviceSetMemPool(int, void* p) { return p == POOL ? OK : INVALID_VALUE; }
static constexpr int REUSE_INTERNAL = 3, RELEASE_THRESHOLD = 4, RESERVED_NOW = 5, USED_HIGH = 8;
API cuMemPoolSetAttribute(void* pool, int a, const void* v) {
  LOCK;
  if (pool != POOL || a < 1 || a > USED_HIGH) return INVALID_VALUE;
  if (a == RELEASE_THRESHOLD) pool_attributes[a] = *(const uint64_t*)v;
  if (a <= REUSE_INTERNAL) pool_attributes[a] = *(const int*)v;
  return OK;
}
API cuMemPoolGetAttribute(void* pool, int a, void* v) {
  LOCK;
  if (pool != POOL || a < 1 || a > USED_HIGH) return INVALID_VALUE;
  if (a <= REUSE_INTERNAL) {
    *(int*)v = (int)pool_attributes[a];
  } else {
    *(uint64_t*)v = a >= RESERVED_NOW ? used : pool_attributes[a];
  }
  return OK;
}
API cuMemPoolTrimTo(void* pool, size_t) { return pool == POOL ? OK : INVALID_VALUE; }

// --- page-locked memory
static size_t locked, locked_most;  // bytes, what programs registered not counted
API cuda_emulator_page_locked(size_t* now, size_t* most) {
  LOCK;
  *now = locked;
  *most = locked_most;
  return OK;
}
static const emu::Pinned* pinned_at(const void* p) {
  for (auto& r : *emu::pinned) {
    if (r.p == p) return &r;
  }
  return nullptr;
}
static bool pinned(const void* p, size_t n) {
  for (auto& r : *emu::pinned) {
    if ((char*)p >= r.p && (char*)p + n <= r.p + r.n) return true;
  }
  return false;
}
static void pin(const emu::Pinned& r) {
  auto all = std::make_shared<std::vector<emu::Pinned>>(*emu::pinned);
  all->push_back(r);
  emu::pinned = all;
}
static void unpin(const void* p) {
  auto all = std::make_shared<std::vector<emu::Pinned>>(*emu::pinned);
  all->erase(std::find_if(all->begin(), all->end(), [p](auto& r) { return r.p == p; }));
  emu::pinned = all;
}
API cuMemHostAlloc(void** p, size_t n, u32) {
  LOCK;
  if (!current_context()) return INVALID_CONTEXT;
  if (int r = unsafe_call("cuMemHostAlloc")) return r;
  if (!n) return INVALID_VALUE;
  *p = aligned_alloc(4096, (n + 4095) / 4096 * 4096);
  if (!*p) return OUT_OF_MEMORY;
  pin({(char*)*p, n, false});
  locked_most = std::max(locked_most, locked += n);
  return OK;
}
API cuMemAllocHost_v2(void** p, size_t n) { return cuMemHostAlloc(p, n, 0); }
API cuMemFreeHost(void* p) {
  LOCK;
  int e = run_all();
  const emu::Pinned* r = pinned_at(p);
  if (!r || r->registered) return INVALID_VALUE;
  locked -= r->n;
  unpin(p);
  free(p);
  return e;
}
API cuMemHostRegister_v2(void* p, size_t n, u32) {
  LOCK;
  if (!current_context()) return INVALID_CONTEXT;
  if (!p || !n) return INVALID_VALUE;
  for (auto& r : *emu::pinned) {
    if ((char*)p < r.p + r.n && r.p < (char*)p + n) return HOST_MEMORY_ALREADY_REGISTERED;
  }
  pin({(char*)p, n, true});
  return OK;
}
API cuMemHostUnregister(void* p) {
  LOCK;
  int e = run_all();
  const emu::Pinned* r = pinned_at(p);
  if (!r || !r->registered) return HOST_MEMORY_NOT_REGISTERED;
  unpin(p);
  return e;
}
API cuMemHostGetDevicePointer_v2(Ptr* d, void* p, u32) {
  LOCK;
  *d = (Ptr)p;
  return pinned(p, 1) ? OK : INVALID_VALUE;
}

// --- copies and memsets
static int valid(const char* what, Ptr p, size_t n, int code = INVALID_VALUE) {
  const char* why = "";
  if (!n || pinned((void*)p, n) || emu::dev_block((void*)p, n, &why)) return OK;
  return refuse(code, std::string(what) + " of " + std::to_string(n) + " bytes: " + why);
}
static uint8_t* state_of(Ptr p) { return emu::dev_shadow.state + ((char*)p - emu::dev) / 2; }
static int copy(Ptr d, Ptr s, size_t n) {  // when it is carried out; either side may be host memory
  if (on_device(d)) {
    if (int r = valid("copy to the device", d, n, ILLEGAL_ADDRESS)) return r;
  }
  if (on_device(s)) {
    if (int r = valid("copy from the device", s, n, ILLEGAL_ADDRESS)) return r;
  }
  memmove((void*)d, (void*)s, n);
  if (!on_device(d)) return OK;
  if (!on_device(s) || (d | s) & 1) {
    emu::dev_mark_init((void*)d, n);
  } else {
    memmove(state_of(d), state_of(s), (n + 1) / 2);  // what was uninitialised stays so
  }
  return OK;
}
API cuMemcpyHtoDAsync_v2(Ptr d, const void* h, size_t n, void* s) {
  LOCK;
  if (!current_context()) return INVALID_CONTEXT;
  if (int r = valid("copy to the device", d, n)) return r;
  if (!n) return OK;
  auto st = stream_of(s);
  if (!st) return INVALID_HANDLE;
  // page-locked memory is read when the copy runs, as on a GPU; pageable memory before the call returns
  if (pinned(h, n) || st->cap) return enqueue(s, MEMCPY, [=] { return copy(d, (Ptr)h, n); });
  auto v = std::make_shared<std::vector<char>>((const char*)h, (const char*)h + n);
  return enqueue(s, MEMCPY, [=] { return copy(d, (Ptr)v->data(), n); });
}
API cuMemcpyDtoHAsync_v2(void* h, Ptr d, size_t n, void* s) {
  LOCK;
  if (!current_context()) return INVALID_CONTEXT;
  if (int r = valid("copy from the device", d, n)) return r;
  if (!n) return OK;
  auto st = stream_of(s);
  if (!st) return INVALID_HANDLE;
  int r = enqueue(s, MEMCPY, [=] { return copy((Ptr)h, d, n); });
  if (r || st->cap || pinned(h, n)) return r;
  return run_until(*st, st->issued);  // into pageable memory it returns only when done
}
API cuMemcpyDtoDAsync_v2(Ptr d, Ptr s, size_t n, void* st) {
  LOCK;
  if (int r = valid("copy", d, n)) return r;
  if (int r = valid("copy", s, n)) return r;
  return enqueue(st, MEMCPY, [=] { return copy(d, s, n); });
}
API cuMemcpyAsync(Ptr d, Ptr s, size_t n, void* st) {
  LOCK;
  if (!on_device(d)) return cuMemcpyDtoHAsync_v2((void*)d, s, n, st);
  return on_device(s) ? cuMemcpyDtoDAsync_v2(d, s, n, st) : cuMemcpyHtoDAsync_v2(d, (void*)s, n, st);
}
static int sync_copy(int r) { return r ? r : run_until(*null_stream, ~0ull); }
API cuMemcpyHtoD_v2(Ptr d, const void* h, size_t n) {
  LOCK;
  if (int r = unsafe_call("cuMemcpyHtoD")) return r;
  return sync_copy(cuMemcpyHtoDAsync_v2(d, h, n, nullptr));
}
API cuMemcpyDtoH_v2(void* h, Ptr d, size_t n) {
  LOCK;
  if (int r = unsafe_call("cuMemcpyDtoH")) return r;
  return sync_copy(cuMemcpyDtoHAsync_v2(h, d, n, nullptr));
}
API cuMemcpyDtoD_v2(Ptr d, Ptr s, size_t n) {
  LOCK;
  if (int r = unsafe_call("cuMemcpyDtoD")) return r;
  return cuMemcpyDtoDAsync_v2(d, s, n, nullptr);
}

template <class T> static int memset_async(Ptr d, T v, size_t n, void* s) {
  LOCK;
  if (int r = valid("memset", d, n * sizeof v)) return r;
  return enqueue(s, MEMSET, [=] {
    if (int r = valid("memset", d, n * sizeof v, ILLEGAL_ADDRESS)) return r;
    std::fill_n((T*)d, n, v);
    if (on_device(d)) emu::dev_mark_init((void*)d, n * sizeof v);
    return (int)OK;
  });
}
API cuMemsetD8Async(Ptr d, unsigned char v, size_t n, void* s) { return memset_async(d, v, n, s); }
API cuMemsetD32Async(Ptr d, u32 v, size_t n, void* s) { return memset_async(d, v, n, s); }
API cuMemsetD8_v2(Ptr d, unsigned char v, size_t n) {
  LOCK;
  if (int r = unsafe_call("cuMemsetD8")) return r;
  return memset_async(d, v, n, nullptr);
}
