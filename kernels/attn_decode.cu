// attn_decode: out[r,h] = softmax_t( q[r,h] . k[s,g,t] / sqrt(D) ) v[s,g,t] over the last `window` t <= pos[r] % max_seq, g = h /
//              group, in sequence s = pos[r] / max_seq; few rows.
// shapes:   out [rows, n_heads*D] bf16; qkv [rows, (n_heads+2*n_kv_heads)*D] bf16, q first; k, v [pages of the cache,
//           n_kv_heads, ATTN_TILE, D] bf16 or fp8 (common/kv.cuh); pos [rows] u32, places; pages [sequences, max_seq /
//           ATTN_TILE] u32, the page of each ATTN_TILE places; part [rows, n_heads, splits, D] f32, then [rows,
//           n_heads, splits, 2] f32 (maximum, sum); arrived [rows, n_kv_heads] u32, zero before and after.
// rounding: scores, exponentials and sums in f32; a weight enters the tensor cores as the sum of two bf16 (2^-17 of it
//           is lost); one rounding at the store.
// mapping:  block (split, kv head, row), 4 warps: all heads of a group, so each key and value is loaded once a row. A
//           split is span = 64 ceil(len / 3072) keys from split * span on, len = position + 1, both counted from the
//           multiple of 64 at or before the window's first key: at most 48 splits, of 64 keys up to 3072. Of 8 kv heads
//           that is 384 blocks, which 132 SMs hold at once (3 each; with 64 splits they would not). Splits depend on
//           position and window and nothing else, so a row's bits do too; blocks beyond the last one exit. A warp takes 16
//           of each 64 keys with its own online softmax and has 8 KB of keys and values in flight (D 128).
// mma:      scores = q k^T with the heads as rows, then out^T = v^T p^T, for which the scores lie as they came. Both
//           take the 16 bytes that a lane loads as operands: along D the order of a sum is free, and along keys two
//           rows of v are interleaved in registers. Heads that are no multiple of 64 wide (80, 96) are padded with zeros in
//           registers.
// fp8:      16 codes a load instead of 8, widened to bf16 in registers after it; a key's scale multiplies its score and a value's
//           its weight, both exactly. Key by key the sums are those of bf16 in another order along D.
// overlap:  the first tile of a block is asked for before grid_dependency_wait, except for the keys of this step's own rows.
// pages:    a tile is a page. Counted: one load of 4 bytes a tile and block, for which a tile has 256*D bytes (at D 128 1 in
//           8192). Up to 3072 keys a block has one tile, whose page is one round trip to L2 more in the chain from place to
//           first key (predicted, not measured: 0.2 us), before grid_dependency_wait, where the block has the time; the page of
//           each further tile is asked for while the tile before it is on its way.
// merge:    warps in order through shared memory; splits in order by the block that arrives last.
// traffic:  reads 4*n_kv_heads*D bytes a key (once for all rows where L2 holds them) and 2*rows*n_heads*D; writes as
//           much; part stays in L2; with a window, only its keys. = AttnDecode::cost. Predicted, not measured, at 4.37 TB/s,
//           8 kv heads of 128: 8.4 MB 1.9 us at 2048 keys and 33.6 MB 7.7 us at 8192; plus about 4 us for three dependent round trips to
//           memory. Of a step of Llama-3-8B, 48 splits instead of 32 are predicted to save 2.3 us a layer just above 2048
//           keys and 1.9 us at 8192 on an H200 (the model of docs/decode-step.md).
//           fp8: 2*n_kv_heads*(D+1) bytes a key, half the time above for the keys; predicted, not measured.
// requires: D 64, 80, 96 or 128, group <= 8, max_seq % ATTN_TILE == 0
//                                          (AttnDecode::check, AttnDecode::check_kernel in src/ops/attn_decode.rs)
// source:   Dao et al. 2023 (flash-decoding), Milakov & Gimelshein 2018 (online softmax). Not yet measured.
#include "common/kv.cuh"
#include "common/trace.cuh"

