// emulated_wrappers.h - the wrappers of kernels/common/device.cuh; the contracts are there.
#pragma once
#include "emulated_warp.h"

#define HAS_SM90A 1

// --- memory. A 16-byte access is one check with its alignment: the compiler would report a plain uint4 as four of 4.
inline uint32_t smem_u32(const void* p) { return emu::smem_addr(p); }
EMU_INLINE uint4 ld128(const void* p) {
  emu::here();
  if ((uintptr_t)p & 15) emu::fail("misaligned 16-byte load at %p", p);
  uint4 v;
  emu::check_plain(p, 16, false);
  emu::copy(&v, p, 16);
  return v;
}
EMU_INLINE void st128(void* p, uint4 v) {
  emu::here();
  if ((uintptr_t)p & 15) emu::fail("misaligned 16-byte store at %p", p);
  emu::check_plain(p, 16, true);
  emu::copy(p, &v, 16);
}
EMU_INLINE uint4 ld128_shared(uint32_t s) { return ld128(emu::smem_ptr(s)); }
EMU_INLINE uint4 ld128_stream(const void* p) { return ld128(p); }
EMU_INLINE uint4 ld128_l2(const void* p) { return ld128(p); }
inline void prefetch_l2(const void*) {}
inline void cp_async16(void* s, const void* g, bool pred, EMU_SITE) { emu::cp_async(s, g, 16, pred ? 16 : 0, EMU_AT); }
inline void cp_async16(uint32_t s, const void* g, bool pred, EMU_SITE) {
  emu::cp_async(emu::smem_ptr(s), g, 16, pred ? 16 : 0, EMU_AT);
}
inline void cp_async16_first(uint32_t s, const void* g, bool pred, EMU_SITE) {
  emu::cp_async(emu::smem_ptr(s), g, 16, pred ? 16 : 0, EMU_AT);
}
inline void cp_async16_l2_256(uint32_t s, const void* g, bool pred, EMU_SITE) {
  emu::cp_async(emu::smem_ptr(s), g, 16, pred ? 16 : 0, EMU_AT);
}
inline void cp_async16_l1(uint32_t s, const void* g, bool pred, EMU_SITE) {
  emu::cp_async(emu::smem_ptr(s), g, 16, pred ? 16 : 0, EMU_AT);
}
inline void cp_commit() { emu::cp_commit(); }
template <int N> inline void cp_wait() { emu::cp_wait(N); }

// --- ordering between blocks
#define EMU_32BIT static_assert(sizeof(T) == 4, "32-bit only")
template <class T> EMU_INLINE T emu_poll(const T* p, emu::Order o) {
  EMU_32BIT;
  emu::atomic_begin(p, sizeof(T), o, false, true);
  T v;
  emu::copy(&v, p, sizeof(T));
  emu::spin();
  return v;
}
template <class T> EMU_INLINE T ld_acquire(const T* p) { return emu_poll(p, emu::ACQUIRE); }
template <class T> EMU_INLINE T ld_relaxed(const T* p) { return emu_poll(p, emu::RELAXED); }
template <class T> EMU_INLINE void st_release(T* p, T v) {
  EMU_32BIT;
  emu::atomic_begin(p, sizeof(T), emu::RELEASE, true, false);
  emu::copy(p, &v, sizeof(T));
}
template <class T> EMU_INLINE void red_add_release(T* p, T v) {
  EMU_32BIT;
  emu::atomic(p, [v](T o) { return o + v; }, emu::RELEASE);
}
template <class T> EMU_INLINE T atomic_add_acq_rel(T* p, T v) {
  EMU_32BIT;
  return emu::atomic(p, [v](T o) { return o + v; }, emu::ACQ_REL);
}
#undef EMU_32BIT
EMU_INLINE void st_host(unsigned long long* p, unsigned long long v) {
  emu::atomic_begin(p, 8, emu::RELAXED, true, false);
  emu::copy(p, &v, 8);
}

// --- reductions of a full warp: one rendezvous instead of five, in the same butterfly order
namespace emu {
template <class F> EMU_PLAIN inline float butterfly(const char* op, float v, Site s) {
  Reduce<float> a{v, v};
  auto all = [](unsigned, void* const* p) EMU_PLAIN {
    float v[32], w[32];
    for (int i = 0; i < 32; i++) v[i] = ((Reduce<float>*)p[i])->in;
    for (int o = 16; o; o >>= 1) {
      for (int i = 0; i < 32; i++) w[i] = F()(v[i], v[i ^ o]);
      memcpy(v, w, sizeof v);
    }
    for (int i = 0; i < 32; i++) ((Reduce<float>*)p[i])->out = v[i];
  };
  warp_op(op, 0xffffffffu, s, all, &a);
  return a.out;
}
struct Fmax {
  float operator()(float a, float b) { return fmaxf(a, b); }
};
}  // namespace emu
inline float warp_sum(float v, EMU_SITE) { return emu::butterfly<emu::Add>("warp_sum", v, EMU_AT); }
inline float warp_max(float v, EMU_SITE) { return emu::butterfly<emu::Fmax>("warp_max", v, EMU_AT); }

