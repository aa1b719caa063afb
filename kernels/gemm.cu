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
#include "common/device.cuh"
#include "common/packed.cuh"
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

DEV void st_float4(float* p, const float (&v)[4]) {
  st128(p, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])));
}
DEV void ld_float4(float (&v)[4], const float* p) {
  uint4 u = ld128(p);
  v[0] = __uint_as_float(u.x), v[1] = __uint_as_float(u.y), v[2] = __uint_as_float(u.z), v[3] = __uint_as_float(u.w);
}

// SPLIT: a block computes part blockIdx.z, else all parts.
template <int SIDE, int DEPTH, bool SPLIT, Epilogue E>
DEV void gemm(void* out, float* sums, uint32_t* arrived, const bf16* x, const bf16* w, const bf16* bias, int rows, int n, int k,
              int part) {
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
  int begin = SPLIT ? blockIdx.z * part : 0, end = SPLIT ? min(begin + part, k) : k;  // the block's columns
  // Copies columns [k0, k0 + DEPTH) of both operands; what is outside the matrices becomes zero.
  auto load = [&](int stage, int k0) {
    bf16* to = tiles + stage * 2 * TILE + tile_at<DEPTH>(row, chunk);
    bool in_k = k0 + chunk * 8 < k;  // a part that others follow is whole stages
#pragma unroll
    for (int r = 0; r < SIDE; r += STEP) {
      bool in_x = in_k && m0 + row + r < rows, in_w = in_k && n0 + row + r < n;
      cp_async16(to + r * DEPTH, in_x ? from_x + (int64_t)r * k + k0 : x, in_x);
      cp_async16(to + TILE + r * DEPTH, in_w ? from_w + (int64_t)r * k + k0 : w, in_w);
    }
  };

  float acc[MI][NI][4] = {};
  int tile = blockIdx.y * gridDim.x + blockIdx.x, tile_count = gridDim.x * gridDim.y;
  // The place of this thread's acc[i][j] of a part in sums: a warp's lie side by side.
  auto place = [&](int part, int i, int j) {
    return sums + ((((int64_t)part * tile_count + tile) * MI + i) * NI + j) * (GEMM_THREADS * 4) + threadIdx.x * 4;
  };
  auto store = [&](int part) {
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int j = 0; j < NI; j++) st_float4(place(part, i, j), acc[i][j]);
  };
  // acc = what is stored of a part + acc, or instead of acc.
  auto add_stored = [&](int part, bool to_nothing) {
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int j = 0; j < NI; j++) {
        float old[4];
        ld_float4(old, place(part, i, j));
#pragma unroll
        for (int e = 0; e < 4; e++) acc[i][j][e] = to_nothing ? old[e] : acc[i][j][e] + old[e];
      }
  };

  int steps = (end - begin + DEPTH - 1) / DEPTH, of_part = part / DEPTH, until = of_part;