constexpr int HEADS = ATTN_GROUP;  // most heads of a group: rows of the mma that carry a head
constexpr int WARPS = ATTN_THREADS / 32;
constexpr int WARP_KEYS = ATTN_TILE / WARPS;
static_assert(HEADS == 8 && WARP_KEYS == 16, "the shape of mma m16n8k16");
static_assert(ATTN_SPLITS > 32 && ATTN_SPLITS <= 64, "a lane of the last block has two splits, or one");

// What one lane (g = lane / 4, c = lane % 4) holds of its warp's 16 keys: COLS columns are 16 bytes.
template <class KV, int D> struct Tile {
  static constexpr int COLS = 8, K = (D + 31) / 32, V = (D + 63) / 64, Q = K;
  uint4 k[2][K];  // keys g and g + 8, columns 8c to 8c + 7 of each 32
  uint4 v[V][4];  // keys 2c, 2c + 1, 2c + 8, 2c + 9, columns 8g to 8g + 7 of each 64
};
template <int D> struct Tile<KvFp8, D> {
  static constexpr int COLS = 16, K = (D + 63) / 64, V = (D + 127) / 128, Q = 2 * K;
  uint4 k[2][K];  // keys g and g + 8, columns 16c to 16c + 15 of each 64
  uint4 v[V][4];  // keys 2c, 2c + 1, 2c + 8, 2c + 9, columns 16g to 16g + 15 of each 128
  uint32_t k_scale[4], v_scale[4];  // of these four keys
};

// Which keys of a tile are asked for: all but those from `skip` to before `until`. Those before `first` and beyond `last` are read
// as these; their weight is zero. What is read so lies in the tile's page.
struct Keys {
  int skip, until, first, last;
};

// The row in its page that is read for key `at`.
DEV int row_of(int at, const Keys& keys) { return max(min(at, keys.last), keys.first) & (ATTN_TILE - 1); }

// 16 bytes of the row of key `at`, in the page at `rows`, from `column` on; zeros beyond the head. Past L1: what is loaded before
// grid_dependency_wait must not be what L1 has of it.
template <int D, class Element> DEV uint4 ld_chunk(const Element* rows, int at, const Keys& keys, int column) {
  if (D % (128 / sizeof(Element)) != 0 && column >= D) return make_uint4(0, 0, 0, 0);
  return ld128_l2(rows + row_of(at, keys) * D + column);
}

// The bytes of the scales of keys 2c, 2c + 1, 2c + 8 and 2c + 9.
template <int D> DEV void load_scales(uint32_t (&scale)[4], const unsigned char* rows, int key, const Keys& keys, int c) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int at = key + 2 * c + i % 2 + i / 2 * 8;
    if (at < keys.skip || at >= keys.until) scale[i] = __ldcg(rows + ATTN_TILE * D + row_of(at, keys));
  }
}

template <class KV, int D>
DEV void load_k(Tile<KV, D>& t, const typename KV::Element* k, int key, const Keys& keys, int g, int c) {
  typedef Tile<KV, D> T;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int at = key + half * 8 + g;
    if (at >= keys.skip && at < keys.until) continue;
#pragma unroll
    for (int j = 0; j < T::K; j++) t.k[half][j] = ld_chunk<D>(k, at, keys, j * 4 * T::COLS + c * T::COLS);
  }
  if constexpr (KV::FP8) load_scales<D>(t.k_scale, k, key, keys, c);
}

template <class KV, int D>
DEV void load_v(Tile<KV, D>& t, const typename KV::Element* v, int key, const Keys& keys, int g, int c) {
  typedef Tile<KV, D> T;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int at = key + 2 * c + i % 2 + i / 2 * 8;
    if (at >= keys.skip && at < keys.until) continue;
#pragma unroll
    for (int j = 0; j < T::V; j++) t.v[j][i] = ld_chunk<D>(v, at, keys, j * 8 * T::COLS + g * T::COLS);
  }
  if constexpr (KV::FP8) load_scales<D>(t.v_scale, v, key, keys, c);
}

