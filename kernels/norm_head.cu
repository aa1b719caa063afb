// norm_head: logits[r,i] = sum_j norm(x[first+r])[j] * w[i,j], norm(x)[j] = x[j] * rsqrt(mean_j(x[j]^2) + eps) * gain[j].
// shapes:   logits [rows, vocab] f32; x [first+rows, dim] bf16; gain [dim] bf16; w [vocab, dim] bf16 or packed.
// rounding: x * gain to bf16 (the definition rounds x * gain / rms there), sums in f32, kept in f32.
// mapping:  common/gemv.cuh; block b owns rows 16b to 16b + 15 of w, thread 8r + i stores outputs i and i + 8 of row r.
// traffic:  reads 2*vocab*dim + 2*dim + 2*rows*dim (x and gain from L2 once per block); writes 4*rows*vocab.
//           = NormHead::cost. Predicted, not measured, at 4.37 TB/s: 128256x4096 1051 MB 240 us.
// requires: dim % 8 == 0, vocab >= 16, rows <= DECODE_ROWS            (NormHead::check in src/ops/norm_head.rs)
// source:   ours, see common/gemv.cuh. Not yet measured.
#include "common/gemv.cuh"
#include "common/trace.cuh"

template <class F, int MOST, int STAGES>
DEV void norm_head(const Traced& traced, float* logits, const bf16* x, const bf16* gain, const typename F::Element* w,
                   int rows, int first, int dim, int vocab, float eps) {
  int tile = blockIdx.x * GEMV_TILE, row = min(tile, vocab - GEMV_TILE);  // the last block may repeat some of the rows
  Product<F, true, MOST, STAGES, HEAD_TRIGGER> p;
  p.begin(w, row, row + 8, rows, dim);
  grid_dependency_wait();
  traced.ready();
  p.run(x + (int64_t)first * dim, gain);
  float2 y = p.total(eps);
  int r = threadIdx.x / 8, i = row + threadIdx.x % 8;
  if (r >= p.rows) return;
  logits += (int64_t)r * vocab;
  if (i >= tile) logits[i] = y.x;
  if (i + 8 >= tile) logits[i + 8] = y.y;
}

#define NORM_HEAD(name, F, MOST, STAGES, BLOCKS)                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                   \
      name(float* logits, const bf16* x, const bf16* gain, const F::Element* w, int rows, int first, int dim,     \
           int vocab, float eps, Span* trace) {                                                                   \
    Traced traced(trace);                                                                                         \
    norm_head<F, MOST, STAGES>(traced, logits, x, gain, w, rows, first, dim, vocab, eps);                            \
  }                                                                                                               \
  EXPORT_KERNEL(name)

#define NORM_HEAD_PACKED(name, F) PACKED_PRODUCT(NORM_HEAD, name, F, GEMV_BLOCKS - 1)

EACH_PRODUCT(NORM_HEAD, norm_head_bf16)
EACH_PACKED(NORM_HEAD_PACKED, norm_head, )
