// norm_qkv_rope_append: y[r,i] = sum_j norm(x[r])[j] * w[i,j] + bias[i], norm(x)[j] = x[j] * rsqrt(mean_j(x[j]^2) + eps) * gain[j];
//           q and k heads h of y, with `heads` h[i] * rsqrt(mean_i(h[i]^2) + eps) * heads[0 or 1,i], rotated to position
//           pos[r] % max_seq, half-split as in rope.cu; all to qkv, k and v heads also to row pos[r] % ATTN_TILE of page
//           pages[pos[r] / ATTN_TILE] of the cache.
// shapes:   qkv [rows, n_heads + 2*n_kv_heads, head_dim] bf16; k, v [pages of the cache, n_kv_heads, ATTN_TILE, head_dim] bf16,
//           or null where kv_append stores them from qkv; arrived [n_heads + n_kv_heads] u32, 0 before and after; x [rows, dim]
//           bf16; pos [rows] u32, places; pages [sequences, max_seq / ATTN_TILE] u32, the page of each ATTN_TILE places; gain
//           [dim] bf16; w [(n_heads + 2*n_kv_heads) * head_dim, dim] bf16 or packed; bias [rows of w] bf16, or null for none;
//           heads [2, head_dim] bf16, that of q heads and that of k heads, or null: heads are not normed; table [positions,
//           head_dim] f32, cosines then sines.
// rounding: x * gain to bf16 (the definition rounds x * gain / rms there), sums and rotation in f32, one rounding at the
//           store: that of y before the rotation is gone. A head that is normed is rounded before its norm, as in the
//           definition, and no more until the store.
// mapping:  common/gemv.cuh; a head is head_dim / 16 blocks, of which block j owns rows 8j to 8j + 7 of each half, so
//           that both of a pair end in one thread. A head that is normed is finished by that of its blocks that arrives last, a
//           warp for each row.
// traffic:  reads 2*n*dim + 2*dim + 2*rows*dim + 4*rows*head_dim, n rows of w; writes 2*rows*n and the cache's
//           4*rows*n_kv_heads*head_dim. = NormQkvRopeAppend::cost, which leaves out 4 bytes of `pages` a row. Predicted, not
//           measured, at 4.37 TB/s: 6144x4096 50.3 MB 11.5 us; with normed heads some 2 us more, for the round trips of counter
//           and head to L2. The page is asked for before the product and first used after it: no time of its own.
// requires: dim % 8 == 0, head_dim % 16 == 0, rows <= DECODE_ROWS, places in pages of the cache, positions in the table
//                                             (NormQkvRopeAppend::check in src/ops/norm_qkv_rope_append.rs)
// source:   ours, see common/gemv.cuh. Not yet measured.
#include "common/gemv.cuh"
#include "common/trace.cuh"

