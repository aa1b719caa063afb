// lora.cuh - products of activations (bf16) and a factor of an adapter (f32) on tensor cores: the kernels lora_down, lora_up,
// lora_dx and lora_grad.
//
// Tensor cores take bf16. So each f32 is taken as two of them, hi + lo, which is x up to 2^-17 of it, and a product as
// hi * hi + hi * lo + lo * hi; activations are bf16 and exact. The products are few beside the bytes of the activations.
//
// Operands of mma.m16n8k16 that are f32 are read from shared memory as they are, and split in registers. Where a thread reads
// two neighbours of rows g = 0 to 7, rows are 8 words more than a multiple of 32 apart; where it reads one column of rows 2c,
// c = 0 to 3, 4 words more: then no two lanes of an access meet in a bank.
#pragma once
#include "philox.cuh"
#include "tiles.h"

// Which elements of a matrix of activations dropout keeps: see src/ops/train/dropout.rs.
struct Dropout {
  uint32_t threshold, step, site;  // threshold 0 keeps all
  unsigned long long seed;

  // Words of the elements i to i + 3; i is a multiple of 4.
  DEV void draw(uint32_t (&words)[4], int64_t i) const {
    words[0] = (uint32_t)(i >> 2), words[1] = 0, words[2] = step, words[3] = site;
    philox(words, (uint32_t)seed, (uint32_t)(seed >> 32));
  }

  // The bf16 of elements i to i + 7; what is dropped becomes zero.
  DEV uint4 masked(uint4 v, int64_t i) const {
    uint32_t a[4], b[4];
    draw(a, i), draw(b, i + 4);
    v.x &= pair(a[0], a[1]), v.y &= pair(a[2], a[3]), v.z &= pair(b[0], b[1]), v.w &= pair(b[2], b[3]);
    return v;
  }

 private:
  DEV uint32_t pair(uint32_t lo, uint32_t hi) const {
    return (lo >= threshold ? 0xffffu : 0u) | (hi >= threshold ? 0xffff0000u : 0u);
  }
};

// Two f32 as two pairs of bf16, of which hi + lo is a and b.
DEV void split(uint32_t& hi, uint32_t& lo, float a, float b) {
  hi = pack_bf16(a, b);
  lo = pack_bf16(a - bf_lo(hi), b - bf_hi(hi));
}

