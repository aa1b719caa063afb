// gemm: out[r,i] (+)= sum_j x[r,j] * w[i,j], for many rows, on tensor cores
// shapes:   x [rows, k] bf16; w [n, k] bf16; out [rows, n], by epilogue: store bf16, add bf16 (read and written), f32 f32.
// rounding: products exact, sums in f32 by mma.m16n8k16 over j in steps of 16 from 0 up, one rounding at the store (none for
//           f32); add: the sum is added in f32 to what is there, then rounded. Both tiles take the steps in the same order,
//           so the bits of a row depend on neither the tile nor the other rows: a chunked prompt gives the same numbers.
// mapping:  one block per SIDE x SIDE tile of out, row tiles fastest, so that the blocks of a wave share their tiles of w.
//           Four warps share it, each with a quarter: SIDE/2 x SIDE/2. Tiles: 128 (32 columns of k a stage) where that fills
//           the device, else 64 (64 columns a stage). Both use 48 KiB of shared memory: two blocks fit the SMs with 100 KB.
//           The large tile's 213 registers allow two as well, eight warps an SM.
// pipeline: GEMM_STAGES stages of cp.async, one barrier a stage. Shared rows are 16-byte chunks, permuted by row so that
//           both the copies and ldmatrix touch all banks evenly.
// traffic:  reads 2*k*(rows + n) bytes, writes 2*rows*n (4 for f32; add also reads them). = Gemm::cost, for store
//           Predicted, not measured: shared memory's 128 bytes a clock let the large tile's 64x64 a warp, which read 4 KB
//           for 64 mma, reach about 600 TFLOP/s on an H100, near what mma.sync can; 64x32, 3 KB for 32, were held to 433.
//           Of 180 instructions a stage and warp 64 are mma (SASS of sm_90a).
// requires: k % 8 == 0                                                          (Gemm::launch in src/ops/gemm.rs)
// source:   ours, from the published tilings of tensor-core GEMM (CUTLASS documentation, "Efficient GEMM"). Not yet measured.
#include "common/device.cuh"
#include "common/tiles.h"

enum Epilogue { STORE, ADD, F32 };

// One or two neighbouring outputs from element `at` on; for a pair, `at` is even.
template <Epilogue E> DEV void put(void* out, int64_t at, float v) {
  if (E == F32) {
    static_cast<float*>(out)[at] = v;
  } else {
    bf16* p = static_cast<bf16*>(out) + at;
    *p = __float2bfloat16(E == ADD ? __bfloat162float(*p) + v : v);
  }
}
template <Epilogue E> DEV void put(void* out, int64_t at, float v0, float v1) {
  if (E == F32) {
    *reinterpret_cast<float2*>(static_cast<float*>(out) + at) = make_float2(v0, v1);
  } else {
    uint32_t* p = reinterpret_cast<uint32_t*>(static_cast<bf16*>(out) + at);
    uint32_t old = E == ADD ? *p : 0;
    *p = E == ADD ? pack_bf16(bf_lo(old) + v0, bf_hi(old) + v1) : pack_bf16(v0, v1);
  }
}

