#include "common/trace.cuh"
#ifdef __CUDACC__
#include <cooperative_groups.h>  // not in device.cuh: the compiler takes 2 s for it, for each file and architecture

// Waits for every thread of a cooperative launch.
DEV void grid_sync() { cooperative_groups::this_grid().sync(); }
#endif

// One block per row of x [rows, dim], dim a multiple of 8.
extern "C" __global__ void t_rms_norm(bf16* out, const bf16* x, const bf16* w, int dim, float eps) {
  SHARED(float, scratch, 32);
  const bf16* row = x + (size_t)blockIdx.x * dim;
  float ss = 0;
  for (int i = threadIdx.x * 8; i < dim; i += blockDim.x * 8) {
    float f[8];
    unpack8(ld128(row + i), f);
    for (int j = 0; j < 8; j++) ss += f[j] * f[j];
  }
  float r = rsqrtf(block_sum(ss, scratch) / dim + eps);
  for (int i = threadIdx.x * 8; i < dim; i += blockDim.x * 8) {
    float f[8], g[8];
    unpack8(ld128(row + i), f);
    unpack8(ld128(w + i), g);
    for (int j = 0; j < 8; j++) f[j] *= r * g[j];
    st128(out + (size_t)blockIdx.x * dim + i, pack8(f));
  }
}
EXPORT_KERNEL(t_rms_norm)

// y[n] = W[n, :] . x, one warp per row.
extern "C" __global__ void t_gemv(bf16* y, const bf16* W, const bf16* x, int N, int K) {
  int lane = threadIdx.x & 31, row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (row >= N) return;
  float s = 0;
  for (int k = lane * 8; k < K; k += 256) {
    prefetch_l2(W + (size_t)row * K + k + 256);
    float a[8], b[8];
    unpack8(ld128_stream(W + (size_t)row * K + k), a);
    unpack8(ld128(x + k), b);
    for (int j = 0; j < 8; j++) s = fmaf(a[j], b[j], s);
  }
  s = warp_sum(s);
  if (lane == 0) y[row] = __float2bfloat16(s);
}
EXPORT_KERNEL(t_gemv)

// The first of the largest elements of each row, one block per row.
extern "C" __global__ void t_argmax(int* out, const float* x, int n) {
  SHARED(float, best, 32);
  SHARED(int, index, 32);
  const float* row = x + (size_t)blockIdx.x * n;
  float v = -INFINITY;
  int at = 0x7fffffff;
  for (int i = threadIdx.x; i < n; i += blockDim.x)
    if (row[i] > v) v = row[i], at = i;
  auto take = [&](float ov, int oi) {
    if (ov > v || (ov == v && oi < at)) v = ov, at = oi;
  };
  for (int o = 16; o; o >>= 1) {
    float ov = __shfl_xor_sync(0xffffffffu, v, o);
    int oi = __shfl_xor_sync(0xffffffffu, at, o);
    take(ov, oi);
  }
  if (!(threadIdx.x & 31)) best[threadIdx.x >> 5] = v, index[threadIdx.x >> 5] = at;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < (int)(blockDim.x >> 5); i++) take(best[i], index[i]);
    out[blockIdx.x] = at;
  }
}
EXPORT_KERNEL(t_argmax)

// A decode step in a graph: the position is in device memory; out[pos] = x[pos] * 2, then pos += 1.
extern "C" __global__ void t_step(float* out, const float* x, const int* pos) {
  if (threadIdx.x == 0) out[*pos] = x[*pos] * 2;
}
EXPORT_KERNEL(t_step)

extern "C" __global__ void t_advance(int* pos) {
  if (threadIdx.x == 0) *pos += 1;
}
EXPORT_KERNEL(t_advance)

// Cooperative: each block sums its slice, grid.sync, block 0 adds the partial sums
extern "C" __global__ void t_grid_sum(float* out, float* part, const float* x, int n) {
  SHARED(float, scratch, 32);
  float s = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) s += x[i];
  s = block_sum(s, scratch);
  if (threadIdx.x == 0) part[blockIdx.x] = s;
  grid_sync();
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    float t = 0;
    for (int i = 0; i < (int)gridDim.x; i++) t += part[i];
    *out = t;
  }
}
EXPORT_KERNEL(t_grid_sum)

// Every warp primitive once; out[32 * k + lane]
extern "C" __global__ void t_warp(int* out, const int* x) {
  SHARED(float, scratch, 32);
  int l = threadIdx.x, v = x[l], k = 0;
  const unsigned all = 0xffffffffu;
  auto put = [&](int r) { out[32 * k++ + l] = r; };
  put(__shfl_sync(all, v, 5));
  put(__shfl_sync(all, v, 1, 8));
  put(__shfl_up_sync(all, v, 3));
  put(__shfl_down_sync(all, v, 3, 16));
  put(__shfl_xor_sync(all, v, 9));
  put(__ballot_sync(all, v & 1));
  put(__any_sync(all, v == 7));
  put(__all_sync(all, v >= 0));
  put(__reduce_add_sync(all, v));
  put(__reduce_max_sync(all, v));
  put(__reduce_or_sync(all, (unsigned)v));
  put(__popc(v));
  put(__ffs(v));
  put(__clz(v));
  put(__syncthreads_count(v & 1));
  put((int)block_max((float)v, scratch));
}
EXPORT_KERNEL(t_warp)

// Each block waits for the kernel before it and does nothing; even threads return early.
extern "C" __global__ void t_trace(Span* trace) {
  Traced traced(trace);
  grid_dependency_wait();
  traced.ready();
  if (threadIdx.x % 2 == 0) return;
  __syncwarp(0xaaaaaaaau);
}
EXPORT_KERNEL(t_trace)

// Says that it runs, and waits until a kernel of another stream says so.
extern "C" __global__ void t_meet(unsigned* mine, const unsigned* other) {
  if (threadIdx.x != 0) return;
  st_release(mine, 1u);
  while (ld_acquire(other) == 0) {
  }
}
EXPORT_KERNEL(t_meet)
