// swiglu_bwd: dg[r,i] = bf16( dh u s (1 + g (1 - s)) ), du[r,i] = bf16( dh g s ), s = 1 / (1 + exp(-g))       (Shazeer 2020)
// shapes:   d_gate_up and gate_up [rows, 2*ffn_dim] bf16, gate then up in each row; dh [rows, ffn_dim] bf16.
// rounding: f32, one rounding at the store.
// mapping:  block (r, c) computes elements c * 8 * VECTOR_THREADS onwards of row r, 8 (16 bytes) a thread.
// traffic:  reads 6*rows*ffn_dim bytes, writes 4*rows*ffn_dim. = SwigluBwd::cost
//           Predicted, not measured: 16384 rows of 14336 on an H200 are 2.3 GB, 0.54 ms.
// requires: ffn_dim % 8 == 0                                              (SwigluBwd::launch in src/ops/train/swiglu_bwd.rs)
// source:   ours. Not yet measured.
#include "common/device.cuh"
#include "common/tiles.h"

extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
swiglu_bwd_bf16(bf16* d_gate_up, const bf16* dh, const bf16* gate_up, int ffn_dim) {
  int i = (blockIdx.y * VECTOR_THREADS + threadIdx.x) * 8;
  if (i >= ffn_dim) return;
  int64_t r = blockIdx.x;
  float d[8], g[8], u[8];
  unpack8(ld128(dh + r * ffn_dim + i), d);
  unpack8(ld128(gate_up + 2 * r * ffn_dim + i), g);
  unpack8(ld128(gate_up + (2 * r + 1) * ffn_dim + i), u);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    float s = 1.f / (1.f + __expf(-g[j])), by_gate = d[j] * u[j] * s * fmaf(g[j], 1.f - s, 1.f);
    u[j] = d[j] * g[j] * s;
    g[j] = by_gate;
  }
  st128(d_gate_up + 2 * r * ffn_dim + i, pack8(g));
  st128(d_gate_up + (2 * r + 1) * ffn_dim + i, pack8(u));
}
EXPORT_KERNEL(swiglu_bwd_bf16)
