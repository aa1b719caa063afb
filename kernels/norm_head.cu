// norm_head: logits[r,i] = sum_j norm(x[first+r])[j] * w[i,j], norm(x)[j] = x[j] * rsqrt(mean_j(x[j]^2) + eps) * gain[j].
// shapes:   logits [rows, vocab] f32; x [first+rows, dim] bf16; gain [dim] bf16; w [vocab, dim] bf16.
// rounding: x * gain to bf16 (the definition rounds x * gain / rms there), sums in f32, kept in f32.
// mapping:  common/gemv.cuh; block b owns rows 16b to 16b + 15 of w, thread (r, i) stores one output.
// traffic:  reads 2*vocab*dim + 2*dim + 2*rows*dim (x and gain from L2 once per block); writes 4*rows*vocab.
//           = NormHead::cost. Predicted, not measured, at 4.37 TB/s: 128256x4096 1051 MB 240 us.
// requires: dim % 8 == 0, vocab >= 16, rows <= DECODE_ROWS            (NormHead::check in src/ops/norm_head.rs)
// source:   ours, see common/gemv.cuh. Not yet measured.
#include "common/gemv.cuh"
#include "common/trace.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, GEMV_BLOCKS)
norm_head_bf16(float* logits, const bf16* x, const bf16* gain, const bf16* w, int rows, int first, int dim, int vocab,
               float eps, Span* trace) {
  Traced traced(trace);
  int tile = blockIdx.x * GEMV_TILE, row = min(tile, vocab - GEMV_TILE);  // the last block may repeat some of the rows
  Product<true> p;
  p.begin(w + (int64_t)row * dim, w + (int64_t)(row + 8) * dim, rows, dim);
  grid_dependency_wait();
  traced.ready();
  grid_launch_dependents();
  p.run(x + (int64_t)first * dim, gain);
  float y = p.total(eps);
  int r = threadIdx.x / GEMV_TILE, i = row + threadIdx.x % GEMV_TILE;
  if (r < rows && i >= tile) logits[(int64_t)r * vocab + i] = y;
}
EXPORT_KERNEL(norm_head_bf16)
