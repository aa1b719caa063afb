#include "common/device.cuh"

// A warp-specialised GEMM tile: TMA producer, wgmma consumers, an mbarrier ring of two stages. y[T, N] = x[T, K] w[N,
// K]^T. BUG 1: the producer does not wait for a free stage; 2: it announces half of the bytes.
#if HAS_SM90A
DEV uint64_t desc128(const void* p) {
  return (uint64_t)((smem_u32(p) & 0x3ffff) >> 4) | 1ull << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}
template <int BUG> DEV void wg(bf16* y, const TensorMap& tx, const TensorMap& tw, int T, int N, int K) {
  DYN_SHARED(unsigned char, sm);
  SHARED(uint64_t, full, 2);
  SHARED(uint64_t, empty, 2);
  int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, r0 = blockIdx.y * 64, c0 = blockIdx.x * 64;
  if (tid == 0) {
    for (int s = 0; s < 2; s++) {
      mbar_init(full + s, 1);
      mbar_init(empty + s, 4);
    }
    mbar_fence();
  }
  __syncthreads();
  if (warp == 4) {
    for (int j = 0; lane == 0 && j < K / 64; j++) {
      int s = j & 1;
      if (BUG != 1) mbar_wait(empty + s, (j >> 1 & 1) ^ 1);
      mbar_expect_tx(full + s, BUG == 2 ? 8192 : 16384);
      tma_load_2d(sm + s * 16384, &tx, full + s, j * 64, r0);
      tma_load_2d(sm + s * 16384 + 8192, &tw, full + s, j * 64, c0);
    }
  } else {
    float d[32] = {};
    for (int j = 0; j < K / 64; j++) {
      int s = j & 1;
      mbar_wait(full + s, j >> 1 & 1);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4; kk++)
        wgmma_m64n64k16(d, desc128(sm + s * 16384) + kk * 2, desc128(sm + s * 16384 + 8192) + kk * 2);
      wgmma_commit();
      wgmma_wait<0>();
      if (lane == 0) mbar_arrive(empty + s);
    }
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int row = r0 + warp * 16 + (lane >> 2) + (i >> 1) * 8, col = c0 + n * 8 + (lane & 3) * 2 + (i & 1);
        if (row < T && col < N) y[(size_t)row * N + col] = __float2bfloat16(d[n * 4 + i]);
      }
  }
}
#else
template <int BUG> DEV void wg(bf16*, const TensorMap&, const TensorMap&, int, int, int) {}
#endif
#define WG(name, BUG)                                                                                                \
  extern "C" __global__ void __launch_bounds__(160)                                                                  \
      name(bf16* y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, int T, int N, int K) { \
    wg<BUG>(y, x, w, T, N, K);                                                                                       \
  }                                                                                                                  \
  EXPORT_KERNEL(name)
WG(t_wg_gemm, 0)
WG(t_wg_gemm_no_empty_wait, 1)
WG(t_wg_gemm_wrong_tx, 2)

// A bulk copy of one row per block into shared memory, then doubled. BUG: it is not waited for.
template <int BUG> DEV void bulk(float* out, const float* x, int n) {
#if HAS_SM90A
  DYN_SHARED(float, s);
  SHARED(uint64_t, bar, 1);
  if (threadIdx.x == 0) {
    mbar_init(bar, 1);
    mbar_fence();
    bulk_prefetch_l2(x + (size_t)blockIdx.x * n, n * 4);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbar_expect_tx(bar, n * 4);
    bulk_load(s, x + (size_t)blockIdx.x * n, n * 4, bar);
  }
  if (!BUG) mbar_wait(bar, 0);
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[(size_t)blockIdx.x * n + i] = 2 * s[i];
#endif
}
extern "C" __global__ void t_bulk(float* out, const float* x, int n) { bulk<0>(out, x, n); }
EXPORT_KERNEL(t_bulk)
extern "C" __global__ void t_bulk_no_wait(float* out, const float* x, int n) { bulk<1>(out, x, n); }
EXPORT_KERNEL(t_bulk_no_wait)

// Programmatic dependent launch: a chain of y = 2 x + w, where w (weights) may be read before the wait. BUG 1: x too;
// 2: it never waits.
template <int BUG> DEV void link(float* y, const float* x, const float* w, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float b = i < n ? w[i] : 0, early = BUG == 1 && i < n ? x[i] : 0;
  if (BUG != 2) grid_dependency_wait();
  grid_launch_dependents();
  if (i < n) y[i] = 2 * (BUG == 1 ? early : x[i]) + b;
}
extern "C" __global__ void t_pdl(float* y, const float* x, const float* w, int n) { link<0>(y, x, w, n); }
EXPORT_KERNEL(t_pdl)
extern "C" __global__ void t_pdl_early(float* y, const float* x, const float* w, int n) { link<1>(y, x, w, n); }
EXPORT_KERNEL(t_pdl_early)
extern "C" __global__ void t_pdl_no_wait(float* y, const float* x, const float* w, int n) { link<2>(y, x, w, n); }
EXPORT_KERNEL(t_pdl_no_wait)
