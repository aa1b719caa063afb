// attn_prefill: out[r,h] = softmax_t(q[r,h] . k[s,g,t] / sqrt(D)) v[s,g,t] over t <= pos[f] % max_seq + r - f for the
//               `rows` rows from f = first on, g = h / (n_heads / n_kv_heads), in sequence s = pos[f] / max_seq, of which the
//               positions below `shared` are sequence 0's
// shapes:   out [first + rows, n_heads, D] bf16; qkv [first + rows, n_heads + 2 n_kv_heads, D] bf16, of which q is read;
//           k, v [sequences, n_kv_heads, max_seq, D] bf16; pos [first + 1] u32, places.
// rounding: scores, maxima and sums in f32 (mma.m16n8k16); the softmax's weights are rounded to bf16 for the second product
//           but summed before that; one rounding at the store. `scale` is log2(e) / sqrt(D), for exp2.
// order:    key tiles of PREFILL_KEYS at absolute positions from 0 up. A tile that a row may not see leaves its state
//           unchanged bit for bit, so the bits of a row do not depend on how the prompt was cut into chunks.
// mapping:  one block per head and PREFILL_ROWS rows, 4 warps of 16 rows; heads fastest, so that those that share k and v run
//           together, and the last rows, which see the most keys, first. q stays in registers.
// pipeline: two stages of cp.async, k and v of the next tile while this one is computed.
// traffic:  reads q, and k and v once per block; = AttnPrefill::cost counts them once per kv head
// requires: head_dim 64 or 128; pos[first] % max_seq + rows <= max_seq    (AttnPrefill::launch in src/ops/attn_prefill.rs)
// source:   FlashAttention-2 (Dao 2023), algorithm 1; code ours. Not yet measured.
#include "common/device.cuh"
#include "common/tiles.h"

#define PREFILL_THREADS (PREFILL_ROWS / 16 * 32)

// Copies `valid` rows of D elements from where from(row) is to a tile of 64 rows; the other rows become zero, and nothing is
// read for them: past the last position the cache may hold anything, and 0 * NaN would spoil the sums.
template <int D, class From> DEV void load_tile(bf16* tile, From from, int valid) {
  constexpr int STEP = PREFILL_THREADS / (D / 8);
  static_assert(STEP % 8 == 0 && PREFILL_ROWS == 64 && PREFILL_KEYS == 64, "one tile shape, a thread's chunks permuted alike");
  int row = threadIdx.x / (D / 8), chunk = threadIdx.x % (D / 8);
  bf16* to = tile + tile_at<D>(row, chunk);
#pragma unroll
  for (int r = 0; r < 64; r += STEP) {
    bool ok = row + r < valid;
    cp_async16(to + r * D, from(ok ? row + r : 0) + chunk * 8, ok);
  }
}

