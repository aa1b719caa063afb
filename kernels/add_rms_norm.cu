// add_rms_norm: x[r,i] = bf16( x[r,i] + d[r,i] ); out[r,i] = bf16( x[r,i] * rsqrt(mean_i(x[r,i]^2) + eps) * w[i] )
// shapes:   out, x, d [rows, dim] bf16; w [dim] bf16.
// rounding: the sum is rounded when it is stored, and the norm is that of the rounded sum; then as rms_norm: one rounding at the
//           store.
// mapping:  one block per row, NORM_THREADS threads, 8 elements (16 bytes) per thread per pass.
// traffic:  reads 4*rows*dim + 2*dim bytes (the second pass comes from the caches), writes 4*rows*dim.
//           = AddRmsNorm::cost
// requires: dim % 8 == 0                                           (AddRmsNorm::launch in src/ops/add_rms_norm.rs)
// source:   ours. Not yet measured.
#include "common/device.cuh"
#include "common/tiles.h"
#include "common/trace.cuh"

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
add_rms_norm_bf16(bf16* out, bf16* x, const bf16* d, const bf16* w, int dim, float eps, Span* trace) {
  Traced traced(trace);
  SHARED(float, scratch, 32);
  int64_t row = (int64_t)blockIdx.x * dim;
  out += row, x += row, d += row;
  float sum = 0.f;
  for (int i = threadIdx.x * 8; i < dim; i += NORM_THREADS * 8) {
    float v[8], u[8];
    unpack8(ld128(x + i), v);
    unpack8(ld128(d + i), u);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] += u[j];
    uint4 rounded = pack8(v);
    st128(x + i, rounded);
    unpack8(rounded, v);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += v[j] * v[j];
  }
  float scale = rsqrtf(block_sum(sum, scratch) / dim + eps);
  for (int i = threadIdx.x * 8; i < dim; i += NORM_THREADS * 8) {  // a thread reads what it wrote itself
    float v[8], g[8];
    unpack8(ld128(x + i), v);
    unpack8(ld128(w + i), g);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] *= scale * g[j];
    st128(out + i, pack8(v));
  }
}
EXPORT_KERNEL(add_rms_norm_bf16)