DEV uint32_t word(uint4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

DEV float4 ld_float4(const float* p) {
  uint4 u = ld128(p);
  return make_float4(__uint_as_float(u.x), __uint_as_float(u.y), __uint_as_float(u.z), __uint_as_float(u.w));
}
DEV void st_float4(float* p, float4 v) {
  st128(p, make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)));
}
// a += s * v
DEV void add_scaled(float4& a, float s, float4 v) {
  a = make_float4(fmaf(s, v.x, a.x), fmaf(s, v.y, a.y), fmaf(s, v.z, a.z), fmaf(s, v.w, a.w));
}
DEV void store(bf16* out, float4 v, float scale) {
  *reinterpret_cast<uint2*>(out) = make_uint2(pack_bf16(v.x * scale, v.y * scale), pack_bf16(v.z * scale, v.w * scale));
}

// One warp's state of the online softmax: maximum and sum of head g over the keys of this lane; out^T of heads 2c and
// 2c + 1 (elements 0, 2 and 1, 3), columns (8j + g) * COLS + 2i (elements 0, 1) and the next (2, 3) in acc[j * COLS / 2 + i].
template <class KV, int D> struct Softmax {
  static constexpr int COLS = Tile<KV, D>::COLS, ACC = COLS / 2 * Tile<KV, D>::V;
  float max, sum, acc[ACC][4];
};

template <int D> DEV void scores(float (&s)[4], const uint4 (&q)[Tile<KvBf16, D>::Q], const Tile<KvBf16, D>& t) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    // q's words lie as x, z, y, w: rows 0-7 of the mma have the first two words of each column group and rows 8-15 the
    // other two, so only rows 0-7 of the products with k's first two words count, and rows 8-15 of the others
    float a[4] = {}, b[4] = {};
#pragma unroll
    for (int j = 0; j < Tile<KvBf16, D>::K; j++) {
      mma_m16n8k16(a, {q[j].x, q[j].y, q[j].z, q[j].w}, {t.k[half][j].x, t.k[half][j].y});
      mma_m16n8k16(b, {q[j].x, q[j].y, q[j].z, q[j].w}, {t.k[half][j].z, t.k[half][j].w});
    }
    s[half * 2] = a[0] + b[2];
    s[half * 2 + 1] = a[1] + b[3];
  }
}

// The same of codes. q's words are those of columns 0 and 2, 4 and 6, 1 and 3, 5 and 7: codes widen to such pairs.
template <int D> DEV void scores(float (&s)[4], const uint4 (&q)[Tile<KvFp8, D>::Q], const Tile<KvFp8, D>& t) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float a[4] = {}, b[4] = {};
#pragma unroll
    for (int j = 0; j < Tile<KvFp8, D>::Q; j++) {
      uint32_t low = word(t.k[half][j / 2], j % 2 * 2), high = word(t.k[half][j / 2], j % 2 * 2 + 1);
      mma_m16n8k16(a, {q[j].x, q[j].y, q[j].z, q[j].w}, {e4m3_even(low), e4m3_odd(low)});
      mma_m16n8k16(b, {q[j].x, q[j].y, q[j].z, q[j].w}, {e4m3_even(high), e4m3_odd(high)});
    }
    s[half * 2] = (a[0] + b[2]) * kv_scale(t.k_scale[half * 2]);
    s[half * 2 + 1] = (a[1] + b[3]) * kv_scale(t.k_scale[half * 2 + 1]);
  }
}

// s: scores times log2(e) / sqrt(D) of head g and keys 2c, 2c + 1, 2c + 8, 2c + 9; becomes the weights.
template <class KV, int D> DEV void weigh(Softmax<KV, D>& m, float (&s)[4], int c) {
  float top = fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3]));
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
  top = fmaxf(m.max, fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2)));
  float base = top == -INFINITY ? 0.f : top;  // a warp may have no live key yet
  float shrink = exp2f(m.max - base);
  m.max = top;
  m.sum *= shrink;