// out[r,t] = scale * sum_j drop(x[r,j]) f[t,j]: a block has LORA_ROWS rows (blockIdx.x) and LORA_RANKS ranks (blockIdx.y), a
// warp 16 rows. out [rows, rank]; row r of x begins at r * stride; f [rank, k].
DEV void lora_narrow(float* out, const bf16* x, int64_t stride, const float* f, int rows, int k, int rank, float scale,
                     Dropout drop) {
  constexpr int X = LORA_ROWS * LORA_DEPTH, LD = LORA_DEPTH + 8, F = LORA_RANKS * LD;
  constexpr int CHUNKS = LORA_DEPTH / 8;  // of a row of x
  static_assert(LD % 32 == 8 && LORA_THREADS / 32 * 16 == LORA_ROWS, "no bank twice; the warps cover the rows");
  DYN_SHARED(unsigned char, shared);  // [LORA_STAGES]: x [LORA_ROWS][LORA_DEPTH] bf16, f [LORA_RANKS][LD] f32
  auto x_of = [&](int stage) { return reinterpret_cast<bf16*>(shared + stage * (X * 2 + F * 4)); };
  auto f_of = [&](int stage) { return reinterpret_cast<float*>(shared + stage * (X * 2 + F * 4) + X * 2); };
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  int r0 = blockIdx.x * LORA_ROWS, t0 = blockIdx.y * LORA_RANKS;

  auto load = [&](int stage, int j0) {
#pragma unroll
    for (int n = 0; n < LORA_ROWS * CHUNKS / LORA_THREADS; n++) {
      int i = n * LORA_THREADS + threadIdx.x, row = i / CHUNKS, chunk = i % CHUNKS, j = j0 + chunk * 8;
      bool in = r0 + row < rows && j < k;
      cp_async16(x_of(stage) + tile_at<LORA_DEPTH>(row, chunk), in ? x + (r0 + row) * stride + j : x, in);
    }
#pragma unroll
    for (int n = 0; n < LORA_RANKS * LORA_DEPTH / 4 / LORA_THREADS; n++) {
      int i = n * LORA_THREADS + threadIdx.x, row = i / (LORA_DEPTH / 4), j = i % (LORA_DEPTH / 4) * 4;
      bool in = t0 + row < rank && j0 + j < k;
      cp_async16(f_of(stage) + row * LD + j, in ? f + (int64_t)(t0 + row) * k + j0 + j : f, in);
    }
  };

  int steps = (k + LORA_DEPTH - 1) / LORA_DEPTH;
#pragma unroll
  for (int s = 0; s < LORA_STAGES - 1; s++) {
    if (s < steps) load(s, s * LORA_DEPTH);
    cp_commit();  // also when empty, so that the count of groups below holds
  }
  float acc[LORA_RANKS / 8][4] = {};
  for (int s = 0; s < steps; s++) {
    bf16* tx = x_of(s % LORA_STAGES);
    const float* tf = f_of(s % LORA_STAGES);
    cp_wait<LORA_STAGES - 2>();
    if (drop.threshold) {  // a thread drops from what it copied itself
#pragma unroll
      for (int n = 0; n < LORA_ROWS * CHUNKS / LORA_THREADS; n++) {
        int i = n * LORA_THREADS + threadIdx.x;
        bf16* at = tx + tile_at<LORA_DEPTH>(i / CHUNKS, i % CHUNKS);
        st128(at, drop.masked(ld128(at), (int64_t)(r0 + i / CHUNKS) * k + s * LORA_DEPTH + i % CHUNKS * 8));
      }
    }
    __syncthreads();  // stage s has landed, and everybody is done with the stage that the next copies overwrite
    int next = s + LORA_STAGES - 1;
    if (next < steps) load(next % LORA_STAGES, next * LORA_DEPTH);
    cp_commit();
#pragma unroll
    for (int kk = 0; kk < LORA_DEPTH; kk += 16) {
      uint32_t a[4];
      ldmatrix_x4(a, tx + tile_at<LORA_DEPTH>(warp * 16 + (lane & 15), kk / 8 + (lane >> 4)));
#pragma unroll
      for (int n = 0; n < LORA_RANKS / 8; n++) {
        if (t0 + n * 8 >= rank) break;
        const float* p = tf + (n * 8 + g) * LD + kk + c * 2;
        uint32_t hi[2], lo[2];
        split(hi[0], lo[0], p[0], p[1]);
        split(hi[1], lo[1], p[8], p[9]);
        mma_m16n8k16(acc[n], a, hi);
        mma_m16n8k16(acc[n], a, lo);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < LORA_RANKS / 8; n++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int r = r0 + warp * 16 + half * 8 + g, t = t0 + n * 8 + c * 2;
      if (r >= rows || t >= rank) continue;
      float* to = out + (int64_t)r * rank + t;
      to[0] = acc[n][2 * half] * scale, to[1] = acc[n][2 * half + 1] * scale;
    }
}

// y[r,j] += scale * drop(sum_t u[r,t] f[t,j]), rounded once: a block has LORA_ROWS rows (blockIdx.x) and LORA_COLS columns
// (blockIdx.y), a warp 16 rows. Row r of y begins at r * stride; u [rows, rank]; f [rank, n]; dropout counts in rows of n.
DEV void lora_wide(bf16* y, int64_t stride, const float* u, const float* f, int rows, int n, int rank, float scale,
                   Dropout drop) {
  constexpr int LU = LORA_RANKS + 8, LF = LORA_COLS + 4, NI = LORA_COLS / 8, CHUNKS = 16 * NI / 32;  // chunks of a thread
  static_assert(LU % 32 == 8 && LF % 32 == 4, "no bank twice");
  static_assert(LORA_ROWS * LF <= LORA_ROWS * LU + LORA_RANKS * LF, "the result fits where the operands were");
  SHARED(float, tile, LORA_ROWS * LU + LORA_RANKS * LF);  // u [LORA_ROWS][LU], f [LORA_RANKS][LF]
  float *tu = tile, *tf = tile + LORA_ROWS * LU;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  int r0 = blockIdx.x * LORA_ROWS, j0 = blockIdx.y * LORA_COLS;

  // Of the warp's 16 rows this thread adds to CHUNKS chunks of 8 columns. Asked for before there is anything to add.
  uint4 old[CHUNKS] = {};
  auto row_of = [&](int i) { return warp * 16 + (i * 32 + lane) / NI; };
  auto column_of = [&](int i) { return (i * 32 + lane) % NI * 8; };
#pragma unroll
  for (int i = 0; i < CHUNKS; i++)
    if (r0 + row_of(i) < rows && j0 + column_of(i) < n) old[i] = ld128(y + (r0 + row_of(i)) * stride + j0 + column_of(i));

  float acc[NI][4] = {};
  for (int t0 = 0; t0 < rank; t0 += LORA_RANKS) {
    if (t0) __syncthreads();  // the operands before have been read
#pragma unroll
    for (int m = 0; m < LORA_ROWS * LORA_RANKS / 4 / LORA_THREADS; m++) {
      int i = m * LORA_THREADS + threadIdx.x, row = i / (LORA_RANKS / 4), t = i % (LORA_RANKS / 4) * 4;
      bool in = r0 + row < rows && t0 + t < rank;
      cp_async16(tu + row * LU + t, in ? u + (int64_t)(r0 + row) * rank + t0 + t : u, in);
    }
#pragma unroll
    for (int m = 0; m < LORA_RANKS * LORA_COLS / 4 / LORA_THREADS; m++) {
      int i = m * LORA_THREADS + threadIdx.x, t = i / (LORA_COLS / 4), j = i % (LORA_COLS / 4) * 4;
      bool in = t0 + t < rank && j0 + j < n;
      cp_async16(tf + t * LF + j, in ? f + (int64_t)(t0 + t) * n + j0 + j : f, in);
    }
    cp_commit();
    cp_wait<0>();
    __syncthreads();  // the operands have landed
#pragma unroll
    for (int kk = 0; kk < LORA_RANKS; kk += 16) {
      if (t0 + kk >= rank) break;
      uint32_t hi[4], lo[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float* p = tu + (warp * 16 + (i & 1) * 8 + g) * LU + kk + (i >> 1) * 8 + c * 2;
        split(hi[i], lo[i], p[0], p[1]);
      }
#pragma unroll
      for (int m = 0; m < NI; m++) {
        const float* p = tf + (kk + c * 2) * LF + m * 8 + g;
        uint32_t f_hi[2], f_lo[2];
        split(f_hi[0], f_lo[0], p[0], p[LF]);
        split(f_hi[1], f_lo[1], p[8 * LF], p[9 * LF]);
        mma_m16n8k16(acc[m], hi, f_hi);
        mma_m16n8k16(acc[m], hi, f_lo);
        mma_m16n8k16(acc[m], lo, f_hi);
      }
    }
  }
  __syncthreads();  // the operands have been read: the sums go where they were, so that rows can be added 16 bytes at a time
  float* of_warp = tile + warp * 16 * LF;
#pragma unroll
  for (int m = 0; m < NI; m++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      *reinterpret_cast<float2*>(of_warp + (half * 8 + g) * LF + m * 8 + c * 2) =
          make_float2(acc[m][2 * half], acc[m][2 * half + 1]);
  __syncwarp();  // a warp reads what it wrote itself
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    int r = r0 + row_of(i), j = j0 + column_of(i);
    if (r >= rows || j >= n) continue;
    const float* sum = tile + row_of(i) * LF + column_of(i);
    float to[8];
    unpack8(old[i], to);
    uint32_t words[2][4];
    if (drop.threshold) drop.draw(words[0], (int64_t)r * n + j), drop.draw(words[1], (int64_t)r * n + j + 4);
#pragma unroll
    for (int e = 0; e < 8; e++) {
      bool kept = !drop.threshold || words[e / 4][e % 4] >= drop.threshold;
      to[e] = fmaf(scale, kept ? sum[e] : 0.f, to[e]);
    }
    st128(y + r * stride + j, pack8(to));
  }
}
