// norm_gate_up: hb[r,i] = silu(g) * u, g = sum_j norm(x[r])[j] * w[i,j] + bias[i], u the same with w[ffn_dim+i,j] and its bias;
//           norm(x)[j] = x[j] * rsqrt(mean_j(x[j]^2) + eps) * gain[j], silu(g) = g / (1 + exp(-g))       (Shazeer 2020)
// shapes:   hb [rows, ffn_dim] bf16; x [rows, dim] bf16; gain [dim] bf16; w [2*ffn_dim, dim] bf16 or packed, gate rows then up;
//           bias [2*ffn_dim] bf16, or null for none.
// rounding: x * gain to bf16 (the definition rounds x * gain / rms there), sums, silu and product in f32, one rounding
//           at the store: those of gate and up are gone.
// mapping:  common/gemv.cuh; block b owns rows 8b to 8b + 7 of gate and of up, so that both of a pair end in one thread.
// traffic:  reads 4*ffn_dim*dim + 2*dim + 2*rows*dim (x and gain from L2 once per block); writes 2*rows*ffn_dim.
//           = NormGateUp::cost. Predicted, not measured, at 4.37 TB/s: 28672x4096 234.9 MB 53.7 us.
// requires: dim % 8 == 0, ffn_dim % 8 == 0, rows <= DECODE_ROWS      (NormGateUp::check in src/ops/norm_gate_up.rs)
// source:   ours, see common/gemv.cuh. Not yet measured.
#include "common/gemv.cuh"
#include "common/trace.cuh"

template <class F, int MOST, int STAGES>
DEV void norm_gate_up(const Traced& traced, bf16* hb, const bf16* x, const bf16* gain, const typename F::Element* w,
                      const bf16* bias, int rows, int dim, int ffn_dim, float eps) {
  Product<F, true, MOST, STAGES, GATE_UP_TRIGGER> p;
  p.begin(w, blockIdx.x * 8, ffn_dim + blockIdx.x * 8, rows, dim);
  int r = threadIdx.x / 8, i = blockIdx.x * 8 + threadIdx.x % 8;
  float2 add = biases(bias, i, ffn_dim + i);  // early: their latency would show at the end
  grid_dependency_wait();
  traced.ready();
  p.run(x, gain);
  float2 y = p.total(eps);
  y.x += add.x, y.y += add.y;
  if (r < p.rows) hb[(int64_t)r * ffn_dim + i] = __float2bfloat16(y.x / (1.f + __expf(-y.x)) * y.y);
}

#define NORM_GATE_UP(name, F, MOST, STAGES, BLOCKS)                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                 \
      name(bf16* hb, const bf16* x, const bf16* gain, const F::Element* w, const bf16* bias, int rows, int dim, \
           int ffn_dim, float eps, Span* trace) {                                                               \
    Traced traced(trace);                                                                                       \
    norm_gate_up<F, MOST, STAGES>(traced, hb, x, gain, w, bias, rows, dim, ffn_dim, eps);                       \
  }                                                                                                             \
  EXPORT_KERNEL(name)

#define NORM_GATE_UP_PACKED(name, F) PACKED_PRODUCT(NORM_GATE_UP, name, F, GEMV_BLOCKS - 1)

EACH_PRODUCT(NORM_GATE_UP, norm_gate_up_bf16)
EACH_PACKED(NORM_GATE_UP_PACKED, norm_gate_up, )
