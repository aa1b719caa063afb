// gemm: out[r,i] (+)= sum_j x[r,j] * w[i,j] + bias[i], for many rows, on tensor cores
// shapes:   x [rows, k] bf16; w [n, k] bf16; bias [n] bf16, or null for none; out [rows, n], by epilogue: store bf16, add
//           bf16 (read and written), f32 f32; sums f32, arrived u32 (0 before and after): scratch, by Gemm::workspace.
// rounding: products exact, sums in f32, one rounding at the store (none for f32); add: the sum is added in f32 to what is
//           there, then rounded. The columns of k are taken in parts of `part`, which n and k alone decide: within a part by
//           mma.m16n8k16 over j in steps of 16 from 0 up, then part by part. Both tiles do so, so the bits of a row depend
//           on neither the tile nor the other rows: a chunked prompt gives the same numbers.
// mapping:  one block per SIDE x SIDE tile of out, row tiles fastest, so that the blocks of a wave share their tiles of w.
//           Four warps share it, each with a quarter: SIDE/2 x SIDE/2. Tiles: 128 (32 columns of k a stage) where that fills
//           the device, else 64 (64 columns a stage). Both use 48 KiB of shared memory: two blocks fit the SMs with 100 KB.
//           The large tile's 255 registers allow two as well, eight warps an SM.
// parts:    the small tile has a block for each part, of which the last to arrive adds them up: few rows of a matrix of 4096
//           rows make 64 tiles, which leave half of an SM of an H100 idle and have 1 MB of w in flight; 4 parts make 256
//           blocks. The large tile's blocks take all parts, one after the other. Where n is large there is one part.
// pipeline: GEMM_STAGES stages of cp.async, one barrier a stage. Shared rows are 16-byte chunks, permuted by row so that
//           both the copies and ldmatrix touch all banks evenly.
// traffic:  reads 2*k*(rows + n) bytes, writes 2*rows*n (4 for f32; add also reads them). = Gemm::cost, for store. With P
//           parts, besides, from and to L2: 8*P*rows*n by the small tile, 8*(P-1)*rows*n by the large one. Of 4096x4096 in 4
//           parts that is 8 MB at 64 rows (w is 34 MB, and the sums overlap it), 67 MB at 512, 201 MB at 2048, some 40 us of
//           the 115 that its products take there: the price of a row's bits that do not depend on the other rows. From 512
//           rows on cuBLAS computes instead where it is installed.
//           Predicted, not measured: shared memory's 128 bytes a clock let the large tile's 64x64 a warp, which read 4 KB
//           for 64 mma, reach about 600 TFLOP/s on an H100, near what mma.sync can; 64x32, 3 KB for 32, were held to 433.
//           4096x14336 at 17 to 64 rows: 101 us with 64 blocks, by latency and 16 KB of w in flight a block; with 4 parts
//           what 117 MB take, 27 us, and some 5 for the sums and the seams.
// requires: k % 8 == 0                                                          (Gemm::launch in src/ops/gemm.rs)
// source:   ours, from the published tilings of tensor-core GEMM (CUTLASS documentation, "Efficient GEMM"; its "split-K").
//           Not yet measured.
#include "common/gemm.cuh"
#include "common/packed.cuh"

GEMM(gemm_bf16_large_store, GEMM_LARGE_SIDE, GEMM_LARGE_DEPTH, false, 2, false, STORE)
GEMM(gemm_bf16_large_add, GEMM_LARGE_SIDE, GEMM_LARGE_DEPTH, false, 2, false, ADD)
GEMM(gemm_bf16_large_f32, GEMM_LARGE_SIDE, GEMM_LARGE_DEPTH, false, 2, false, F32)
GEMM(gemm_bf16_small_store, GEMM_SMALL_SIDE, GEMM_SMALL_DEPTH, true, 4, false, STORE)
GEMM(gemm_bf16_small_add, GEMM_SMALL_SIDE, GEMM_SMALL_DEPTH, true, 4, false, ADD)
GEMM(gemm_bf16_small_f32, GEMM_SMALL_SIDE, GEMM_SMALL_DEPTH, true, 4, false, F32)

// gemm_<kind>_widen: out [n, k] bf16 of packed w, for the kernels above: scale * code, rounded once. A warp a record.
template <class F> DEV void widen(bf16* out, const unsigned char* w, int n, int k) {
  int record = blockIdx.x * (WIDEN_THREADS / 32) + threadIdx.x / 32, of_rows = (k + 63) / 64;
  if (record >= n / 8 * of_rows) return;
  int lane = threadIdx.x & 31, row = record / of_rows * 8 + (lane >> 2), column = record % of_rows * 64 + (lane & 3) * 8;
  F f;
  f.load(w + (int64_t)record * F::RECORD);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float scale = f.scale[half * 32 / F::GROUP] * F::UNIT, v[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t pair = f.pair(half * 4 + i);
      v[2 * i] = scale * bf_lo(pair), v[2 * i + 1] = scale * bf_hi(pair);
    }
    int at = column + half * 32;
    if (at < k) st128(out + (int64_t)row * k + at, pack8(v));
  }
}

#define WIDEN(name, F)                                                                                          \
  extern "C" __global__ void __launch_bounds__(WIDEN_THREADS) name(bf16* out, const unsigned char* w, int n, int k) { \
    widen<F>(out, w, n, k);                                                                                     \
  }                                                                                                             \
  EXPORT_KERNEL(name)
EACH_PACKED(WIDEN, gemm, _widen)