// --- when and where
inline unsigned long long global_timer_ns() { return emu::timer(); }
inline unsigned sm_id() { return emu::sm_id(); }
inline unsigned block_id() { return emu::block_id(); }

// --- two numbers in a word
inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
inline float half_lo(uint32_t u) {
  uint32_t exponent = u >> 10 & 31, fraction = u & 1023;
  float a = exponent == 31 ? (fraction ? NAN : INFINITY)
                           : exponent ? ldexpf(1024 + fraction, (int)exponent - 25) : ldexpf(fraction, -24);
  return u & 0x8000 ? -a : a;
}
inline float half_hi(uint32_t u) { return half_lo(u >> 16); }
inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  auto fma = [](uint32_t a, uint32_t b, uint32_t c) {
    double sum = (double)__uint_as_float(a) * __uint_as_float(b) + __uint_as_float(c);  // the product is exact
    float f = (float)sum;
    // to odd where f32 is not exact, so that the rounding to bf16 is the only one
    if (f != sum && sum == sum && !(__float_as_uint(f) & 1)) {
      bool up = fabs((double)f) > fabs(sum);
      f = __uint_as_float(__float_as_uint(f) + (up ? -1 : 1));
    }
    return f;
  };
  __nv_bfloat162 v = __floats2bfloat162_rn(fma(a << 16, b << 16, c << 16),
                                           fma(a & 0xffff0000u, b & 0xffff0000u, c & 0xffff0000u));
  return emu_bits<uint32_t>(v);
}

// --- barriers
inline void named_barrier_sync(int id, int n, EMU_SITE) { emu::bar_sync(id, n, EMU_AT); }
inline void named_barrier_arrive(int id, int n, EMU_SITE) { emu::bar_arrive(id, n, EMU_AT); }
inline void grid_sync(EMU_SITE) { emu::grid_sync(EMU_AT); }
inline void grid_dependency_wait(EMU_SITE) { emu::pdl_wait(EMU_AT); }
inline void grid_launch_dependents() {}  // the emulated dependent starts as early as the model allows anyway

// --- tensor cores
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMU_SITE) {
  emu::mma(d, a, b, EMU_AT);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* p, EMU_SITE) { emu::ldmatrix(r, p, 2, false, EMU_AT); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* p, EMU_SITE) { emu::ldmatrix(r, p, 2, true, EMU_AT); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* p, EMU_SITE) { emu::ldmatrix(r, p, 4, false, EMU_AT); }
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t s, EMU_SITE) {
  emu::ldmatrix(r, emu::smem_ptr(s), 4, false, EMU_AT);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p, EMU_SITE) { emu::ldmatrix(r, p, 4, true, EMU_AT); }

// --- mbarrier, TMA, bulk copies
inline void mbar_init(uint64_t* p, int n) { emu::mbar_init(p, n); }
inline void mbar_fence() {}
inline void fence_proxy_async() {}
inline void mbar_arrive(uint64_t* p) { emu::mbar_arrive(p, 0); }
inline void mbar_expect_tx(uint64_t* p, unsigned n) { emu::mbar_arrive(p, n); }
inline void mbar_wait(uint64_t* p, unsigned parity, EMU_SITE) { emu::mbar_wait(p, parity, EMU_AT); }
inline void tma_load_2d(void* d, const TensorMap* m, uint64_t* b, int x, int y) { emu::tma_load_2d(d, m, b, x, y); }
inline void bulk_load(void* d, const void* g, unsigned bytes, uint64_t* b) { emu::bulk_load(d, g, bytes, b); }
inline void bulk_prefetch_l2(const void* p, unsigned bytes) {
  emu::here();
  if (((uintptr_t)p | bytes) & 15) emu::fail("misaligned cp.async.bulk.prefetch");
}

// --- wgmma
template <int N> inline void setmaxnreg_dec() {}
template <int N> inline void setmaxnreg_inc() {}
inline void wgmma_fence() {}
inline void wgmma_commit() { emu::wgmma_commit(); }
template <int N> inline void wgmma_wait(EMU_SITE) { emu::wgmma_wait(N, EMU_AT); }
inline void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b, EMU_SITE) { emu::wgmma(d, a, b, 64, EMU_AT); }
inline void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, EMU_SITE) { emu::wgmma(d, a, b, 128, EMU_AT); }
