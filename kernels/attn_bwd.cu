// attn_bwd: dq[r,h] = sum_t ds[r,t] k[t,g], dk[t,g] = sum_h sum_r ds[r,t] q[r,h], dv[t,g] = sum_h sum_r p[r,t] dout[r,h], with p =
//           exp(q . k / sqrt(D) - lse), ds = p (dout . v - delta) / sqrt(D), delta = dout . out, over the t <= r of r's own document
// shapes:   dqkv, qkv [rows, n_heads + 2 n_kv_heads, D] bf16; dout, out [rows, n_heads, D] bf16; lse [rows, n_heads] f32 of
//           attn_packed; starts [documents + 1] u32; delta [rows, n_heads] f32: scratch. Three kernels: _delta, _q, _kv.
// rounding: scores and sums in f32 (mma.m16n8k16); p and ds are rounded to bf16 for the second product; one rounding at the store.
// order:    _q: 16 keys at a time, up. _kv: head by head, in each 16 queries at a time, up. No atomics: a block owns what it writes, so
//           the bits are the same on every run.
// mapping:  _delta: one warp per row and head. _q: one block per head and PACKED_ROWS queries; _kv: one block per kv head and
//           PACKED_ROWS keys, over all query heads that share them. 4 warps of 16 rows. Both are one function: own rows, of which a
//           row sees a range of others. The thread's part of the own rows stays in registers, but in _kv where D is above 64, whose
//           two results need them.
// pipeline: PACKED_STAGES of cp.async, the next PACKED_TILE others while some are computed.
// traffic:  reads qkv and dout, and the others once per block; writes dqkv. = AttnBwd::cost, which counts each once.
//           Predicted, not measured: _kv computes 64 mma for 48 ldmatrix where D is 128: by shared memory some 250 TFLOP/s on an H100;
//           one layer of Llama-3-8B over 16384 tokens in documents of 4096 takes 6 ms.
// requires: head_dim 64, 80, 96 or 128; starts rises from 0 to rows                  (AttnBwd::launch in src/ops/train/attn_bwd.rs)
// source:   FlashAttention-2 (Dao 2023), algorithm 2, as two kernels; code ours. Not yet measured.
#include "common/packed_attention.cuh"

// delta[i] = sum_j out[i,j] dout[i,j] for the `count` rows of `d` columns.
extern "C" __global__ void __launch_bounds__(PACKED_THREADS)
attn_bwd_delta_f32(float* delta, const bf16* dout, const bf16* out, int count, int d) {
  int i = blockIdx.x * (PACKED_THREADS / 32) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (i >= count) return;
  const uint32_t *a = reinterpret_cast<const uint32_t*>(out + (int64_t)i * d);
  const uint32_t *b = reinterpret_cast<const uint32_t*>(dout + (int64_t)i * d);
  float sum = 0.f;
  for (int j = lane; j < d / 2; j += 32) {
    uint32_t x = a[j], y = b[j];
    sum = fmaf(bf_lo(x), bf_lo(y), sum), sum = fmaf(bf_hi(x), bf_hi(y), sum);
  }
  sum = warp_sum(sum);
  if (lane == 0) delta[i] = sum;
}
EXPORT_KERNEL(attn_bwd_delta_f32)

