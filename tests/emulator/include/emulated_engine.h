// emulated_engine.h - the basis of the device language: the emulator's interface to the code compiled from kernels.
// Every CUDA thread is a fiber; at every warp operation its lanes meet (emulator/fiber.cpp).
#pragma once
#include <cstdio>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulated_types.h"

#define EMU_PLAIN __attribute__((no_sanitize("thread")))  // code of the emulation: its accesses are not the kernel's
#define EMU_INLINE __attribute__((always_inline)) inline  // so that a report names the kernel's line
#define EMU_SITE const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()  // default arguments: the caller's
#define EMU_AT {file_, line_}

// What cuTensorMapEncodeTiled writes into the 128 opaque bytes here.
constexpr uint32_t TENSOR_MAP_MAGIC = 0x54454e53;
struct alignas(64) TensorMap {
  uint32_t magic, swizzle, elem, w, h, bx, by, pad0;
  uint64_t base, stride;
  uint32_t pad[20];
};
static_assert(sizeof(TensorMap) == 128, "as large as CUtensorMap");

namespace ptx {
struct Entry;
}
namespace emu {
struct Thread {
  uint3 tid;
  unsigned lane, warp;
};
// Of the kernel that this thread of the host runs: other threads run other streams' at the same time.
struct Now {
  Thread* thread;
  uint3 block;
  dim3 block_dim, grid_dim;
};
extern __thread Now now;

struct Site {
  const char* file;
  int line;
};
enum Order { RELAXED = 0, ACQUIRE = 1, RELEASE = 2, ACQ_REL = 3 };

// Ends the kernel with a fault; the text's first words decide the CUDA error.
[[noreturn]] void fail(const char* fmt, ...) __attribute__((format(printf, 1, 2)));
// The next fail() is at the caller's line.
void here();

// --- barriers
void bar_sync(int id, int n_threads, Site s);
void bar_arrive(int id, int n_threads, Site s);
enum Reduction { COUNT, OR, AND };
int bar_reduce(int value, Reduction how, Site s);
void grid_sync(Site s);
void pdl_wait(Site s);

// A rendezvous of the lanes in mask; the last to arrive runs fn(mask, args[32]) for all of them.
void warp_op(const char* op, unsigned mask, Site s, void (*fn)(unsigned, void* const*), void* arg,
             bool orders_memory = false);

// --- memory
void* dyn_shared();
void* static_shared(const void* key, size_t bytes, size_t align, const char* name);
void check_plain(const void* p, unsigned n, bool write);  // for an access that copy() then makes
// Likewise, and orders it; in_block: for threads of the block only.
void atomic_begin(const void* p, unsigned n, Order o, bool write, bool read, bool in_block = false);
void copy(void* d, const void* s, unsigned n);  // uninstrumented
void fence();
uint64_t timer();  // 32 more at each reading: a clock that never stands still, the same in every run
unsigned block_id();
unsigned sm_id();  // blocks go to the multiprocessors in turn
void spin();       // a poll that may have failed: lets others run
void yield();

// --- instructions (emulator/tensor.cpp, emulator/copies.cpp)
void mma(float* d, const uint32_t* a, const uint32_t* b, Site s);
void ldmatrix(uint32_t* r, const void* p, int n, bool trans, Site s);
void cp_async(void* s, const void* g, unsigned bytes, unsigned valid, Site site);
void cp_commit();
void cp_wait(int keep);
void mbar_init(uint64_t* p, int n);
void mbar_arrive(uint64_t* p, unsigned tx);
void mbar_wait(uint64_t* p, unsigned parity, Site s);
void tma_load_2d(void* d, const TensorMap* m, uint64_t* mb, int x, int y);
void bulk_load(void* d, const void* g, unsigned bytes, uint64_t* mb);
uint32_t smem_addr(const void* p);
void* smem_ptr(uint32_t addr);
void wgmma(float* d, uint64_t a, uint64_t b, int n, Site s);
void wgmma_commit();
void wgmma_wait(int keep, Site s);

// --- calling a kernel with the untyped parameter array of cuLaunchKernel; sizes come from the C++ signature
struct Kernel {
  const char* name;
  void (*run)(void**);
  unsigned nparams;
  const unsigned* sizes;
  const ptx::Entry* entry = nullptr;  // compiled code instead of run
};
template <auto F> struct Bind;
template <class... A, void (*F)(A...)> struct Bind<F> {
  static constexpr unsigned n = sizeof...(A);
  static constexpr unsigned sizes[sizeof...(A) + 1] = {sizeof(A)..., 0};
  template <size_t... I> EMU_PLAIN static void go(void** p, std::index_sequence<I...>) {
    F(*(std::decay_t<A>*)p[I]...);
  }
  EMU_PLAIN static void run(void** p) { go(p, std::index_sequence_for<A...>{}); }
};
void add_kernel(const Kernel* k);
struct Registrar {
  Registrar(const Kernel* k) { add_kernel(k); }
};
}  // namespace emu
