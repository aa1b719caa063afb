// gemv: out[r,i] = epilogue( sum_j x[r,j] * w[i,j] ), 1 to 8 rows of x; store as bf16, add to bf16, or keep f32.
// shapes:   out [rows, n] bf16 or f32; x [rows, k] bf16; w [n, k] bf16.
// rounding: products exact, sums in f32 on tensor cores, one rounding at the store (after the residual's addition).
// mapping:  common/gemv.cuh; block b owns rows 16b to 16b + 15 of w, thread (r, i) stores one output.
// traffic:  reads 2*n*k + 2*rows*k (x from L2 once per block, usually from L1) and for add 2*rows*n; writes 2*rows*n,
//           for f32 4. = Gemv::cost (store). Predicted, not measured, at 4.37 TB/s: 4096x4096 33.6 MB 7.7 us;
//           4096x14336 117.4 MB 26.9 us; plus about 2 us to fill and drain where no other kernel overlaps.
// requires: k % 8 == 0, rows <= DECODE_ROWS, n and k up to 2^30   (Gemv::check, Gemv::check_kernel in src/ops/gemv.rs)
// source:   ours, see common/gemv.cuh. Not yet measured.
#include "common/gemv.cuh"
#include "common/trace.cuh"

enum Epilogue { STORE, ADD, F32 };

template <Epilogue E, class T>
DEV void gemv(const Traced& traced, T* out, const bf16* x, const bf16* w, int rows, int n, int k) {
  int tile = blockIdx.x * GEMV_TILE, first = min(tile, n - GEMV_TILE);  // the last block may repeat rows of the one before
  Product<false> p;
  p.begin(w + (int64_t)first * k, w + (int64_t)(first + 8) * k, rows, k);
  grid_dependency_wait();
  traced.ready();
  grid_launch_dependents();

  int r = threadIdx.x / GEMV_TILE, i = first + threadIdx.x % GEMV_TILE;
  bool stores = r < rows && i >= tile;
  int64_t at = (int64_t)r * n + i;
  float residual = 0.f;  // early: its latency would show at the end
  if constexpr (E == ADD) {
    if (stores) residual = __bfloat162float(out[at]);
  }
  p.run(x, nullptr);
  float y = p.total(0.f);
  if (!stores) return;
  if constexpr (E == F32)
    out[at] = y;
  else
    out[at] = __float2bfloat16(y + residual);
}

#define GEMV(name, E, T)                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS, GEMV_BLOCKS)                   \
      name(T* out, const bf16* x, const bf16* w, int rows, int n, int k, Span* trace) { \
    Traced traced(trace);                                                              \
    gemv<E>(traced, out, x, w, rows, n, k);                                            \
  }                                                                                    \
  EXPORT_KERNEL(name)

// What is supported: bf16 weights, three epilogues, 1 to DECODE_ROWS rows.
GEMV(gemv_bf16_store, STORE, bf16)
GEMV(gemv_bf16_add, ADD, bf16)
GEMV(gemv_bf16_f32, F32, float)
