// attn_prefill: out[r,h] = softmax_t(q[r,h] . k[s,g,t] / sqrt(D)) v[s,g,t] over the last `window` t <= pos[f] % max_seq + r -
//               f for the `rows` rows from f = first on, g = h / (n_heads / n_kv_heads), in sequence s = pos[f] / max_seq, of
//               which the positions below `shared` are sequence 0's
// shapes:   out [first + rows, n_heads, D] bf16; qkv [first + rows, n_heads + 2 n_kv_heads, D] bf16, of which q is read;
//           k, v [pages of the cache, n_kv_heads, ATTN_TILE, D] bf16 or fp8 (common/kv.cuh); pos [first + 1] u32, places; pages
//           [sequences, max_seq / ATTN_TILE] u32, the page of each ATTN_TILE places.
// rounding: scores, maxima and sums in f32 (mma.m16n8k16); the softmax's weights are rounded to bf16 for the second product
//           but summed before that; one rounding at the store. `scale` is log2(e) / sqrt(D), for exp2.
// order:    16 keys at a time, at absolute positions, up, from the tile on in which the window of the block's first row begins.
//           Keys that a row may not see leave its state unchanged bit for bit, so the bits of a row do not depend on how the
//           prompt was cut into chunks.
// mapping:  one block per head and PREFILL_ROWS rows, 4 warps of 32 rows; heads fastest, so that those that share k and v run
//           together, and the last rows, which see the most keys, first. q and the sums stay in registers: up to 255 of them
//           where D is 128, without spills from sm_80 to sm_120, so two blocks an SM.
// pipeline: PREFILL_STAGES of cp.async, k and v of the next tiles while one is computed: 48 KB where D is 128, so that two
//           blocks fit the SMs with 100 KB as well. Rows of shared memory are 64 or 128 elements: of a head of 80 or 96 the rest
//           stays empty.
// fp8:      codes go to shared memory as they are, and widen to bf16 after ldmatrix: a key's scale multiplies its score, a value's
//           its weight after that was summed, both exactly. 24 KB of tiles and 192 bytes of scales where D is 128.
// pages:    a page is two tiles of keys. Counted: one load of 4 bytes a tile and thread, of one address, which L1 has but for the
//           first; it is issued a tile before it is needed, so it waits for nothing.
// traffic:  reads q, and k and v once per block (fp8: D + 1 bytes a row, not 2*D); AttnPrefill::cost counts them once per kv head.
//           Predicted, not measured: what a warp reads of k and v in shared memory serves 32 rows, 4 mma a ldmatrix, which
//           lets it reach what mma.sync can, some 660 TFLOP/s on an H100 (16 rows a warp were held to 346); k and v come
//           from L2 half as often. A prompt of 8192 tokens of Llama-3-8B takes about 25 ms less.
// lost:     32 keys at a time: scores for them need 10 to 25 registers more than there are.
// requires: head_dim 64, 80, 96 or 128; pos[first] % max_seq + rows <= max_seq; max_seq % ATTN_TILE == 0; rows of k, over all pages
//           and heads, fit an int
//                                                                       (AttnPrefill::launch in src/ops/attn_prefill.rs)
// source:   FlashAttention-2 (Dao 2023), algorithm 1; code ours. Not yet measured.
#include "common/kv.cuh"

constexpr uint32_t ALL = 0xffffffffu;
constexpr int WARP_ROWS = 32, M = WARP_ROWS / 16;  // rows of a warp, and mma tiles that they are
static_assert(PREFILL_THREADS / 32 * WARP_ROWS == PREFILL_ROWS, "the warps cover the rows");
static_assert(ATTN_TILE % PREFILL_KEYS == 0, "a tile of keys is in one page");

// The place of the chunk whose number is that of the chunk at p, xor c.
DEV const bf16* chunk_xor(const bf16* p, int c) { return (const bf16*)((uintptr_t)p ^ (uintptr_t)(c * 16)); }

