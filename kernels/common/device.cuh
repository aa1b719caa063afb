// device.cuh - the one header that kernels include. Under nvcc it is CUDA plus thin wrappers around inline PTX; under a
// host compiler it is the emulated device of tests/emulator. Inline PTX exists nowhere else, so each instruction has
// exactly two texts: the one here and its emulation in tests/emulator/include/emulated_device.h.
//
// Rules for kernels:
//   EXPORT_KERNEL(name)   after each `extern "C" __global__ void name(...)`: registers it with the emulator.
//   SHARED, DYN_SHARED    instead of `__shared__`: the emulator puts red zones around each array.
//   ld128, st128          for 16-byte accesses: one access, its alignment checked.
//   Traced, Span* trace   a kernel of a decode step notes when it ran: see trace.cuh.
//   #if HAS_SM90A         around bodies that use the sm_90a section; #else an empty body.
//   Never: <<<>>>, asm, dependence on the lockstep of a warp.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <stdint.h>

#define DEV __device__ __forceinline__
#define EXPORT_KERNEL(k)
// A shared array `T name[n]`, 128-byte aligned.
#define SHARED(T, name, n) __shared__ __align__(128) T name[n]
// The launch's dynamic shared memory as `T* name`, 1024-byte aligned; one name per kernel.
#define DYN_SHARED(T, name)                                     \
  extern __shared__ __align__(1024) unsigned char name##_raw[]; \
  T* name = reinterpret_cast<T*>(name##_raw)
// 1 where wgmma and setmaxnreg exist (and on the emulated device).
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_SM90A 1
#else
#define HAS_SM90A 0
#endif

// --- memory, any arch ------------------------------------------------------------------------------------------------

// The 32-bit address of shared memory that PTX instructions take.
DEV uint32_t smem_u32(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// 16 bytes from global or shared memory; p is a multiple of 16.
DEV uint4 ld128(const void* p) { return *reinterpret_cast<const uint4*>(p); }

// 16 bytes from shared memory at the address that smem_u32 gives.
DEV uint4 ld128_shared(uint32_t s) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(s)
               : "memory");
  return v;
}

// 16 bytes to global or shared memory; p is a multiple of 16.
DEV void st128(void* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }

// 16 bytes of read-once global data (weights), past L1. Only for memory that no kernel in flight writes.
DEV uint4 ld128_stream(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// 16 bytes of global data past L1, which may hold what was there before a kernel in flight began. Stays before a
// grid_dependency_wait that follows; a load by ld.global.nc does not: ptxas 13.0 moves it behind.
DEV uint4 ld128_l2(const void* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

// Brings the line at p into L2; a hint that may name any address.
DEV void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Copies 16 bytes from global to shared memory asynchronously, past L1; with pred false it writes zeroes and reads nothing.
// s is what smem_u32 gives: a loop that counts such addresses up does so in 32 bits.
DEV void cp_async16(uint32_t s, const void* g, bool pred) {
  int read = pred ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(s), "l"(g), "r"(read) : "memory");
}
DEV void cp_async16(void* s, const void* g, bool pred) { cp_async16(smem_u32(s), g, pred); }

// As cp_async16; the line is the first that L2 gives up when it needs room.
DEV void cp_async16_first(uint32_t s, const void* g, bool pred) {
  int read = pred ? 16 : 0;
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));  // not volatile: once a kernel is enough
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(s), "l"(g), "r"(read), "l"(policy)
               : "memory");
}

// As cp_async16; L2 may fetch the 256 bytes around it.
DEV void cp_async16_l2_256(uint32_t s, const void* g, bool pred) {
  int read = pred ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(s), "l"(g), "r"(read) : "memory");
}

// As cp_async16, through L1: for what the other blocks of the multiprocessor read too.
DEV void cp_async16_l1(uint32_t s, const void* g, bool pred) {
  int read = pred ? 16 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(s), "l"(g), "r"(read) : "memory");
}

// Closes this thread's current group of cp_async16 and cp_async16_l1.
DEV void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's groups are in flight; other threads still need a barrier to see the data.
template <int N> DEV void cp_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// --- ordering between blocks (32-bit, gpu scope) ---------------------------------------------------------------------

// Reads *p; what the releasing thread did before its release is visible from here on.
template <class T> DEV T ld_acquire(const T* p) {
  static_assert(sizeof(T) == 4, "32-bit only");
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return (T)v;
}

// Reads *p without ordering anything; for polling before an ld_acquire.
template <class T> DEV T ld_relaxed(const T* p) {
  static_assert(sizeof(T) == 4, "32-bit only");
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return (T)v;
}

// Writes *p = v after everything this thread did before.
template <class T> DEV void st_release(T* p, T v) {
  static_assert(sizeof(T) == 4, "32-bit only");
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"((uint32_t)v) : "memory");
}

// *p += v after everything this thread did before; returns nothing.
template <class T> DEV void red_add_release(T* p, T v) {
  static_assert(sizeof(T) == 4, "32-bit only");
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"((uint32_t)v) : "memory");
}