template <int SIDE, int DEPTH, Epilogue E>
DEV void gemm(void* out, const bf16* x, const bf16* w, int rows, int n, int k) {
  constexpr int TILE = SIDE * DEPTH;                         // elements of a stage of x, and of w
  constexpr int STEP = GEMM_THREADS / (DEPTH / 8);           // tile rows that the block copies at a time, one chunk a thread
  constexpr int SPAN = SIDE / 2, MI = SPAN / 16, NI = SPAN / 8;  // a warp's mma tiles: MI of 16 rows, NI of 8 columns
  static_assert(GEMM_THREADS == 4 * 32, "the warps cover the tile");
  static_assert(STEP % 8 == 0 && SIDE % STEP == 0, "a thread's chunks are permuted alike");
  DYN_SHARED(bf16, tiles);  // [GEMM_STAGES][x, w][SIDE][DEPTH]

  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int wm = (warp & 1) * SPAN, wn = (warp >> 1) * SPAN;  // the warp's corner in the tile
  int m0 = blockIdx.x * SIDE, n0 = blockIdx.y * SIDE;   // the tile's corner in out

  int row = threadIdx.x / (DEPTH / 8), chunk = threadIdx.x % (DEPTH / 8);
  const bf16* from_x = x + (int64_t)(m0 + row) * k + chunk * 8;
  const bf16* from_w = w + (int64_t)(n0 + row) * k + chunk * 8;
  // Copies columns [k0, k0 + DEPTH) of both operands; what is outside the matrices becomes zero.
  auto load = [&](int stage, int k0) {
    bf16* to = tiles + stage * 2 * TILE + tile_at<DEPTH>(row, chunk);
    bool in_k = k0 + chunk * 8 < k;
#pragma unroll
    for (int r = 0; r < SIDE; r += STEP) {
      bool in_x = in_k && m0 + row + r < rows, in_w = in_k && n0 + row + r < n;
      cp_async16(to + r * DEPTH, in_x ? from_x + (int64_t)r * k + k0 : x, in_x);
      cp_async16(to + TILE + r * DEPTH, in_w ? from_w + (int64_t)r * k + k0 : w, in_w);
    }
  };

  float acc[MI][NI][4] = {};
  int steps = (k + DEPTH - 1) / DEPTH;
#pragma unroll
  for (int s = 0; s < GEMM_STAGES - 1; s++) {
    if (s < steps) load(s, s * DEPTH);
    cp_commit();  // also when empty, so that the count of groups below holds
  }
  int stage = 0, next = GEMM_STAGES - 1;
  for (int s = 0; s < steps; s++) {
    cp_wait<GEMM_STAGES - 2>();
    __syncthreads();  // everybody's copies of this stage have landed, and everybody has read the stage that `next` overwrites
    if (s + GEMM_STAGES - 1 < steps) load(next, (s + GEMM_STAGES - 1) * DEPTH);
    cp_commit();
    const bf16 *tx = tiles + stage * 2 * TILE, *tw = tx + TILE;
#pragma unroll
    for (int kk = 0; kk < DEPTH; kk += 16) {
      uint32_t a[MI][4], b[NI][2];
#pragma unroll
      for (int i = 0; i < MI; i++) ldmatrix_x4(a[i], tx + tile_at<DEPTH>(wm + i * 16 + (lane & 15), kk / 8 + (lane >> 4)));
#pragma unroll
      for (int j = 0; j < NI; j += 2) {  // two mma tiles of columns: rows of w are columns of the product
        uint32_t t[4];
        ldmatrix_x4(t, tw + tile_at<DEPTH>(wn + j * 8 + (lane & 7) + (lane >> 4) * 8, kk / 8 + (lane >> 3 & 1)));
        b[j][0] = t[0], b[j][1] = t[1], b[j + 1][0] = t[2], b[j + 1][1] = t[3];
      }
#pragma unroll
      for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < NI; j++) mma_m16n8k16(acc[i][j], a[i], b[j]);
    }
    stage = stage + 1 == GEMM_STAGES ? 0 : stage + 1;
    next = next + 1 == GEMM_STAGES ? 0 : next + 1;
  }

#pragma unroll
  for (int i = 0; i < MI; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int r = m0 + wm + i * 16 + half * 8 + (lane >> 2);
      if (r >= rows) continue;
#pragma unroll
      for (int j = 0; j < NI; j++) {
        int c = n0 + wn + j * 8 + (lane & 3) * 2;
        if (c >= n) continue;
        float v0 = acc[i][j][2 * half], v1 = acc[i][j][2 * half + 1];
        int64_t at = (int64_t)r * n + c;
        if (n % 2 == 0) {
          put<E>(out, at, v0, v1);
        } else {
          put<E>(out, at, v0);
          if (c + 1 < n) put<E>(out, at + 1, v1);
        }
      }
    }
}

// The second bound keeps so many blocks on an SM (64K registers), so that one computes while another waits.
#define GEMM(name, SIDE, DEPTH, BLOCKS, E)                                      \
  extern "C" __global__ void __launch_bounds__(GEMM_THREADS, BLOCKS)            \
  name(void* out, const bf16* x, const bf16* w, int rows, int n, int k) {       \
    gemm<SIDE, DEPTH, E>(out, x, w, rows, n, k);                                \
  }                                                                             \
  EXPORT_KERNEL(name)
GEMM(gemm_bf16_large_store, GEMM_LARGE_SIDE, GEMM_LARGE_DEPTH, 2, STORE)
GEMM(gemm_bf16_large_add, GEMM_LARGE_SIDE, GEMM_LARGE_DEPTH, 2, ADD)
GEMM(gemm_bf16_large_f32, GEMM_LARGE_SIDE, GEMM_LARGE_DEPTH, 2, F32)
GEMM(gemm_bf16_small_store, GEMM_SMALL_SIDE, GEMM_SMALL_DEPTH, 4, STORE)
GEMM(gemm_bf16_small_add, GEMM_SMALL_SIDE, GEMM_SMALL_DEPTH, 4, ADD)
GEMM(gemm_bf16_small_f32, GEMM_SMALL_SIDE, GEMM_SMALL_DEPTH, 4, F32)
