// gemm.cuh - the matrix product on tensor cores of gemm.cu, where it is described, and of linear_dx.cu, which turns w.
#pragma once
#include "device.cuh"
#include "tiles.h"

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

// SPLIT: a block computes part blockIdx.z, else all parts. TURNED: w is [k, n], and a column of it is summed over.
template <int SIDE, int DEPTH, bool SPLIT, bool TURNED, Epilogue E>
DEV void gemm(void* out, float* sums, uint32_t* arrived, const bf16* x, const bf16* w, const bf16* bias, int rows, int n, int k,
              int part) {
  constexpr int TILE = SIDE * DEPTH;                         // elements of a stage of x, and of w
  constexpr int STEP = GEMM_THREADS / (DEPTH / 8);           // tile rows that the block copies at a time, one chunk a thread
  constexpr int STEP_K = GEMM_THREADS / (SIDE / 8);          // the same of w if it is turned: its tile is [DEPTH][SIDE]
  constexpr int SPAN = SIDE / 2, MI = SPAN / 16, NI = SPAN / 8;  // a warp's mma tiles: MI of 16 rows, NI of 8 columns
  static_assert(GEMM_THREADS == 4 * 32, "the warps cover the tile");
  static_assert(STEP % 8 == 0 && SIDE % STEP == 0, "a thread's chunks are permuted alike");
  static_assert(STEP_K % 8 == 0 && DEPTH % STEP_K == 0, "a thread's chunks are permuted alike");
  DYN_SHARED(bf16, tiles);  // [GEMM_STAGES][x, w][SIDE][DEPTH]

  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int wm = (warp & 1) * SPAN, wn = (warp >> 1) * SPAN;  // the warp's corner in the tile
  int m0 = blockIdx.x * SIDE, n0 = blockIdx.y * SIDE;   // the tile's corner in out

  int row = threadIdx.x / (DEPTH / 8), chunk = threadIdx.x % (DEPTH / 8);
  const bf16* from_x = x + (int64_t)(m0 + row) * k + chunk * 8;
  int row_k = threadIdx.x / (SIDE / 8), chunk_k = threadIdx.x % (SIDE / 8);
  const bf16* from_w = TURNED ? w + (int64_t)row_k * n + n0 + chunk_k * 8 : w + (int64_t)(n0 + row) * k + chunk * 8;
  int begin = SPLIT ? blockIdx.z * part : 0, end = SPLIT ? min(begin + part, k) : k;  // the block's columns
  // Copies columns [k0, k0 + DEPTH) of both operands; what is outside the matrices becomes zero.
  auto load = [&](int stage, int k0) {
    bf16* to = tiles + stage * 2 * TILE + tile_at<DEPTH>(row, chunk);
    bool in_k = k0 + chunk * 8 < k;  // a part that others follow is whole stages
#pragma unroll
    for (int r = 0; r < SIDE; r += STEP) {
      bool in_x = in_k && m0 + row + r < rows, in_w = in_k && n0 + row + r < n;
      cp_async16(to + r * DEPTH, in_x ? from_x + (int64_t)r * k + k0 : x, in_x);
      if (!TURNED) cp_async16(to + TILE + r * DEPTH, in_w ? from_w + (int64_t)r * k + k0 : w, in_w);
    }
    if (!TURNED) return;
    bf16* to_w = tiles + (stage * 2 + 1) * TILE + tile_at<SIDE>(row_k, chunk_k);
#pragma unroll
    for (int r = 0; r < DEPTH; r += STEP_K) {
      bool in = k0 + row_k + r < k && n0 + chunk_k * 8 < n;
      cp_async16(to_w + r * SIDE, in ? from_w + (int64_t)(k0 + r) * n : w, in);
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
        if (TURNED) {
          ldmatrix_x4_trans(t, tw + tile_at<SIDE>(kk + (lane & 15), (wn + j * 8) / 8 + (lane >> 4)));
        } else {
          ldmatrix_x4(t, tw + tile_at<DEPTH>(wn + j * 8 + (lane & 7) + (lane >> 4) * 8, kk / 8 + (lane >> 3 & 1)));
        }
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
#define GEMM(name, SIDE, DEPTH, SPLIT, BLOCKS, TURNED, E)                                                          \
  extern "C" __global__ void __launch_bounds__(GEMM_THREADS, BLOCKS)                                               \
  name(void* out, float* sums, uint32_t* arrived, const bf16* x, const bf16* w, const bf16* bias, int rows, int n, \
       int k, int part) {                                                                                          \
    gemm<SIDE, DEPTH, SPLIT, TURNED, E>(out, sums, arrived, x, w, bias, rows, n, k, part);                         \
  }                                                                                                                \
  EXPORT_KERNEL(name)
