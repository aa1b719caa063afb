// linear_dx: dx[r,j] = sum_i dy[r,i] w[i,j]: the gradient of the input of y = x w^T, whose w is frozen
// shapes:   dx [rows, k] bf16; dy [rows, n] bf16; w [n, k] bf16; sums f32, arrived u32 (0 before and after): scratch, by
//           Gemm::workspace with k for n and n for k.
// rounding: products exact, sums in f32 as in gemm: by mma.m16n8k16 over i in steps of 16 from 0 up within a part, then part by
//           part; one rounding at the store. The bits of a row depend on neither the tile nor the other rows.
// mapping:  that of gemm: one block per SIDE x SIDE tile of dx, four warps with a quarter each. A stage of w is [DEPTH][SIDE], rows
//           as they are in memory, which ldmatrix turns (.trans).
// pipeline: GEMM_STAGES stages of cp.async, one barrier a stage.
// traffic:  reads 2*n*(rows + k) bytes, writes 2*rows*k. = LinearDx::cost. Parts as in gemm.
//           Predicted, not measured: as gemm, about 600 TFLOP/s on an H100 with the large tile; 16384 rows of 4096 x 14336 take
//           3.2 ms. From 512 rows on cuBLAS computes instead where it is installed.
// requires: n % 8 == 0, k % 8 == 0                                        (LinearDx::launch in src/ops/train/linear_dx.rs)
// source:   ours; see gemm. Not yet measured.
#include "common/gemm.cuh"

GEMM(linear_dx_bf16_large, GEMM_LARGE_SIDE, GEMM_LARGE_DEPTH, false, 2, true, STORE)
GEMM(linear_dx_bf16_small, GEMM_SMALL_SIDE, GEMM_SMALL_DEPTH, true, 4, true, STORE)
