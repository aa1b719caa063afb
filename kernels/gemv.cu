// gemv: out[r,i] = epilogue( sum_j x[r,j] * w[i,j] + bias[i] ), 1 to 16 rows of x; store as bf16, add to bf16, or keep f32.
// shapes:   out [rows, n] bf16 or f32; x [rows, k] bf16; w [n, k] bf16, or packed (common/packed.cuh);
//           bias [n] bf16, or null for none.
// rounding: products exact, sums in f32 on tensor cores, one rounding at the store (after the additions of bias and
//           residual).
// mapping:  common/gemv.cuh; block b owns rows 16b to 16b + 15 of w, thread 8r + i stores outputs i and i + 8 of row r.
// traffic:  reads 2*n*k + 2*rows*k (x from L2 once per block, usually from L1) and for add 2*rows*n; writes 2*rows*n,
//           for f32 4. = Gemv::cost (store). Predicted, not measured, at 4.37 TB/s: 4096x4096 33.6 MB 7.7 us;
//           4096x14336 117.4 MB 26.9 us; the seams of a layer of Llama-3-8B on an H200 lose 5.6 us in the model of
//           docs/decode-step.md, 15.2 with short rings and the trigger at once.
// packed:   n % 8 == 0; bytes of w by kind, 8.5 or 4.5 bits a weight; common/gemv.cuh counts their instructions.
// requires: k % 8 == 0, rows <= DECODE_ROWS, n and k up to 2^30   (Gemv::check, Gemv::check_kernel in src/ops/gemv.rs)
// source:   ours, see common/gemv.cuh. Not yet measured.
#include "common/gemv.cuh"
#include "common/trace.cuh"

enum Epilogue { STORE, ADD, F32 };

template <Epilogue E, class F, int MOST, int STAGES, class T>
DEV void gemv(const Traced& traced, T* out, const bf16* x, const typename F::Element* w, const bf16* bias, int rows, int n,
              int k) {
  int tile = blockIdx.x * GEMV_TILE, first = min(tile, n - GEMV_TILE);  // the last block may repeat rows of the one before
  Product<F, false, MOST, STAGES, GEMV_TRIGGER> p;
  p.begin(w, first, first + 8, rows, k);
  int r = threadIdx.x / 8, i = first + threadIdx.x % 8;
  float2 add = biases(bias, i, i + 8);  // early: their latency would show at the end
  grid_dependency_wait();
  traced.ready();

  bool stores[2] = {r < p.rows && i >= tile, r < p.rows && i + 8 >= tile};
  out += (int64_t)r * n + i;
  float residual[2] = {};  // early, too
  if constexpr (E == ADD) {
    if (stores[0]) residual[0] = __bfloat162float(out[0]);
    if (stores[1]) residual[1] = __bfloat162float(out[8]);
  }
  p.run(x, nullptr);
  float2 y = p.total(0.f);
  y.x += add.x, y.y += add.y;
  if constexpr (E == F32) {
    if (stores[0]) out[0] = y.x;
    if (stores[1]) out[8] = y.y;
  } else {
    if (stores[0]) out[0] = __float2bfloat16(y.x + residual[0]);
    if (stores[1]) out[8] = __float2bfloat16(y.y + residual[1]);
  }
}

#define GEMV(name, E, T, F, MOST, STAGES, BLOCKS)                                             \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                               \
      name(T* out, const bf16* x, const F::Element* w, const bf16* bias, int rows, int n, int k, Span* trace) { \
    Traced traced(trace);                                                                     \
    gemv<E, F, MOST, STAGES>(traced, out, x, w, bias, rows, n, k);                                  \
  }                                                                                           \
  EXPORT_KERNEL(name)
#define GEMV_STORE(name, F, MOST, STAGES, BLOCKS) GEMV(name, STORE, bf16, F, MOST, STAGES, BLOCKS)
#define GEMV_ADD(name, F, MOST, STAGES, BLOCKS) GEMV(name, ADD, bf16, F, MOST, STAGES, BLOCKS)
#define GEMV_F32(name, F, MOST, STAGES, BLOCKS) GEMV(name, F32, float, F, MOST, STAGES, BLOCKS)
#define GEMV_PACKED(name, F) PACKED_PRODUCT(GEMV_ADD, name, F, GEMV_BLOCKS)

// What is supported: bf16 weights, three epilogues, 1 to DECODE_ROWS rows; packed weights with the epilogue of a step.
EACH_PRODUCT(GEMV_STORE, gemv_bf16_store)
EACH_PRODUCT(GEMV_ADD, gemv_bf16_add)
EACH_PRODUCT(GEMV_F32, gemv_bf16_f32)
EACH_PACKED(GEMV_PACKED, gemv, _add)