template <int D>
DEV void attn_prefill(bf16* out, const bf16* qkv, const bf16* k, const bf16* v, const uint32_t* pos, int rows, int first_row,
                      int shared, int n_heads, int n_kv_heads, int max_seq, float scale) {
  constexpr int TILE = 64 * D, DS = D / 16, KS = PREFILL_KEYS / 16;  // steps of 16 along the head and along the keys
  DYN_SHARED(bf16, tiles);                                           // [2 stages][k, v][64][D]
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int h = blockIdx.x, r0 = (gridDim.y - 1 - blockIdx.y) * PREFILL_ROWS;
  uint32_t place = pos[first_row], sequence = place / (uint32_t)max_seq;
  int64_t of_shared = (int64_t)(h / (n_heads / n_kv_heads)) * max_seq * D;  // the head in sequence 0
  int64_t of_own = of_shared + (int64_t)sequence * n_kv_heads * max_seq * D;
  int64_t qkv_dim = (int64_t)(n_heads + 2 * n_kv_heads) * D;
  int first = place % (uint32_t)max_seq, len = first + rows;  // positions below len are in the cache
  int n_tiles = (first + min(r0 + PREFILL_ROWS, rows) + PREFILL_KEYS - 1) / PREFILL_KEYS;
  auto load_kv = [&](int stage, int tile) {
    int t = tile * PREFILL_KEYS;
    auto at = [&](int row) { return (t + row < shared ? of_shared : of_own) + (int64_t)(t + row) * D; };
    load_tile<D>(tiles + stage * 2 * TILE, [&](int row) { return k + at(row); }, len - t);
    load_tile<D>(tiles + stage * 2 * TILE + TILE, [&](int row) { return v + at(row); }, len - t);
  };

  // q passes through stage 1, which is free until the loop
  bf16* tq = tiles + 2 * TILE;
  const bf16* q_rows = qkv + (first_row + r0) * qkv_dim + (int64_t)h * D;
  load_tile<D>(tq, [&](int row) { return q_rows + row * qkv_dim; }, rows - r0);
  cp_commit();
  load_kv(0, 0);
  cp_commit();
  cp_wait<1>();
  __syncthreads();  // q has landed, whoever copied it
  uint32_t q[DS][4];
#pragma unroll
  for (int d = 0; d < DS; d++) ldmatrix_x4(q[d], tq + tile_at<D>(warp * 16 + (lane & 15), d * 2 + (lane >> 4)));

  // A thread holds rows lane / 4 and lane / 4 + 8 of its warp: of each the maximum score, the sum of weights over the
  // thread's own columns, and the weighted values.
  int low = first + r0 + warp * 16;  // position of the warp's first row
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f}, o[D / 8][4] = {};
  for (int j = 0; j < n_tiles; j++) {
    cp_wait<0>();
    __syncthreads();  // tile j has landed, and everybody is done with the stage that the next copies overwrite
    if (j + 1 < n_tiles) load_kv((j + 1) & 1, j + 1);
    cp_commit();
    const bf16 *tk = tiles + (j & 1) * 2 * TILE, *tv = tk + TILE;

    float s[2 * KS][4] = {};  // scores of 16 rows and PREFILL_KEYS keys
#pragma unroll
    for (int d = 0; d < DS; d++)
#pragma unroll
      for (int n = 0; n < KS; n++) {
        uint32_t b[4];
        ldmatrix_x4(b, tk + tile_at<D>(n * 16 + (lane & 7) + (lane >> 4) * 8, d * 2 + (lane >> 3 & 1)));
        mma_m16n8k16(s[2 * n], q[d], {b[0], b[1]});
        mma_m16n8k16(s[2 * n + 1], q[d], {b[2], b[3]});
      }

    int t0 = j * PREFILL_KEYS;
    if (t0 + PREFILL_KEYS - 1 > low) {  // the tile reaches past the position of a row of this warp
#pragma unroll
      for (int n = 0; n < 2 * KS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int t = t0 + n * 8 + (lane & 3) * 2 + (i & 1), p = low + (lane >> 2) + (i >> 1) * 8;
          if (t > p) s[n][i] = -INFINITY;
        }
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = m[half];
#pragma unroll
      for (int n = 0; n < 2 * KS; n++) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));  // the four lanes of a row
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      // key 0 is visible to every row, so top is finite from the first tile on and the first decay is exp2(-inf) = 0
      float decay = exp2f((m[half] - top) * scale), sum = 0.f;
      m[half] = top;
#pragma unroll
      for (int n = 0; n < 2 * KS; n++)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; i++) {
          s[n][i] = exp2f(fmaf(s[n][i], scale, -top * scale));
          sum += s[n][i];
        }
      l[half] = l[half] * decay + sum;
#pragma unroll
      for (int n = 0; n < D / 8; n++) o[n][2 * half] *= decay, o[n][2 * half + 1] *= decay;
    }

    // the layout of two score tiles is that of the first operand of an mma over 16 keys
#pragma unroll
    for (int n = 0; n < KS; n++) {
      uint32_t a[4] = {pack_bf16(s[2 * n][0], s[2 * n][1]), pack_bf16(s[2 * n][2], s[2 * n][3]),
                       pack_bf16(s[2 * n + 1][0], s[2 * n + 1][1]), pack_bf16(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
      for (int d = 0; d < DS; d++) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, tv + tile_at<D>(n * 16 + (lane & 15), d * 2 + (lane >> 4)));
        mma_m16n8k16(o[2 * d], a, {b[0], b[1]});
        mma_m16n8k16(o[2 * d + 1], a, {b[2], b[3]});
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = l[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    int r = r0 + warp * 16 + (lane >> 2) + half * 8;
    if (r >= rows) continue;
    bf16* to = out + ((int64_t)(first_row + r) * n_heads + h) * D + (lane & 3) * 2;
    float inv = 1.f / sum;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
      *reinterpret_cast<uint32_t*>(to + n * 8) = pack_bf16(o[n][2 * half] * inv, o[n][2 * half + 1] * inv);
  }
}

#define ATTN_PREFILL(name, D, BLOCKS)                                                                                 \
  extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, BLOCKS)                                               \
  name(bf16* out, const bf16* qkv, const bf16* k, const bf16* v, const uint32_t* pos, int rows, int first, int shared, \
       int n_heads, int n_kv_heads, int max_seq, float scale) {                                                       \
    attn_prefill<D>(out, qkv, k, v, pos, rows, first, shared, n_heads, n_kv_heads, max_seq, scale);                   \
  }                                                                                                                   \
  EXPORT_KERNEL(name)
ATTN_PREFILL(attn_prefill_bf16_d64, 64, 3)
ATTN_PREFILL(attn_prefill_bf16_d128, 128, 2)