#pragma unroll
  for (int i = 0; i < 4; i++) s[i] = exp2f(s[i] - base), m.sum += s[i];
  // the accumulators of this lane belong to other heads
  float even = __shfl_sync(0xffffffffu, shrink, c * 8), odd = __shfl_sync(0xffffffffu, shrink, c * 8 + 4);
#pragma unroll
  for (int i = 0; i < Softmax<KV, D>::ACC; i++) m.acc[i][0] *= even, m.acc[i][1] *= odd, m.acc[i][2] *= even, m.acc[i][3] *= odd;
}

template <class KV, int D> DEV void add_values(Softmax<KV, D>& m, const float (&p)[4], const Tile<KV, D>& t) {
  uint32_t hi[2], lo[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float x = p[half * 2], y = p[half * 2 + 1];
    if constexpr (KV::FP8) x *= kv_scale(t.v_scale[half * 2]), y *= kv_scale(t.v_scale[half * 2 + 1]);
    hi[half] = pack_bf16(x, y);
    lo[half] = pack_bf16(x - bf_lo(hi[half]), y - bf_hi(hi[half]));
  }
#pragma unroll
  for (int j = 0; j < Tile<KV, D>::V; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t a = word(t.v[j][0], i), b = word(t.v[j][1], i), c = word(t.v[j][2], i), d = word(t.v[j][3], i);
      uint32_t v[4] = {lows(a, b), highs(a, b), lows(c, d), highs(c, d)};
      if constexpr (KV::FP8) {  // two columns of two keys in each word
#pragma unroll
        for (int n = 0; n < 2; n++) {
          uint32_t w[4] = {e4m3_even(v[n]), e4m3_odd(v[n]), e4m3_even(v[n + 2]), e4m3_odd(v[n + 2])};
          mma_m16n8k16(m.acc[j * 8 + i * 2 + n], w, hi);
          mma_m16n8k16(m.acc[j * 8 + i * 2 + n], w, lo);
        }
      } else {
        mma_m16n8k16(m.acc[j * 4 + i], v, hi);
        mma_m16n8k16(m.acc[j * 4 + i], v, lo);
      }
    }
}