// *p += v, releasing and acquiring; returns the old value. A block that publishes needs a __syncthreads before it.
template <class T> DEV T atomic_add_acq_rel(T* p, T v) {
  static_assert(sizeof(T) == 4, "32-bit only");
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"((uint32_t)v) : "memory");
  return (T)old;
}

// Writes 8 bytes to page-locked memory of the host, at once as a whole; orders nothing else.
DEV void st_host(unsigned long long* p, unsigned long long v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

// --- barriers, any arch ----------------------------------------------------------------------------------------------

// Waits at barrier id (1 to 15) until n threads (a multiple of 32) have arrived, this warp included.
DEV void named_barrier_sync(int id, int n) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory"); }

// Arrives at barrier id for n threads without waiting; called by whole warps.
DEV void named_barrier_arrive(int id, int n) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n) : "memory"); }

// --- tensor cores, any arch (mma.sync) -------------------------------------------------------------------------------

// d += a b for one warp: a [16, 16] bf16 row-major, b [16, 8] bf16 column-major, d [16, 8] f32, in PTX's layouts.
DEV void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two 8x8 b16 matrices from shared memory; lanes 0-15 give the 16-byte aligned row addresses.
DEV void ldmatrix_x2(uint32_t (&r)[2], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_u32(p))
               : "memory");
}

// As ldmatrix_x2, each matrix transposed.
DEV void ldmatrix_x2_trans(uint32_t (&r)[2], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_u32(p))
               : "memory");
}

// Four 8x8 b16 matrices from shared memory; each lane gives one 16-byte aligned row address, as smem_u32 gives it.
DEV void ldmatrix_x4(uint32_t (&r)[4], uint32_t s) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(s)
               : "memory");
}
DEV void ldmatrix_x4(uint32_t (&r)[4], const void* p) { ldmatrix_x4(r, smem_u32(p)); }

// As ldmatrix_x4, each matrix transposed.
DEV void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_u32(p))
               : "memory");
}

// (a & mask) | bits in one instruction: with two constants the compiler makes two of it.
DEV uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t v;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(v) : "r"(a), "r"(mask), "r"(bits));
  return v;
}

// a * b + c of two pairs of bf16 each, rounded once to nearest even.
DEV uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t v;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
  return v;
}

// The f16 in the low and in the high half of a word, as f32.
DEV float half_lo(uint32_t u) {
  float v;
  asm("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %1; cvt.f32.f16 %0, lo; }" : "=f"(v) : "r"(u));
  return v;
}
DEV float half_hi(uint32_t u) {
  float v;
  asm("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %1; cvt.f32.f16 %0, hi; }" : "=f"(v) : "r"(u));
  return v;
}

// --- reductions of a full warp ---------------------------------------------------------------------------------------

// The sum over a full warp, in every lane, always in the same (butterfly) order.
DEV float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

// The maximum over a full warp, in every lane.
DEV float warp_max(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}

// --- when and where ----------------------------------------------------------------------------------------------------

// Nanoseconds of a clock that all multiprocessors share; what comes before in the program is not moved behind it.
DEV unsigned long long global_timer_ns() {
  unsigned long long t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
  return t;
}

// The multiprocessor that this block runs on.
DEV unsigned sm_id() {
  unsigned sm;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  return sm;
}

// The linear index of this block in the grid. Read anew at each call, so that it takes no register in between.
DEV unsigned block_id() {
  unsigned x, y, z;
  asm volatile("mov.u32 %0, %%ctaid.x; mov.u32 %1, %%ctaid.y; mov.u32 %2, %%ctaid.z;" : "=r"(x), "=r"(y), "=r"(z));
  return x + gridDim.x * (y + gridDim.y * z);
}

// --- programmatic dependent launch (nothing at all before sm_90) -----------------------------------------------------

// Waits until the kernels this one depends on are complete and their writes visible.
DEV void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the dependent kernel start as soon as every block has said so; promises nothing about memory.
DEV void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --- sm_90 and later: mbarrier, TMA, bulk copies ---------------------------------------------------------------------

// A CUtensorMap as a kernel parameter: `const __grid_constant__ TensorMap map`.
struct alignas(64) TensorMap {
  unsigned char opaque[128];
};

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
// Makes *p (shared) a barrier of n arrivals per phase; one thread, then mbar_fence and a block barrier.
DEV void mbar_init(uint64_t* p, int n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_u32(p)), "r"(n) : "memory");
}

// Makes mbar_init visible to asynchronous copies.
DEV void mbar_fence() {
  asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}

// Orders this thread's ordinary writes to shared memory before bulk copies and wgmma that read or overwrite them.
DEV void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// One arrival.
DEV void mbar_arrive(uint64_t* p) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_u32(p)) : "memory");
}

// One arrival, and the phase also waits for n bytes of copies.
DEV void mbar_expect_tx(uint64_t* p, unsigned n) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_u32(p)), "r"(n) : "memory");
}

// Waits until the phase of the given parity (0 for the first) is complete.
DEV void mbar_wait(uint64_t* p, unsigned parity) {
  asm volatile(
      "{ .reg .pred done;"
      "  WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra READY; bra WAIT; READY: }"
      ::"r"(smem_u32(p)), "r"(parity) : "memory");
}

