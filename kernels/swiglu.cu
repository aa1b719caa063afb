// swiglu: hb[r,i] = bf16( silu(gate[r,i]) * up[r,i] ), silu(g) = g / (1 + exp(-g))                       (Shazeer 2020)
// shapes:   hb [rows, ffn_dim] bf16; gate_up [rows, 2*ffn_dim] bf16, gate then up in each row.
// rounding: f32, one rounding at the store; __expf errs by 2 + 1.2 |g| ulp of f32 (CUDA guide), far below it.
// mapping:  block (r, c) computes elements c * 8 * VECTOR_THREADS onwards of row r, 8 (16 bytes) a thread.
// traffic:  reads 4*rows*ffn_dim bytes, writes 2*rows*ffn_dim. = Swiglu::cost
// requires: ffn_dim % 8 == 0                                                 (Swiglu::launch in src/ops/swiglu.rs)
// source:   ours. Not yet measured.
#include "common/device.cuh"
#include "common/tiles.h"
#include "common/trace.cuh"

extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
swiglu_bf16(bf16* hb, const bf16* gate_up, int ffn_dim, Span* trace) {
  Traced traced(trace);
  int i = (blockIdx.y * VECTOR_THREADS + threadIdx.x) * 8;
  if (i >= ffn_dim) return;
  int64_t r = blockIdx.x;
  float g[8], u[8];
  unpack8(ld128(gate_up + 2 * r * ffn_dim + i), g);
  unpack8(ld128(gate_up + (2 * r + 1) * ffn_dim + i), u);
#pragma unroll
  for (int j = 0; j < 8; j++) g[j] = g[j] / (1.f + __expf(-g[j])) * u[j];
  st128(hb + r * ffn_dim + i, pack8(g));
}
EXPORT_KERNEL(swiglu_bf16)
