// attn_packed: out[r,h] = softmax_t(q[r,h] . k[t,g] / sqrt(D)) v[t,g] over the t <= r of r's own document, g = h / (n_heads /
//              n_kv_heads); lse[r,h] = ln sum_t exp(q . k / sqrt(D))
// shapes:   out [rows, n_heads, D] bf16; lse [rows, n_heads] f32; qkv [rows, n_heads + 2 n_kv_heads, D] bf16, q and k rotated; starts
//           [documents + 1] u32: the first row of each document, and rows.
// rounding: scores, maxima and sums in f32 (mma.m16n8k16); the softmax's weights are rounded to bf16 for the second product but
//           summed before that; one rounding at the store. `scale` is log2(e) / sqrt(D), for exp2.
// order:    16 keys at a time, up, from the beginning of the document of the block's first row on.
// mapping:  one block per head and PACKED_ROWS rows, 4 warps of 16 rows; heads fastest. q and the sums stay in registers.
// pipeline: PACKED_STAGES of cp.async, k and v of the next PACKED_TILE rows while one is computed.
// traffic:  reads q, and k and v once per block; writes out and lse. = AttnPacked::cost, which counts k and v once.
//           Predicted, not measured: a ldmatrix serves 2 mma, as in attn_prefill before it had 32 rows a warp: 346 TFLOP/s on an
//           H100; one layer of Llama-3-8B over 16384 tokens in documents of 4096 takes 1.6 ms.
// requires: head_dim 64, 80, 96 or 128; starts rises from 0 to rows            (AttnPacked::launch in src/ops/train/attn_packed.rs)
// source:   FlashAttention-2 (Dao 2023), algorithm 1; code ours. Not yet measured.
#include "common/packed_attention.cuh"

constexpr uint32_t ALL = 0xffffffffu;