template <class KV, int D>
DEV void attn_decode(const Traced& traced, bf16* out, float* part, unsigned* arrived, const bf16* qkv,
                     const typename KV::Element* k, const typename KV::Element* v, const unsigned* places,
                     const unsigned* pages, int n_heads, int n_kv_heads, int max_seq, int window, float scale) {
  typedef Tile<KV, D> T;
  constexpr int PITCH = D + 8;  // moves the heads of a lane's neighbours to other banks
  SHARED(float, acc, WARPS * HEADS * PITCH);
  SHARED(float, max_of, WARPS * HEADS);
  SHARED(float, sum_of, WARPS * HEADS);
  SHARED(float, weight, HEADS * ATTN_SPLITS);
  SHARED(unsigned, before, 1);
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  int split = blockIdx.x, splits = gridDim.x, kvh = blockIdx.y, r = blockIdx.z;

  // written two kernels ago or earlier: this one starts when all blocks of the one before have waited for that
  uint32_t place = __ldcg(places + r), base = place - place % (uint32_t)max_seq;  // the first place of its sequence
  int pos = place - base, len = pos + 1;
  uint32_t fresh = pos;  // a row of another sequence is farther from base, below it or above
  for (int i = 0; i < gridDim.z; i++) fresh = min(fresh, __ldcg(places + i) - base);
  int seen = max(len - window, 0), origin = seen / ATTN_TILE * ATTN_TILE;  // the first key that it sees, and of its tiles
  int span = (len - origin + ATTN_TILE * ATTN_SPLITS - 1) / (ATTN_TILE * ATTN_SPLITS) * ATTN_TILE;
  int first = origin + split * span, end = min(first + span, len);
  if (first >= len) return;

  // the host wrote the table before the step began
  pages += base / ATTN_TILE;
  auto head = [&](uint32_t page) { return ((int64_t)page * n_kv_heads + kvh) * KV::head(D); };
  int64_t at = head(__ldcg(pages + first / ATTN_TILE));
  T t;
  int key = first + warp * WARP_KEYS;
  if (key < (int)fresh) {  // the kernel before appends the keys from `fresh` on; those of earlier steps are there
    Keys old = {0, seen, 0, (int)fresh - 1};  // none before the window: they would be read again as its first
    load_k(t, k + at, key, old, g, c);
    load_v(t, v + at, key, old, g, c);
  }
  grid_dependency_wait();
  traced.ready();
  grid_launch_dependents();
  Keys rest = {seen, (int)fresh, seen, pos}, next = {0, 0, 0, pos};
  load_k(t, k + at, key, rest, g, c);
  load_v(t, v + at, key, rest, g, c);
  uint32_t page = first + ATTN_TILE < end ? __ldcg(pages + first / ATTN_TILE + 1) : 0;  // of the next tile
  int live = (len - origin + span - 1) / span, group = n_heads / n_kv_heads;  // after the loads: divisions take a while
  // lanes without a head compute the last one again
  const bf16* q_row = qkv + ((int64_t)r * (n_heads + 2 * n_kv_heads) + kvh * group + min(g, group - 1)) * D;
  uint4 q[T::Q];
#pragma unroll
  for (int j = 0; j < T::Q; j++) {
    uint4 u = make_uint4(0, 0, 0, 0);
    if constexpr (KV::FP8) {
      int column = j / 2 * 64 + c * 16 + j % 2 * 8;
      if (D % 64 == 0 || column < D) u = ld128(q_row + column);
      u = make_uint4(lows(u.x, u.y), highs(u.x, u.y), lows(u.z, u.w), highs(u.z, u.w));
    } else if (D % 32 == 0 || j * 32 + c * 8 < D) {
      u = ld128(q_row + j * 32 + c * 8);
    }
    q[j] = make_uint4(u.x, u.z, u.y, u.w);  // see scores
  }

  Softmax<KV, D> m = {-INFINITY, 0.f, {}};
  for (int tile = first; tile < end; tile += ATTN_TILE) {
    bool more = tile + ATTN_TILE < end;
    float s[4];
    scores<D>(s, q, t);
    at = head(page);
    if (more) load_k(t, k + at, key + ATTN_TILE, next, g, c);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int j = key + 2 * c + i % 2 + i / 2 * 8;
      s[i] = j >= seen && j < len ? s[i] * scale : -INFINITY;
    }
    weigh(m, s, c);
    add_values(m, s, t);
    if (more) load_v(t, v + at, key + ATTN_TILE, next, g, c);
    if (tile + 2 * ATTN_TILE < end) page = __ldcg(pages + tile / ATTN_TILE + 2);
    key += ATTN_TILE;
  }

  m.sum += __shfl_xor_sync(0xffffffffu, m.sum, 1);
  m.sum += __shfl_xor_sync(0xffffffffu, m.sum, 2);
  if (c == 0) max_of[warp * HEADS + g] = m.max, sum_of[warp * HEADS + g] = m.sum;
#pragma unroll
  for (int odd = 0; odd < 2; odd++)
