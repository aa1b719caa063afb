// rms_norm_bwd: dx[r,i] (+)= s * (dy w - x s^2 mean_i(dy w x)), s = 1 / sqrt(mean_i(x^2) + eps)           (Zhang & Sennrich 2019)
// shapes:   dx, dy, x [rows, dim] bf16; w [dim] bf16.
// rounding: sums in f32, one rounding at the store, with what is there if it is added.
// mapping:  one block per row, NORM_THREADS threads, 8 elements (16 bytes) per thread per pass: both sums, then the result.
// traffic:  reads 4*rows*dim + 2*dim bytes, 2*rows*dim more to add (the second pass comes from the caches), writes 2*rows*dim.
//           = RmsNormBwd::cost
//           Predicted, not measured: 16384 rows of 4096 on an H200 are 537 MB, 0.12 ms.
// requires: dim % 8 == 0                                                 (RmsNormBwd::launch in src/ops/train/rms_norm_bwd.rs)
// source:   ours. Not yet measured.
#include "common/device.cuh"
#include "common/tiles.h"

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
rms_norm_bwd_bf16(bf16* dx, const bf16* dy, const bf16* x, const bf16* w, int dim, float eps, int add) {
  SHARED(float, scratch, 32);
  int64_t row = (int64_t)blockIdx.x * dim;
  dx += row, dy += row, x += row;
  float square = 0.f, dot = 0.f;
  for (int i = threadIdx.x * 8; i < dim; i += NORM_THREADS * 8) {
    float d[8], v[8], g[8];
    unpack8(ld128(dy + i), d), unpack8(ld128(x + i), v), unpack8(ld128(w + i), g);
#pragma unroll
    for (int j = 0; j < 8; j++) square = fmaf(v[j], v[j], square), dot = fmaf(d[j] * g[j], v[j], dot);
  }
  float s = 1.f / sqrtf(block_sum(square, scratch) / dim + eps);
  float mean = s * s * (block_sum(dot, scratch) / dim);
  for (int i = threadIdx.x * 8; i < dim; i += NORM_THREADS * 8) {
    float d[8], v[8], g[8], to[8] = {};
    unpack8(ld128(dy + i), d), unpack8(ld128(x + i), v), unpack8(ld128(w + i), g);
    if (add) unpack8(ld128(dx + i), to);
#pragma unroll
    for (int j = 0; j < 8; j++) to[j] = fmaf(s, fmaf(-mean, v[j], d[j] * g[j]), to[j]);
    st128(dx + i, pack8(to));
  }
}
EXPORT_KERNEL(rms_norm_bwd_bf16)