template <class KV, int D>
DEV void attn_prefill(bf16* out, const bf16* qkv, const typename KV::Element* k, const typename KV::Element* v,
                      const uint32_t* pos, const uint32_t* pages, int rows, int first_row,
                      int shared, int n_heads, int n_kv_heads, int max_seq, int window, float scale) {
  constexpr int EACH = 16 / sizeof(typename KV::Element);  // elements of a chunk of 16 bytes
  constexpr int W = (D <= 64 ? 64 : 128) * 8 / EACH;       // a row in shared memory, in words of 16 bits
  constexpr int TILE = PREFILL_KEYS * W, DS = D / 16;  // steps of 16 along the head
  constexpr int STEP = PREFILL_THREADS / (W / 8);      // keys that the block copies at a time
  static_assert(STEP % 8 == 0 && PREFILL_KEYS % STEP == 0, "a thread's chunks are permuted alike");
  DYN_SHARED(bf16, tiles);  // [PREFILL_STAGES][k, v][PREFILL_KEYS][W]
  int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  int h = blockIdx.x, r0 = (gridDim.y - 1 - blockIdx.y) * PREFILL_ROWS;
  uint32_t place = pos[first_row];
  int first = place % (uint32_t)max_seq, len = first + rows;  // positions below len are in the cache
  int n_tiles = (first + min(r0 + PREFILL_ROWS, rows) + PREFILL_KEYS - 1) / PREFILL_KEYS;
  // The first key that a row of the block sees, and the first of its tile. From that one on positions are counted below.
  int seen = max(first + r0 + 1 - window, 0), begin = seen / PREFILL_KEYS * PREFILL_KEYS;
  n_tiles -= begin / PREFILL_KEYS;

  // The next key that this thread copies a chunk of, and the page in which its tile begins. Sequence 0 is first in the table.
  int key = begin + threadIdx.x / (W / 8), chunk = threadIdx.x % (W / 8);
  int own = (place - first) / ATTN_TILE, kv_row = h / (n_heads / n_kv_heads) * ATTN_TILE;
  auto page_of = [&](int t) { return pages[(t < shared ? 0 : own) + (uint32_t)min(t, len - 1) / ATTN_TILE]; };
  uint32_t page = page_of(begin);
  bf16* place_of_chunk = tiles + tile_at<W>(threadIdx.x / (W / 8), chunk);
  // fp8: the scales of a tile wait in a register of one thread each, until the next tile is asked for. Absent keys have 0.
  // [PREFILL_STAGES][k, v][PREFILL_KEYS]
  unsigned char* scales = reinterpret_cast<unsigned char*>(tiles + PREFILL_STAGES * 2 * TILE);
  int scale_stage = -1, scale_byte = 0;
  auto store_scale = [&] {
    if (scale_stage >= 0) scales[scale_stage * 2 * PREFILL_KEYS + threadIdx.x] = scale_byte;
    scale_stage = -1;  // once: others read it after the next barrier
  };
  // Copies a tile. Keys before `seen`, which only the first tile has, and past the last become zero, and nothing is read for
  // them: the cache may hold anything there, and 0 * NaN would spoil the sums.
  auto load_kv = [&](int stage, bool is_first) {
    bf16* to = place_of_chunk + stage * 2 * TILE;
    int tile = key & -PREFILL_KEYS, stride = n_kv_heads * ATTN_TILE, in_page = kv_row + (key & (ATTN_TILE - 1));
    int row = page * stride + in_page, rest = row;  // of k and v: for keys below `shared`, and for the rest of the tile
    if (tile < shared && tile + PREFILL_KEYS > shared) rest = pages[own + tile / ATTN_TILE] * stride + in_page;
#pragma unroll
    for (int r = 0; r < PREFILL_KEYS; r += STEP) {
      if (W / 8 * EACH != D && chunk * EACH >= D) break;
      bool in = (!is_first || key + r >= seen) && key + r < len;
      int64_t from = (int64_t)((key + r < shared ? row : rest) + r) * D + chunk * EACH;
      // the scales of the heads before this one lie in between
      if constexpr (KV::FP8) from += (int64_t)((key + r < shared ? row : rest) / ATTN_TILE) * ATTN_TILE;
      cp_async16(to + r * W, k + from, in);
      cp_async16(to + r * W + TILE, v + from, in);
    }
    if constexpr (KV::FP8) {
      store_scale();
      if (threadIdx.x < 2 * PREFILL_KEYS) {
        int at = tile + threadIdx.x % PREFILL_KEYS;
        bool in = (!is_first || at >= seen) && at < len;
        uint32_t of_page = tile < shared && at >= shared ? pages[own + tile / ATTN_TILE] : page;
        int head = of_page * n_kv_heads + kv_row / ATTN_TILE;
        int64_t from = (int64_t)head * KV::head(D) + ATTN_TILE * D + (at & (ATTN_TILE - 1));
        scale_byte = in ? (threadIdx.x < PREFILL_KEYS ? k : v)[from] : 0;
        scale_stage = stage;
      }
    }
    key += PREFILL_KEYS, page = page_of(tile + PREFILL_KEYS);
  };
#pragma unroll
  for (int j = 0; j < PREFILL_STAGES - 1; j++) {
    if (j < n_tiles) load_kv(j, j == 0);
    cp_commit();  // also when empty, so that the count of groups below holds
  }

  if (KV::FP8 && n_tiles < PREFILL_STAGES - 1) store_scale();  // otherwise by the first turn of the loop
  // A thread holds rows g and g + 8 of each of its warp's mma tiles: q; of each row the maximum score, the sum of weights
  // over the thread's own columns, and the weighted values.
  int row = r0 + (threadIdx.x >> 5) * WARP_ROWS;                   // the warp's first
  int low = row < rows ? first + row - begin : -WARP_ROWS;  // its position
  uint32_t q[M][DS][4];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int64_t r = first_row + min(row + m * 16 + (i & 1) * 8 + g, rows - 1);
      const bf16* from = qkv + (r * (n_heads + 2 * n_kv_heads) + h) * D + (i >> 1) * 8 + c * 2;
#pragma unroll
      for (int d = 0; d < DS; d++) {
        if constexpr (KV::FP8) {  // codes widen to columns 4c and 4c + 2, and 4c + 1 and 4c + 3
          uint2 u = *reinterpret_cast<const uint2*>(from - (i >> 1) * 8 + c * 2 + d * 16);
          q[m][d][i] = i >> 1 ? highs(u.x, u.y) : lows(u.x, u.y);
        } else {
          q[m][d][i] = *reinterpret_cast<const uint32_t*>(from + d * 16);
        }
      }
    }
  float top[M][2], l[M][2] = {}, o[M][D / 8][4] = {};