#pragma unroll
  for (int s = 0; s < GEMM_STAGES - 1; s++) {
    if (s < steps) load(s, begin + s * DEPTH);
    cp_commit();  // also when empty, so that the count of groups below holds
  }
  int stage = 0, next = GEMM_STAGES - 1;
  for (int s = 0; s < steps; s++) {
    cp_wait<GEMM_STAGES - 2>();
    __syncthreads();  // everybody's copies of this stage have landed, and everybody has read the stage that `next` overwrites
    if (s + GEMM_STAGES - 1 < steps) load(next, begin + (s + GEMM_STAGES - 1) * DEPTH);
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
    if (!SPLIT && s + 1 == until && s + 1 < steps) {  // a part is complete, and another follows
      if (until > of_part) add_stored(0, false);
      store(0);
      until += of_part;
#pragma unroll
      for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < NI; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) acc[i][j][e] = 0.f;
    }
  }
  if (!SPLIT && until > of_part) add_stored(0, false);
  if (SPLIT && gridDim.z > 1) {
    uint32_t* before = reinterpret_cast<uint32_t*>(tiles);
    store(blockIdx.z);
    cp_wait<0>();
    __syncthreads();  // all threads have written their sums, which the next line publishes, and are done with the stages
    if (threadIdx.x == 0) before[0] = atomic_add_acq_rel(arrived + tile, 1u);
    __syncthreads();  // everyone knows, and sees the sums of the blocks that came before
    if (before[0] + 1 != gridDim.z) return;
    if (threadIdx.x == 0) arrived[tile] = 0;
    for (int p = 0; p < (int)gridDim.z; p++) add_stored(p, p == 0);  // in their order, its own too
  }
  if (bias) {  // by itself: together with the residual it takes more registers than there are
#pragma unroll
    for (int j = 0; j < NI; j++) {
      int c = n0 + wn + j * 8 + (lane & 3) * 2;
      float b0 = c < n ? __bfloat162float(bias[c]) : 0.f, b1 = c + 1 < n ? __bfloat162float(bias[c + 1]) : 0.f;
#pragma unroll
      for (int i = 0; i < MI; i++) acc[i][j][0] += b0, acc[i][j][1] += b1, acc[i][j][2] += b0, acc[i][j][3] += b1;
    }
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
#define GEMM(name, SIDE, DEPTH, SPLIT, BLOCKS, E)                                                                  \
  extern "C" __global__ void __launch_bounds__(GEMM_THREADS, BLOCKS)                                               \
  name(void* out, float* sums, uint32_t* arrived, const bf16* x, const bf16* w, const bf16* bias, int rows, int n, \
       int k, int part) {                                                                                          \
    gemm<SIDE, DEPTH, SPLIT, E>(out, sums, arrived, x, w, bias, rows, n, k, part);                                 \
  }                                                                                                                \
  EXPORT_KERNEL(name)
GEMM(gemm_bf16_large_store, GEMM_LARGE_SIDE, GEMM_LARGE_DEPTH, false, 2, STORE)
GEMM(gemm_bf16_large_add, GEMM_LARGE_SIDE, GEMM_LARGE_DEPTH, false, 2, ADD)
GEMM(gemm_bf16_large_f32, GEMM_LARGE_SIDE, GEMM_LARGE_DEPTH, false, 2, F32)
GEMM(gemm_bf16_small_store, GEMM_SMALL_SIDE, GEMM_SMALL_DEPTH, true, 4, STORE)
GEMM(gemm_bf16_small_add, GEMM_SMALL_SIDE, GEMM_SMALL_DEPTH, true, 4, ADD)
GEMM(gemm_bf16_small_f32, GEMM_SMALL_SIDE, GEMM_SMALL_DEPTH, true, 4, F32)

// gemm_<kind>_widen: out [n, k] bf16 of packed w, for the kernels above: scale * code, rounded once. A warp a record.
template <class F> DEV void widen(bf16* out, const unsigned char* w, int n, int k) {
  int record = blockIdx.x * (WIDEN_THREADS / 32) + threadIdx.x / 32, of_rows = (k + 63) / 64;
  if (record >= n / 8 * of_rows) return;
  int lane = threadIdx.x & 31, row = record / of_rows * 8 + (lane >> 2), column = record % of_rows * 64 + (lane & 3) * 2;
  F f;
  f.load(w + (int64_t)record * F::RECORD);
#pragma unroll
  for (int sixteen = 0; sixteen < 4; sixteen++)
#pragma unroll
    for (int part = 0; part < 2; part++) {
      int at = column + sixteen * 16 + part * 8;
      uint32_t pair = f.pair(sixteen, part);
      float scale = f.scale[sixteen * 16 / F::GROUP];
      if (at < k)
        *reinterpret_cast<uint32_t*>(out + (int64_t)row * k + at) = pack_bf16(scale * bf_lo(pair), scale * bf_hi(pair));
    }
}

#define WIDEN(name, F)                                                                                          \
  extern "C" __global__ void __launch_bounds__(WIDEN_THREADS) name(bf16* out, const unsigned char* w, int n, int k) { \
    widen<F>(out, w, n, k);                                                                                     \
  }                                                                                                             \
  EXPORT_KERNEL(name)
EACH_PACKED(WIDEN, gemm, _widen)