template <class F, int MOST, int STAGES>
DEV void norm_qkv_rope_append(const Traced& traced, bf16* qkv, bf16* k, bf16* v, unsigned* arrived, const bf16* x,
                              const uint32_t* pos, const uint32_t* pages, const bf16* gain,
                              const typename F::Element* w, const bf16* bias, const bf16* heads, const float* table, int rows,
                              int dim, int n_heads, int n_kv_heads, int head_dim, int max_seq, float eps) {
  int half = head_dim / 2, blocks = head_dim / GEMV_TILE;  // of a head
  int h = blockIdx.x / blocks, i = blockIdx.x % blocks * 8;
  int row = h * head_dim + i;
  Product<F, true, MOST, STAGES, QKV_TRIGGER> p;
  p.begin(w, row, row + half, rows, dim);
  int r = threadIdx.x / 8;
  i += threadIdx.x % 8;
  int column = h * head_dim + i;
  float2 add = make_float2(0.f, 0.f);
  if constexpr (MOST == 1) add = biases(bias, column, column + half);  // early: their latency would show at the end
  grid_dependency_wait();
  traced.ready();

  bool rotates = h < n_heads + n_kv_heads, normed = rotates && heads != nullptr, stores = r < p.rows;
  int kvh = h - n_heads;
  uint32_t place = stores ? pos[r] : 0, at = place % (uint32_t)max_seq;
  uint32_t page = stores && kvh >= 0 ? pages[place / ATTN_TILE] : 0;
  float c = 1.f, s = 0.f;  // early, too
  if (stores && rotates && !normed) c = table[(int64_t)at * head_dim + i], s = table[(int64_t)at * head_dim + half + i];
  p.run(x, gain);
  float2 y = p.total(eps);
  if constexpr (MOST > 1) add = biases(bias, column, column + half);  // there were no registers for them
  y.x += add.x, y.y += add.y;
  bf16* to = qkv + ((int64_t)r * (n_heads + 2 * n_kv_heads) + h) * head_dim + i;
  if (!normed) {
    if (!stores) return;
    if (rotates) y = make_float2(y.x * c - y.y * s, y.y * c + y.x * s);
    bf16 lo = __float2bfloat16(y.x), hi = __float2bfloat16(y.y);
    to[0] = lo, to[half] = hi;
    if (kvh < 0 || k == nullptr) return;
    bf16* cache = kvh < n_kv_heads ? k : v;
    cache += (((int64_t)page * n_kv_heads + kvh % n_kv_heads) * ATTN_TILE + place % ATTN_TILE) * head_dim + i;
    cache[0] = lo, cache[half] = hi;
    return;
  }

  if (stores) to[0] = __float2bfloat16(y.x), to[half] = __float2bfloat16(y.y);
  __syncthreads();  // all threads have written their part of the head, which the next line publishes
  bool is_last = threadIdx.x == 0 && atomic_add_acq_rel(arrived + h, 1u) + 1 == blocks;
  if (!__syncthreads_or(is_last)) return;  // everyone knows, and sees the parts of the blocks that came before
  if (threadIdx.x == 0) arrived[h] = 0;
  const bf16* head_gain = heads + (kvh < 0 ? 0 : head_dim);
  int lane = threadIdx.x % 32;
  for (r = threadIdx.x / 32; r < p.rows; r += GEMV_WARPS) {
    bf16* head = qkv + ((int64_t)r * (n_heads + 2 * n_kv_heads) + h) * head_dim;
    float sum = 0.f;
    for (i = lane; i < half; i += 32) {
      float lo = __bfloat162float(head[i]), hi = __bfloat162float(head[i + half]);
      sum = fmaf(hi, hi, fmaf(lo, lo, sum));
    }
    float scale = rsqrtf(warp_sum(sum) / head_dim + eps);
    place = pos[r], at = place % (uint32_t)max_seq;
    if (kvh >= 0) page = pages[place / ATTN_TILE];
    bf16* cache = k + (((int64_t)page * n_kv_heads + kvh) * ATTN_TILE + place % ATTN_TILE) * head_dim;
    for (i = lane; i < half; i += 32) {
      float lo = __bfloat162float(head[i]) * scale * __bfloat162float(head_gain[i]);
      float hi = __bfloat162float(head[i + half]) * scale * __bfloat162float(head_gain[i + half]);
      c = table[(int64_t)at * head_dim + i], s = table[(int64_t)at * head_dim + half + i];
      bf16 first = __float2bfloat16(lo * c - hi * s), second = __float2bfloat16(hi * c + lo * s);
      head[i] = first, head[i + half] = second;
      if (kvh >= 0 && k != nullptr) cache[i] = first, cache[i + half] = second;
    }
  }
}

#define NORM_QKV_ROPE_APPEND(name, F, MOST, STAGES, BLOCKS)                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                       \
      name(bf16* qkv, bf16* k, bf16* v, unsigned* arrived, const bf16* x, const uint32_t* pos, const uint32_t* pages, \
           const bf16* gain, const F::Element* w, const bf16* bias, const bf16* heads, const float* table, int rows,  \
           int dim, int n_heads, int n_kv_heads, int head_dim, int max_seq, float eps, Span* trace) {                 \
    Traced traced(trace);                                                                                             \
    norm_qkv_rope_append<F, MOST, STAGES>(traced, qkv, k, v, arrived, x, pos, pages, gain, w, bias, heads, table,     \
                                          rows, dim, n_heads, n_kv_heads, head_dim, max_seq, eps);                    \
  }                                                                                                                   \
  EXPORT_KERNEL(name)

#define NORM_QKV_ROPE_APPEND_PACKED(name, F) PACKED_PRODUCT(NORM_QKV_ROPE_APPEND, name, F, GEMV_BLOCKS - 1)

EACH_PRODUCT(NORM_QKV_ROPE_APPEND, norm_qkv_rope_append_bf16)
EACH_PACKED(NORM_QKV_ROPE_APPEND_PACKED, norm_qkv_rope_append, )