#pragma unroll
  for (int m = 0; m < M; m++) top[m][0] = top[m][1] = -3e38f;

  for (int j = 0; j < n_tiles; j++) {
    cp_wait<PREFILL_STAGES - 2>();
    __syncthreads();  // tile j has landed, and everybody is done with the stage that the next copies overwrite
    if (j + PREFILL_STAGES - 1 < n_tiles) load_kv((j + PREFILL_STAGES - 1) % PREFILL_STAGES, false);
    else if constexpr (KV::FP8) store_scale();
    cp_commit();
    const bf16* tile = tiles + j % PREFILL_STAGES * 2 * TILE;
#pragma unroll 1  // 32 keys at a time would need more than 255 registers
    for (int t = j * PREFILL_KEYS; t < (j + 1) * PREFILL_KEYS; t += 16, tile += 16 * W) {
      if (t >= low + WARP_ROWS) break;            // nothing that a row of this warp may see
      if (t + 15 <= low - window) continue;  // nor here, before all their windows
      float s[M][2][4] = {};  // scores
      const bf16* tk = tile + tile_at<W>((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);  // the row whose address this lane gives
      const unsigned char* of_keys = scales + j % PREFILL_STAGES * 2 * PREFILL_KEYS + t % PREFILL_KEYS + c * 2;
      if constexpr (KV::FP8) {
#pragma unroll
        for (int d = 0; d < DS; d += 2) {
          uint32_t b[4];
          ldmatrix_x4(b, chunk_xor(tk, d + 1 < DS ? d : d ^ (lane >> 3 & 1)));
#pragma unroll
          for (int e = 0; e < 2 && d + e < DS; e++)
#pragma unroll
            for (int n = 0; n < 2; n++) {
              uint32_t w[2] = {e4m3_even(b[n * 2 + e]), e4m3_odd(b[n * 2 + e])};
#pragma unroll
              for (int m = 0; m < M; m++) mma_m16n8k16(s[m][n], q[m][d + e], w);
            }
        }
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float of_key = kv_scale(of_keys[n * 8 + i]);
#pragma unroll
            for (int m = 0; m < M; m++) s[m][n][i] *= of_key, s[m][n][i + 2] *= of_key;
          }
      }
#pragma unroll
      for (int d = 0; d < (KV::FP8 ? 0 : DS); d++) {
        uint32_t b[4];
        ldmatrix_x4(b, chunk_xor(tk, d * 2));
#pragma unroll
        for (int m = 0; m < M; m++) {
          mma_m16n8k16(s[m][0], q[m][d], {b[0], b[1]});
          mma_m16n8k16(s[m][1], q[m][d], {b[2], b[3]});
        }
      }
      // the keys reach past the position of a row of this warp, or before its window
      if (t + 15 > low || t <= low + WARP_ROWS - 1 - window) {
        int room = low + g - (t + c * 2);  // from this thread's first key to its first row's position
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
              int behind = room + m * 16 + (i >> 1) * 8 - n * 8 - (i & 1);  // how far the row is behind the key
              if ((uint32_t)behind >= (uint32_t)window) s[m][n][i] = -INFINITY;  // a key after the row is very far
            }
      }

      uint32_t p[M][4];  // the weights: the layout of two score tiles is that of the first operand of an mma over 16 keys
#pragma unroll
      for (int m = 0; m < M; m++) {
        float decay[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float *a = &s[m][0][2 * half], *b = &s[m][1][2 * half], old = top[m][half];
          float now = fmaxf(old, fmaxf(fmaxf(a[0], a[1]), fmaxf(b[0], b[1])));
          now = fmaxf(now, __shfl_xor_sync(ALL, now, 1));  // the four lanes of a row
          now = fmaxf(now, __shfl_xor_sync(ALL, now, 2));
          // finite also before a row's first visible key; at that key the decay is exp2(-3e37) = 0
          decay[half] = exp2f((old - now) * scale), top[m][half] = now;
          float shift = -now * scale;
          a[0] = exp2f(fmaf(a[0], scale, shift)), a[1] = exp2f(fmaf(a[1], scale, shift));
          b[0] = exp2f(fmaf(b[0], scale, shift)), b[1] = exp2f(fmaf(b[1], scale, shift));
          l[m][half] = fmaf(l[m][half], decay[half], (a[0] + a[1]) + (b[0] + b[1]));
          if constexpr (KV::FP8) {
            const unsigned char* of_values = of_keys + PREFILL_KEYS;
            a[0] *= kv_scale(of_values[0]), a[1] *= kv_scale(of_values[1]);
            b[0] *= kv_scale(of_values[8]), b[1] *= kv_scale(of_values[9]);
          }
          p[m][half] = pack_bf16(a[0], a[1]), p[m][half + 2] = pack_bf16(b[0], b[1]);
        }
        if (__any_sync(ALL, decay[0] != 1.f || decay[1] != 1.f)) {  // seldom after the first keys
#pragma unroll
          for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[m][n][i] *= decay[i >> 1];
        }
      }
      const bf16* tv = tile + TILE + tile_at<W>(lane & 15, lane >> 4);
      if constexpr (KV::FP8) {
#pragma unroll
        for (int d = 0; d < DS; d += 2) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, chunk_xor(tv, d + 1 < DS ? d : d ^ (lane >> 4)));
#pragma unroll
          for (int e = 0; e < 2 && d + e < DS; e++) {
            uint32_t even[2] = {e4m3_even(b[e * 2]), e4m3_even(b[e * 2 + 1])};
            uint32_t odd[2] = {e4m3_odd(b[e * 2]), e4m3_odd(b[e * 2 + 1])};
#pragma unroll
            for (int m = 0; m < M; m++) {
              mma_m16n8k16(o[m][2 * (d + e)], p[m], even);
              mma_m16n8k16(o[m][2 * (d + e) + 1], p[m], odd);
            }
          }
        }
      }
