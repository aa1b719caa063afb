// norm_qkv_rope_append: y[r,i] = sum_j norm(x[r])[j] * w[i,j], norm(x)[j] = x[j] * rsqrt(mean_j(x[j]^2) + eps) * gain[j];
//           q and k heads of y rotated to position pos[r] % max_seq, half-split as in rope.cu; all to qkv, k and v heads to the
//           cache of sequence pos[r] / max_seq too.
// shapes:   qkv [rows, n_heads + 2*n_kv_heads, head_dim] bf16; k, v [sequences, n_kv_heads, max_seq, head_dim] bf16; x
//           [rows, dim] bf16; pos [rows] u32, places; gain [dim] bf16; w [(n_heads + 2*n_kv_heads) * head_dim, dim] bf16 or packed; table [positions,
//           head_dim] f32, cosines then sines.
// rounding: x * gain to bf16 (the definition rounds x * gain / rms there), sums and rotation in f32, one rounding at the
//           store: that of y before the rotation is gone.
// mapping:  common/gemv.cuh; a head is head_dim / 16 blocks, of which block j owns rows 8j to 8j + 7 of each half, so
//           that both of a pair end in one thread.
// traffic:  reads 2*n*dim + 2*dim + 2*rows*dim + 4*rows*head_dim, n rows of w; writes 2*rows*n and the cache's
//           4*rows*n_kv_heads*head_dim. = NormQkvRopeAppend::cost. Predicted, not measured, at 4.37 TB/s: 6144x4096 50.3
//           MB 11.5 us.
// requires: dim % 8 == 0, head_dim % 16 == 0, rows <= DECODE_ROWS, places in the cache, positions in the table
//                                             (NormQkvRopeAppend::check in src/ops/norm_qkv_rope_append.rs)
// source:   ours, see common/gemv.cuh. Not yet measured.
#include "common/gemv.cuh"
#include "common/trace.cuh"

template <class F, int MOST, int STAGES>
DEV void norm_qkv_rope_append(const Traced& traced, bf16* qkv, bf16* k, bf16* v, const bf16* x, const uint32_t* pos,
                              const bf16* gain, const typename F::Element* w, const float* table, int rows, int dim,
                              int n_heads, int n_kv_heads, int head_dim, int max_seq, float eps) {
  int half = head_dim / 2, blocks = head_dim / GEMV_TILE;  // of a head
  int h = blockIdx.x / blocks, i = blockIdx.x % blocks * 8;
  int row = h * head_dim + i;
  Product<F, true, MOST, STAGES, QKV_TRIGGER> p;
  p.begin(w, row, row + half, rows, dim);
  grid_dependency_wait();
  traced.ready();

  int r = threadIdx.x / 8;
  i += threadIdx.x % 8;
  bool stores = r < p.rows, rotates = h < n_heads + n_kv_heads;
  uint32_t place = stores ? pos[r] : 0, sequence = place / (uint32_t)max_seq;
  int64_t at = place - sequence * (uint32_t)max_seq;
  float c = 1.f, s = 0.f;  // early: their latency would show at the end
  if (stores && rotates) c = table[at * head_dim + i], s = table[at * head_dim + half + i];
  p.run(x, gain);
  float2 y = p.total(eps);
  if (!stores) return;
  if (rotates) y = make_float2(y.x * c - y.y * s, y.y * c + y.x * s);
  bf16 lo = __float2bfloat16(y.x), hi = __float2bfloat16(y.y);
  qkv += ((int64_t)r * (n_heads + 2 * n_kv_heads) + h) * head_dim + i;
  qkv[0] = lo, qkv[half] = hi;
  int kvh = h - n_heads;
  if (kvh < 0) return;
  bf16* cache = kvh < n_kv_heads ? k : v;
  cache += (((int64_t)sequence * n_kv_heads + kvh % n_kv_heads) * max_seq + at) * head_dim + i;
  cache[0] = lo, cache[half] = hi;
}

#define NORM_QKV_ROPE_APPEND(name, F, MOST, STAGES, BLOCKS)                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                       \
      name(bf16* qkv, bf16* k, bf16* v, const bf16* x, const uint32_t* pos, const bf16* gain, const F::Element* w,    \
           const float* table, int rows, int dim, int n_heads, int n_kv_heads, int head_dim, int max_seq, float eps,  \
           Span* trace) {                                                                                             \
    Traced traced(trace);                                                                                             \
    norm_qkv_rope_append<F, MOST, STAGES>(traced, qkv, k, v, x, pos, gain, w, table, rows, dim, n_heads, n_kv_heads,     \
                                       head_dim, max_seq, eps);                                                       \
  }                                                                                                                   \
  EXPORT_KERNEL(name)

#define NORM_QKV_ROPE_APPEND_PACKED(name, F) PACKED_PRODUCT(NORM_QKV_ROPE_APPEND, name, F)

EACH_PRODUCT(NORM_QKV_ROPE_APPEND, norm_qkv_rope_append_bf16)
EACH_PACKED(NORM_QKV_ROPE_APPEND_PACKED, norm_qkv_rope_append, )