// Copies the box of m at column x, row y to shared memory d and reports its bytes to b; outside the tensor it is zero.
DEV void tma_load_2d(void* d, const TensorMap* m, uint64_t* b, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(smem_u32(d)), "l"(m), "r"(x), "r"(y), "r"(smem_u32(b)) : "memory");
}

// Copies bytes from global g to shared d and reports them to b; both addresses and the size are multiples of 16.
DEV void bulk_load(void* d, const void* g, unsigned bytes, uint64_t* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(smem_u32(d)), "l"(g), "r"(bytes), "r"(smem_u32(b)) : "memory");
}

// Brings bytes at p into L2; address and size are multiples of 16.
DEV void bulk_prefetch_l2(const void* p, unsigned bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
}
#endif

// --- sm_90a: wgmma, register budgets ---------------------------------------------------------------------------------
#if HAS_SM90A
// Gives registers back, down to N a thread; the whole warpgroup.
template <int N> DEV void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// Takes registers, up to N a thread; the whole warpgroup.
template <int N> DEV void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// Before the first wgmma, and after any other use of its accumulators.
DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the current group of wgmmas.
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most N groups are in flight; only then may accumulators be read or operands overwritten.
template <int N> DEV void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

#define F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(d, i) F4(d, i), F4(d, i + 4), F4(d, i + 8), F4(d, i + 12)

// d += a b for a warpgroup: a [64, 16], b [16, 64], bf16, both K-major in shared memory behind descriptors; d f32.
DEV void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, 0, 0;"
      : F16(d, 0), F16(d, 16)
      : "l"(a), "l"(b));
}

// As wgmma_m64n64k16 with b [16, 128].
DEV void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, 1, 1, 1, 0, 0;"
      : F16(d, 0), F16(d, 16), F16(d, 32), F16(d, 48)
      : "l"(a), "l"(b));
}
#undef F16
#undef F4
#endif

#else  // not nvcc
#include "emulated_device.h"
#define DEV inline
#endif

// --- helpers, the same text for both devices -------------------------------------------------------------------------

typedef __nv_bfloat16 bf16;

// The two bf16 of a 32-bit word as f32: element 0 is in the low half.
DEV float bf_lo(uint32_t u) { return __uint_as_float(u << 16); }
DEV float bf_hi(uint32_t u) { return __uint_as_float(u & 0xffff0000u); }

// Two f32 rounded to nearest even into one word of bf16.
DEV uint32_t pack_bf16(float lo, float hi) {
  __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  uint32_t u;
  memcpy(&u, &v, 4);
  return u;
}

// The products of two pairs of bf16, each rounded to nearest even.
DEV uint32_t mul_bf16x2(uint32_t a, uint32_t b) { return fma_bf16x2(a, b, 0x80008000u); }  // plus -0: Ampere has no mul

// The eight bf16 of a 16-byte load as f32, in memory order.
DEV void unpack8(uint4 v, float (&f)[8]) {
  f[0] = bf_lo(v.x), f[1] = bf_hi(v.x), f[2] = bf_lo(v.y), f[3] = bf_hi(v.y);
  f[4] = bf_lo(v.z), f[5] = bf_hi(v.z), f[6] = bf_lo(v.w), f[7] = bf_hi(v.w);
}

// Eight f32 rounded to nearest even, for a 16-byte store of bf16 in memory order.
DEV uint4 pack8(const float (&f)[8]) {
  return make_uint4(pack_bf16(f[0], f[1]), pack_bf16(f[2], f[3]), pack_bf16(f[4], f[5]), pack_bf16(f[6], f[7]));
}

// The sum over a block whose size is a multiple of 32, in every thread. All threads call it. scratch: 32 floats in
// shared memory, free again for the next call because the leading barrier waits for the readers of the last one.
DEV float block_sum(float v, float* scratch) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = (blockDim.x + 31) >> 5;
  v = warp_sum(v);
  __syncthreads();
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  return warp_sum(lane < n_warps ? scratch[lane] : 0.f);
}

// The maximum over a block; otherwise as block_sum.
DEV float block_max(float v, float* scratch) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = (blockDim.x + 31) >> 5;
  v = warp_max(v);
  __syncthreads();
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  return warp_max(lane < n_warps ? scratch[lane] : -INFINITY);
}

// The place of a 16-byte chunk in a shared tile whose rows are COLS bf16 (32, 64, 128, ...). Chunks are permuted by row, so
// that eight rows at one chunk, which is what ldmatrix reads, and the chunks of a row, which is what copies write, lie in
// different banks without padding. Rows that differ by a multiple of 8 are permuted alike.
template <int COLS> DEV int tile_at(int row, int chunk) {
  constexpr int CHUNKS = COLS / 8, ROWS = CHUNKS < 8 ? 8 / CHUNKS : 1;  // rows in 128 bytes, which are all banks
  constexpr int MASK = CHUNKS < 8 ? CHUNKS - 1 : 7;
  return row * COLS + (chunk ^ (row / ROWS & MASK)) * 8;
}