#pragma unroll
      for (int d = 0; d < (KV::FP8 ? 0 : DS); d++) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, chunk_xor(tv, d * 2));
#pragma unroll
        for (int m = 0; m < M; m++) {
          mma_m16n8k16(o[m][2 * d], p[m], {b[0], b[1]});
          mma_m16n8k16(o[m][2 * d + 1], p[m], {b[2], b[3]});
        }
      }
    }
  }

#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = l[m][half];
      sum += __shfl_xor_sync(ALL, sum, 1);
      sum += __shfl_xor_sync(ALL, sum, 2);
      int r = row + m * 16 + half * 8 + g;
      if (r >= rows) continue;
      bf16* to = out + ((int64_t)(first_row + r) * n_heads + h) * D + c * 2;
      float inv = 1.f / sum;
      if constexpr (KV::FP8) {  // the even and the odd columns of 16
#pragma unroll
        for (int d = 0; d < DS; d++) {
          const float *even = &o[m][2 * d][2 * half], *odd = &o[m][2 * d + 1][2 * half];
          *reinterpret_cast<uint2*>(to + c * 2 + d * 16) =
              make_uint2(pack_bf16(even[0] * inv, odd[0] * inv), pack_bf16(even[1] * inv, odd[1] * inv));
        }
      }