// KEYS: own rows are keys and values, others q and dout; else own rows are q and dout, others keys and values.
template <int D, bool KEYS>
DEV void attn_bwd(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* lse, const float* delta, const uint32_t* starts,
                  int rows, int documents, int n_heads, int n_kv_heads, float scale) {
  constexpr int W = packed_width<D>, TILE = PACKED_TILE * W, DS = D / 16;
  constexpr bool HELD = !KEYS || D <= 64;  // the own rows are in registers
  DYN_SHARED(bf16, tiles);  // [PACKED_STAGES][2][PACKED_TILE][W], and unless HELD [2][PACKED_ROWS][W]
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  int group = n_heads / n_kv_heads, kv_head = KEYS ? blockIdx.x : blockIdx.x / group;
  int64_t wide = (n_heads + 2 * n_kv_heads) * D, narrow = n_heads * D;
  const bf16 *k = qkv + (n_heads + kv_head) * D, *v = k + n_kv_heads * D;
  auto range = [&](int row) {
    return KEYS ? that_see(starts, documents, rows, row) : seen_by(starts, documents, rows, row);
  };
  int first = blockIdx.y * PACKED_ROWS, own = first + warp * 16, row = own + g;  // the thread also has row + 8
  // Of what a row sees, the end that is not the row itself; for what is no row, one that leaves nothing.
  int edge[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    Range seen = range(row + half * 8);
    edge[half] = KEYS ? (row + half * 8 < rows ? seen.end : 0) : seen.begin;
  }
  int begin = range(first).begin, end = range(min(first + PACKED_ROWS, rows) - 1).end;
  int warp_begin = range(own).begin, warp_end = own < rows ? range(min(own + 16, rows) - 1).end : 0;

  int n_tiles = (end - begin + PACKED_TILE - 1) / PACKED_TILE, total = KEYS ? n_tiles * group : n_tiles;
  auto load = [&](int stage, int j) {
    int h = kv_head * group + j / n_tiles, t = begin + j % n_tiles * PACKED_TILE;
    bf16* to = tiles + stage * 2 * TILE;
    copy_tile<D>(to, KEYS ? qkv + h * D : k, wide, t, end);
    copy_tile<D>(to + TILE, KEYS ? dout + h * D : v, KEYS ? narrow : wide, t, end);
  };
  const bf16 *own1 = KEYS ? k : qkv + blockIdx.x * D, *own2 = KEYS ? v : dout + blockIdx.x * D;
  bf16* held = tiles + PACKED_STAGES * 2 * TILE;
  uint32_t a1[HELD ? DS : 1][4], a2[HELD ? DS : 1][4];
  if constexpr (HELD) {
    row_operand<D>(a1, own1, wide, row, rows);
    row_operand<D>(a2, own2, KEYS ? wide : narrow, row, rows);
  } else {
#pragma unroll
    for (int r = 0; r < PACKED_ROWS; r += PACKED_TILE) {  // part of the first group
      copy_tile<D>(held + r * W, own1, wide, first + r, rows);
      copy_tile<D>(held + (PACKED_ROWS + r) * W, own2, wide, first + r, rows);
    }
  }
#pragma unroll
  for (int j = 0; j < PACKED_STAGES - 1; j++) {
    if (j < total) load(j, j);
    cp_commit();  // also when empty, so that the count of groups below holds
  }
  // What a thread knows of its own rows if they are queries: lse, as a power of 2, and delta.
  float own_lse[2] = {}, own_delta[2] = {};
  if (!KEYS) {
#pragma unroll
    for (int half = 0; half < 2; half++)
      if (row + half * 8 < rows) {
        int64_t at = (int64_t)(row + half * 8) * n_heads + blockIdx.x;
        own_lse[half] = lse[at] * LOG2E, own_delta[half] = delta[at];
      }
  }

  float sum1[D / 8][4] = {}, sum2[KEYS ? D / 8 : 1][4] = {};  // of dq; or of dk and dv
  for (int j = 0; j < total; j++) {
    cp_wait<PACKED_STAGES - 2>();
    __syncthreads();  // tile j has landed, and everybody is done with the stage that the next copies overwrite
    int next = j + PACKED_STAGES - 1;
    if (next < total) load(next % PACKED_STAGES, next);
    cp_commit();
    const bf16 *t1 = tiles + j % PACKED_STAGES * 2 * TILE, *t2 = t1 + TILE;
    int h = kv_head * group + j / n_tiles;
#pragma unroll 1
    for (int at = 0; at < PACKED_TILE; at += 16) {
      int t = begin + j % n_tiles * PACKED_TILE + at;
      if (t + 15 < warp_begin || t >= warp_end) continue;  // nothing that a row of this warp sees
      float s[2][4] = {}, dp[2][4] = {};
#pragma unroll
      for (int d = 0; d < DS; d++) {
        int i = HELD ? d : 0;
        if constexpr (!HELD) {
          ldmatrix_x4(a1[i], held + tile_at<W>(warp * 16 + (lane & 15), d * 2 + (lane >> 4)));
          ldmatrix_x4(a2[i], held + tile_at<W>(PACKED_ROWS + warp * 16 + (lane & 15), d * 2 + (lane >> 4)));
        }
        uint32_t b[4];
        columns_operand<D>(b, t1, at, d);
        mma_pair(s[0], s[1], a1[i], b);
        columns_operand<D>(b, t2, at, d);
        mma_pair(dp[0], dp[1], a2[i], b);
      }
      uint32_t p[4], ds[4];  // the layout of two tiles of scores is that of the first operand of an mma over 16 others
#pragma unroll
      for (int n = 0; n < 2; n++) {
        float other_lse[2], other_delta[2];  // if the others are queries
#pragma unroll
        for (int e = 0; e < 2; e++) {
          int other = t + n * 8 + c * 2 + e;
          int place = min(other, rows - 1) * n_heads + h;
          other_lse[e] = KEYS ? lse[place] * LOG2E : 0.f, other_delta[e] = KEYS ? delta[place] : 0.f;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float weight[2], grad[2];
#pragma unroll
          for (int e = 0; e < 2; e++) {
            int other = t + n * 8 + c * 2 + e;
            int own_row = row + half * 8;
            float l = KEYS ? other_lse[e] : own_lse[half], of_row = KEYS ? other_delta[e] : own_delta[half];
            bool sees = KEYS ? own_row <= other && other < edge[half] : edge[half] <= other && other <= own_row;
            weight[e] = sees ? exp2f(fmaf(s[n][half * 2 + e], scale * LOG2E, -l)) : 0.f;
            grad[e] = weight[e] * (dp[n][half * 2 + e] - of_row);
          }
          p[half + 2 * n] = pack_bf16(weight[0], weight[1]), ds[half + 2 * n] = pack_bf16(grad[0], grad[1]);
        }
      }
#pragma unroll
      for (int d = 0; d < DS; d++) {
        uint32_t b[4];
        rows_operand<D>(b, t1, at, d);
        mma_pair(sum1[2 * d], sum1[2 * d + 1], ds, b);
        if constexpr (KEYS) {
          rows_operand<D>(b, t2, at, d);
          mma_pair(sum2[2 * d], sum2[2 * d + 1], p, b);
        }
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (row + half * 8 >= rows) continue;
    bf16* to = dqkv + (row + half * 8) * wide + (KEYS ? n_heads + blockIdx.x : blockIdx.x) * D + c * 2;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      float *a = &sum1[n][2 * half], *b = &sum2[KEYS ? n : 0][2 * half];
      *reinterpret_cast<uint32_t*>(to + n * 8) = pack_bf16(a[0] * scale, a[1] * scale);
      if (KEYS) *reinterpret_cast<uint32_t*>(to + n_kv_heads * D + n * 8) = pack_bf16(b[0], b[1]);
    }
  }
}

#define ATTN_BWD(name, D, KEYS, BLOCKS)                                                                                    \
  extern "C" __global__ void __launch_bounds__(PACKED_THREADS, BLOCKS)                                                     \
  name(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* lse, const float* delta, const uint32_t* starts, int rows, \
       int documents, int n_heads, int n_kv_heads, float scale) {                                                          \
    attn_bwd<D, KEYS>(dqkv, dout, qkv, lse, delta, starts, rows, documents, n_heads, n_kv_heads, scale);                   \
  }                                                                                                                        \
  EXPORT_KERNEL(name)
ATTN_BWD(attn_bwd_q_bf16_d64, 64, false, 3)
ATTN_BWD(attn_bwd_q_bf16_d80, 80, false, 3)
ATTN_BWD(attn_bwd_q_bf16_d96, 96, false, 2)
ATTN_BWD(attn_bwd_q_bf16_d128, 128, false, 2)
ATTN_BWD(attn_bwd_kv_bf16_d64, 64, true, 2)
ATTN_BWD(attn_bwd_kv_bf16_d80, 80, true, 2)
ATTN_BWD(attn_bwd_kv_bf16_d96, 96, true, 2)
ATTN_BWD(attn_bwd_kv_bf16_d128, 128, true, 2)