#pragma unroll
    for (int j = 0; j < T::V; j++) {
      if (D % (8 * T::COLS) != 0 && j * 8 * T::COLS + g * T::COLS >= D) continue;
      float* to = acc + (warp * HEADS + 2 * c + odd) * PITCH + j * 8 * T::COLS + g * T::COLS;
#pragma unroll
      for (int i = 0; i < T::COLS / 2; i += 2) {
        const float(&a)[4] = m.acc[j * (T::COLS / 2) + i], (&b)[4] = m.acc[j * (T::COLS / 2) + i + 1];
        st_float4(to + i * 2, make_float4(a[odd], a[2 + odd], b[odd], b[2 + odd]));
      }
    }
  __syncthreads();  // the results of all warps are there

  int64_t row_head = (int64_t)r * n_heads + kvh * group;
  float* part_acc = part + row_head * splits * D;
  float* part_state = part + (int64_t)gridDim.z * n_heads * splits * D + row_head * splits * 2;
  out += row_head * D;
  for (int i = threadIdx.x; i < group * (D / 4); i += ATTN_THREADS) {
    int h = i / (D / 4), d = i % (D / 4) * 4;
    float top = max_of[h], sum = 0.f;
#pragma unroll
    for (int w = 1; w < WARPS; w++) top = fmaxf(top, max_of[w * HEADS + h]);
    float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      float f = exp2f(max_of[w * HEADS + h] - top);
      sum = fmaf(f, sum_of[w * HEADS + h], sum);
      add_scaled(o, f, ld_float4(acc + (w * HEADS + h) * PITCH + d));
    }
    if (live == 1) {
      store(out + h * D + d, o, 1.f / sum);
    } else {
      st_float4(part_acc + (h * splits + split) * D + d, o);
      if (d == 0) *reinterpret_cast<float2*>(part_state + (h * splits + split) * 2) = make_float2(top, sum);
    }
  }
  if (live == 1) return;

  __syncthreads();  // all threads have written their parts, which the next line publishes
  if (threadIdx.x == 0) before[0] = atomic_add_acq_rel(arrived + r * n_kv_heads + kvh, 1u);
  __syncthreads();  // everyone knows, and sees the parts of the blocks that came before
  if (before[0] + 1 != live) return;
  for (int h = warp; h < group; h += WARPS) {
    float2 state[2];
    float f[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int s = lane + i * 32;
      state[i] = make_float2(-INFINITY, 0.f);
      if (s < live) state[i] = *reinterpret_cast<const float2*>(part_state + (h * splits + s) * 2);
    }
    float top = warp_max(fmaxf(state[0].x, state[1].x));
#pragma unroll
    for (int i = 0; i < 2; i++) f[i] = exp2f(state[i].x - top);
    float sum = warp_sum(fmaf(f[1], state[1].y, f[0] * state[0].y));
    weight[h * ATTN_SPLITS + lane] = f[0] / sum;
    if (lane + 32 < ATTN_SPLITS) weight[h * ATTN_SPLITS + lane + 32] = f[1] / sum;
  }
  __syncthreads();  // the weights of all splits are there
  for (int i = threadIdx.x; i < group * (D / 4); i += ATTN_THREADS) {
    int h = i / (D / 4), d = i % (D / 4) * 4;
    float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
    for (int s = 0; s < live; s++)
      add_scaled(o, weight[h * ATTN_SPLITS + s], ld_float4(part_acc + (h * splits + s) * D + d));
    store(out + h * D + d, o, 1.f);
  }
  if (threadIdx.x == 0) arrived[r * n_kv_heads + kvh] = 0;
}

#define ATTN_DECODE(name, KV, D)                                                                                  \
  extern "C" __global__ void __launch_bounds__(ATTN_THREADS, 3)                                                   \
      name(bf16* out, float* part, unsigned* arrived, const bf16* qkv, const KV::Element* k, const KV::Element* v, \
           const unsigned* pos, const unsigned* pages, int n_heads, int n_kv_heads, int max_seq, int window,      \
           float scale, Span* trace) {                                                                            \
    Traced traced(trace);                                                                                         \
    attn_decode<KV, D>(traced, out, part, arrived, qkv, k, v, pos, pages, n_heads, n_kv_heads, max_seq, window,   \
                       scale);                                                                                    \
  }                                                                                                               \
  EXPORT_KERNEL(name)

// What is supported: four widths of a head, two formats of the cache.
ATTN_DECODE(attn_decode_bf16_d64, KvBf16, 64)
ATTN_DECODE(attn_decode_bf16_d80, KvBf16, 80)
ATTN_DECODE(attn_decode_bf16_d96, KvBf16, 96)
ATTN_DECODE(attn_decode_bf16_d128, KvBf16, 128)
ATTN_DECODE(attn_decode_fp8_d64, KvFp8, 64)
ATTN_DECODE(attn_decode_fp8_d80, KvFp8, 80)
ATTN_DECODE(attn_decode_fp8_d96, KvFp8, 96)
ATTN_DECODE(attn_decode_fp8_d128, KvFp8, 128)