template <int D>
DEV void attn_packed(bf16* out, float* lse, const bf16* qkv, const uint32_t* starts, int rows, int documents, int n_heads,
                     int n_kv_heads, float scale) {
  constexpr int TILE = PACKED_TILE * packed_width<D>, DS = D / 16;
  DYN_SHARED(bf16, tiles);  // [PACKED_STAGES][k, v][PACKED_TILE][width]
  int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  int h = blockIdx.x, kv_head = h / (n_heads / n_kv_heads), first = blockIdx.y * PACKED_ROWS;
  int64_t stride = (n_heads + 2 * n_kv_heads) * D;
  const bf16 *k = qkv + (n_heads + kv_head) * D, *v = k + n_kv_heads * D;
  int own = first + (threadIdx.x >> 5) * 16, row = own + g;  // the warp's first row, and the thread's; it also has row + 8
  Range low = seen_by(starts, documents, rows, row), high = seen_by(starts, documents, rows, row + 8);
  int begin = seen_by(starts, documents, rows, first).begin, end = min(first + PACKED_ROWS, rows);
  int warp_begin = seen_by(starts, documents, rows, own).begin, warp_end = min(own + 16, rows);
  int all_see = seen_by(starts, documents, rows, own + 15).begin;  // every row of the warp sees the keys from here to own

  auto load = [&](int stage, int t) {
    copy_tile<D>(tiles + stage * 2 * TILE, k, stride, t, end);
    copy_tile<D>(tiles + stage * 2 * TILE + TILE, v, stride, t, end);
  };
  int n_tiles = (end - begin + PACKED_TILE - 1) / PACKED_TILE;
#pragma unroll
  for (int j = 0; j < PACKED_STAGES - 1; j++) {
    if (j < n_tiles) load(j, begin + j * PACKED_TILE);
    cp_commit();  // also when empty, so that the count of groups below holds
  }
  uint32_t q[DS][4];
  row_operand<D>(q, qkv + h * D, stride, row, rows);
  // Of each row the maximum score, the sum of weights over the thread's own columns, and the weighted values.
  float top[2] = {-3e38f, -3e38f}, l[2] = {}, o[D / 8][4] = {};
  for (int j = 0; j < n_tiles; j++) {
    cp_wait<PACKED_STAGES - 2>();
    __syncthreads();  // tile j has landed, and everybody is done with the stage that the next copies overwrite
    int next = j + PACKED_STAGES - 1;
    if (next < n_tiles) load(next % PACKED_STAGES, begin + next * PACKED_TILE);
    cp_commit();
    const bf16 *tk = tiles + j % PACKED_STAGES * 2 * TILE, *tv = tk + TILE;
#pragma unroll 1
    for (int at = 0; at < PACKED_TILE; at += 16) {
      int t = begin + j * PACKED_TILE + at;
      if (t + 15 < warp_begin || t >= warp_end) continue;  // nothing that a row of this warp sees
      float s[2][4] = {};                                  // scores
#pragma unroll
      for (int d = 0; d < DS; d++) {
        uint32_t b[4];
        columns_operand<D>(b, tk, at, d);
        mma_pair(s[0], s[1], q[d], b);
      }
      if (t < all_see || t + 15 > own) {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            int key = t + n * 8 + c * 2 + (i & 1);
            Range seen = i < 2 ? low : high;
            if (key < seen.begin || key >= seen.end) s[n][i] = -INFINITY;
          }
      }
      uint32_t p[4];  // the weights: the layout of two score tiles is that of the first operand of an mma over 16 keys
      float decay[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float *a = &s[0][2 * half], *b = &s[1][2 * half], old = top[half];
        float now = fmaxf(old, fmaxf(fmaxf(a[0], a[1]), fmaxf(b[0], b[1])));
        now = fmaxf(now, __shfl_xor_sync(ALL, now, 1));  // the four lanes of a row
        now = fmaxf(now, __shfl_xor_sync(ALL, now, 2));
        // finite also before a row's first visible key; at that key the decay is exp2(-3e37) = 0
        decay[half] = exp2f((old - now) * scale), top[half] = now;
        float shift = -now * scale;
        a[0] = exp2f(fmaf(a[0], scale, shift)), a[1] = exp2f(fmaf(a[1], scale, shift));
        b[0] = exp2f(fmaf(b[0], scale, shift)), b[1] = exp2f(fmaf(b[1], scale, shift));
        l[half] = fmaf(l[half], decay[half], (a[0] + a[1]) + (b[0] + b[1]));
        p[half] = pack_bf16(a[0], a[1]), p[half + 2] = pack_bf16(b[0], b[1]);
      }
#pragma unroll
      for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) o[n][i] *= decay[i >> 1];
#pragma unroll
      for (int d = 0; d < DS; d++) {
        uint32_t b[4];
        rows_operand<D>(b, tv, at, d);
        mma_pair(o[2 * d], o[2 * d + 1], p, b);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = l[half];
    sum += __shfl_xor_sync(ALL, sum, 1);
    sum += __shfl_xor_sync(ALL, sum, 2);
    int r = row + half * 8;
    if (r >= rows) continue;
    if (c == 0) lse[(int64_t)r * n_heads + h] = fmaf(top[half], scale, log2f(sum)) * LN2;
    bf16* to = out + ((int64_t)r * n_heads + h) * D + c * 2;
    float inv = 1.f / sum;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
      *reinterpret_cast<uint32_t*>(to + n * 8) = pack_bf16(o[n][2 * half] * inv, o[n][2 * half + 1] * inv);
  }
}

#define ATTN_PACKED(name, D)                                                                                              \
  extern "C" __global__ void __launch_bounds__(PACKED_THREADS)                                                            \
  name(bf16* out, float* lse, const bf16* qkv, const uint32_t* starts, int rows, int documents, int n_heads, int n_kv_heads, \
       float scale) {                                                                                                     \
    attn_packed<D>(out, lse, qkv, starts, rows, documents, n_heads, n_kv_heads, scale);                                   \
  }                                                                                                                       \
  EXPORT_KERNEL(name)
ATTN_PACKED(attn_packed_bf16_d64, 64)
ATTN_PACKED(attn_packed_bf16_d80, 80)
ATTN_PACKED(attn_packed_bf16_d96, 96)
ATTN_PACKED(attn_packed_bf16_d128, 128)
