// adamw: g *= clip; m += mix1 (g - m); v = beta2 v + mix2 g^2; w = keep w - rate m / (sqrt(v) / root + eps); g = 0
//                                                                                                  (Loshchilov & Hutter 2019)
// shapes:   w, m, v, grads [len] f32; norm [1] f32. clip = min(1, max_norm / (norm + 1e-6)), 1 where max_norm is 0.
// rounding: f32, as written, with the multiplications and additions of m, v and w fused.
// mapping:  4 elements (16 bytes) a thread.
// traffic:  reads 16*len bytes, writes 16*len. = AdamW::cost
//           Predicted, not measured: 84 million parameters on an H200 are 2.7 GB, 0.61 ms, once a step.
// requires: all aligned to 16 bytes                                             (AdamW::launch in src/ops/train/adamw.rs)
// source:   as PyTorch's AdamW computes it; code ours. Not yet measured.
#include "common/device.cuh"
#include "common/tiles.h"

// One parameter.
DEV void adamw(float& w, float& m, float& v, float& g, float clip, float keep, float mix1, float beta2, float mix2,
               float root, float eps, float rate) {
  float grad = __fmul_rn(g, clip);  // by itself, not as part of the difference below
  m = fmaf(mix1, grad - m, m);
  v = fmaf(beta2, v, __fmul_rn(__fmul_rn(mix2, grad), grad));
  w = fmaf(w, keep, -(rate * m / (sqrtf(v) / root + eps)));
  g = 0.f;
}

extern "C" __global__ void __launch_bounds__(ADAMW_THREADS)
adamw_f32(float* w, float* m, float* v, float* grads, const float* norm, int len, float max_norm, float keep, float mix1,
          float beta2, float mix2, float root, float eps, float rate) {
  int64_t i = ((int64_t)blockIdx.x * ADAMW_THREADS + threadIdx.x) * 4;
  float clip = max_norm == 0.f ? 1.f : fminf(1.f, max_norm / (norm[0] + 1e-6f));
  auto floats = [](float (&to)[4], const float* from) {
    uint4 u = ld128(from);
    to[0] = __uint_as_float(u.x), to[1] = __uint_as_float(u.y), to[2] = __uint_as_float(u.z), to[3] = __uint_as_float(u.w);
  };
  auto put = [](float* to, const float (&from)[4]) {
    st128(to, make_uint4(__float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]),
                         __float_as_uint(from[3])));
  };
  if (i + 3 < len) {
    float a[4], b[4], c[4], g[4];
    floats(a, w + i), floats(b, m + i), floats(c, v + i), floats(g, grads + i);
#pragma unroll
    for (int e = 0; e < 4; e++) adamw(a[e], b[e], c[e], g[e], clip, keep, mix1, beta2, mix2, root, eps, rate);
    put(w + i, a), put(m + i, b), put(v + i, c), put(grads + i, g);
  } else {
    for (; i < len; i++) adamw(w[i], m[i], v[i], grads[i], clip, keep, mix1, beta2, mix2, root, eps, rate);
  }
}
EXPORT_KERNEL(adamw_f32)
