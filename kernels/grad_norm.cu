// grad_norm: norm[0] = sqrt(sum_i grads[i]^2): the gradient's length
// shapes:   norm [1] f32; grads [len] f32; parts [ceil(len / GRAD_NORM_PART)] f32: scratch.
// rounding: f32; a thread adds some 80 sums of a part at most for 84 million parameters, then a tree.
// order:    each GRAD_NORM_PART elements are summed by a block, then these sums by one: two kernels, the same order on every GPU.
// mapping:  _parts: one block per part; _root: one block. 4 elements (16 bytes) a thread at a time in _parts.
// traffic:  reads 4*len bytes, writes 4. = GradNorm::cost
//           Predicted, not measured: 84 million parameters on an H200: 77 us.
// requires: grads aligned to 16 bytes                                     (GradNorm::launch in src/ops/train/grad_norm.rs)
// source:   ours. Not yet measured.
#include "common/device.cuh"
#include "common/tiles.h"

extern "C" __global__ void __launch_bounds__(GRAD_NORM_THREADS)
grad_norm_parts_f32(float* parts, const float* grads, int len) {
  SHARED(float, scratch, 32);
  float sum = 0.f;
#pragma unroll
  for (int m = 0; m < GRAD_NORM_PART / 4 / GRAD_NORM_THREADS; m++) {
    int64_t i = (int64_t)blockIdx.x * GRAD_NORM_PART + (m * GRAD_NORM_THREADS + threadIdx.x) * 4;
    if (i + 3 < len) {
      uint4 v = ld128(grads + i);
      float g[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
#pragma unroll
      for (int e = 0; e < 4; e++) sum = fmaf(g[e], g[e], sum);
    } else {
      for (; i < len; i++) sum = fmaf(grads[i], grads[i], sum);
    }
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
EXPORT_KERNEL(grad_norm_parts_f32)

extern "C" __global__ void __launch_bounds__(GRAD_NORM_THREADS)
grad_norm_root_f32(float* norm, const float* parts, int count) {
  SHARED(float, scratch, 32);
  float sum = 0.f;
  for (int i = threadIdx.x; i < count; i += GRAD_NORM_THREADS) sum += parts[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) norm[0] = sqrtf(sum);
}
EXPORT_KERNEL(grad_norm_root_f32)
