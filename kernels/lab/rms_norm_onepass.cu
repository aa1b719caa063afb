// rms_norm, variant onepass: the same formula, shapes, rounding and order of sums as kernels/rms_norm.cu.
// idea:     the shipped kernel reads the row again, and the weight for the first time, after the reduction: two latencies
//           one after the other. Here row and weight are loaded before it and stay in registers: one latency.
// mapping:  one block per row; a thread keeps KEPT * 8 columns, so the block keeps 8192; what is beyond is read again.
// expected: faster where latency is all there is (a few rows on each multiprocessor), no difference where the memory is
//           busy. Not yet measured.
#include "common/device.cuh"
#include "common/tiles.h"

constexpr int KEPT = 4;                // chunks of 8 columns that a thread keeps
constexpr int PASS = NORM_THREADS * 8;  // columns of a chunk of the block

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
rms_norm_bf16__onepass(bf16* out, const bf16* x, const bf16* w, int first, int dim, float eps) {
  SHARED(float, scratch, 32);
  x += (int64_t)(first + blockIdx.x) * dim;
  out += (int64_t)blockIdx.x * dim;
  int start = threadIdx.x * 8;
  uint4 row[KEPT], weight[KEPT];
#pragma unroll
  for (int p = 0; p < KEPT; p++) {
    int i = start + p * PASS;
    if (i < dim) row[p] = ld128(x + i), weight[p] = ld128(w + i);
  }
  float sum = 0.f;
#pragma unroll
  for (int p = 0; p < KEPT; p++) {
    if (start + p * PASS >= dim) break;
    float v[8];
    unpack8(row[p], v);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += v[j] * v[j];
  }
  for (int i = start + KEPT * PASS; i < dim; i += PASS) {
    float v[8];
    unpack8(ld128(x + i), v);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += v[j] * v[j];
  }
  float scale = rsqrtf(block_sum(sum, scratch) / dim + eps);
  auto store = [&](int i, uint4 r, uint4 g) {
    float v[8], f[8];
    unpack8(r, v);
    unpack8(g, f);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] *= scale * f[j];
    st128(out + i, pack8(v));
  };
#pragma unroll
  for (int p = 0; p < KEPT; p++) {
    int i = start + p * PASS;
    if (i < dim) store(i, row[p], weight[p]);
  }
  for (int i = start + KEPT * PASS; i < dim; i += PASS) store(i, ld128(x + i), ld128(w + i));
}
EXPORT_KERNEL(rms_norm_bf16__onepass)
