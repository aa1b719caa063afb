// rms_norm: out[r,i] = bf16( x[first+r,i] * rsqrt(mean_i(x[first+r,i]^2) + eps) * w[i] )      (Zhang & Sennrich 2019)
// shapes:   out [rows, dim] bf16; x [first+rows, dim] bf16; w [dim] bf16.
// rounding: sums in f32, one rounding at the store (HF also rounds before the multiply by w: about 1 ulp apart).
// mapping:  one block per row, NORM_THREADS threads, 8 elements (16 bytes) per thread per pass.
// traffic:  reads 2*rows*dim + 2*dim bytes (the second pass comes from the caches), writes 2*rows*dim. = RmsNorm::cost
// requires: dim % 8 == 0                                               (RmsNorm::launch in src/ops/rms_norm.rs)
// source:   ours. Not yet measured.
#include "common/device.cuh"
#include "common/tiles.h"
#include "common/trace.cuh"

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
rms_norm_bf16(bf16* out, const bf16* x, const bf16* w, int first, int dim, float eps, Span* trace) {
  Traced traced(trace);
  SHARED(float, scratch, 32);
  x += (int64_t)(first + blockIdx.x) * dim;
  out += (int64_t)blockIdx.x * dim;
  float sum = 0.f;
  for (int i = threadIdx.x * 8; i < dim; i += NORM_THREADS * 8) {
    float v[8];
    unpack8(ld128(x + i), v);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += v[j] * v[j];
  }
  float scale = rsqrtf(block_sum(sum, scratch) / dim + eps);
  for (int i = threadIdx.x * 8; i < dim; i += NORM_THREADS * 8) {
    float v[8], g[8];
    unpack8(ld128(x + i), v);
    unpack8(ld128(w + i), g);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] *= scale * g[j];
    st128(out + i, pack8(v));
  }
}
EXPORT_KERNEL(rms_norm_bf16)
