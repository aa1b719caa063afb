// head_norm: h[i] = bf16( h[i] * rsqrt(mean_i(h[i]^2) + eps) * gain[i] ) for each q and k head h of each row, in place
// shapes:   qkv [rows, n_heads + 2*n_kv_heads, head_dim] bf16; gains [2, head_dim] bf16, that of q heads and that of k heads.
// rounding: sums in f32, one rounding at the store.
// mapping:  block (r, c): row r, a warp for each of its heads from c * VECTOR_THREADS / 32 on; 8 elements (16 bytes) a lane and
//           turn.
// traffic:  reads 2*rows*(n_heads + n_kv_heads)*head_dim + 4*head_dim bytes (the second pass comes from the caches), writes the
//           first of these. = HeadNorm::cost
// requires: head_dim % 8 == 0                                        (HeadNorm::launch in src/ops/head_norm.rs)
// source:   ours. Not yet measured.
#include "common/device.cuh"
#include "common/tiles.h"
#include "common/trace.cuh"

extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
head_norm_bf16(bf16* qkv, const bf16* gains, int n_heads, int n_kv_heads, int head_dim, float eps, Span* trace) {
  Traced traced(trace);
  int h = blockIdx.y * (VECTOR_THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (h >= n_heads + n_kv_heads) return;
  bf16* head = qkv + ((int64_t)blockIdx.x * (n_heads + 2 * n_kv_heads) + h) * head_dim;
  const bf16* gain = gains + (h < n_heads ? 0 : head_dim);
  float sum = 0.f;
  for (int i = lane * 8; i < head_dim; i += 32 * 8) {
    float v[8];
    unpack8(ld128(head + i), v);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += v[j] * v[j];
  }
  float scale = rsqrtf(warp_sum(sum) / head_dim + eps);
  for (int i = lane * 8; i < head_dim; i += 32 * 8) {
    float v[8], g[8];
    unpack8(ld128(head + i), v);
    unpack8(ld128(gain + i), g);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] *= scale * g[j];
    st128(head + i, pack8(v));
  }
}
EXPORT_KERNEL(head_norm_bf16)