#pragma unroll
      for (int n = 0; n < (KV::FP8 ? 0 : D / 8); n++)
        *reinterpret_cast<uint32_t*>(to + n * 8) = pack_bf16(o[m][n][2 * half] * inv, o[m][n][2 * half + 1] * inv);
    }
}

#define ATTN_PREFILL(name, KV, D, BLOCKS)                                                                             \
  extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, BLOCKS)                                                \
  name(bf16* out, const bf16* qkv, const KV::Element* k, const KV::Element* v, const uint32_t* pos,                    \
       const uint32_t* pages, int rows, int first, int shared, int n_heads, int n_kv_heads, int max_seq, int window,   \
       float scale) {                                                                                                  \
    attn_prefill<KV, D>(out, qkv, k, v, pos, pages, rows, first, shared, n_heads, n_kv_heads, max_seq, window, scale); \
  }                                                                                                                    \
  EXPORT_KERNEL(name)
ATTN_PREFILL(attn_prefill_bf16_d64, KvBf16, 64, 3)
ATTN_PREFILL(attn_prefill_bf16_d80, KvBf16, 80, 2)
ATTN_PREFILL(attn_prefill_bf16_d96, KvBf16, 96, 2)
ATTN_PREFILL(attn_prefill_bf16_d128, KvBf16, 128, 2)
ATTN_PREFILL(attn_prefill_fp8_d64, KvFp8, 64, 3)
ATTN_PREFILL(attn_prefill_fp8_d80, KvFp8, 80, 2)
ATTN_PREFILL(attn_prefill_fp8_d96, KvFp8, 96, 2)
ATTN_PREFILL(attn_prefill_fp8_d128, KvFp8, 128, 2)
