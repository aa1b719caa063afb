// kv_append: k[p,h,t,:] = k head h of row r of qkv, in page p = pages[pos[r] / ATTN_TILE] at t = pos[r] % ATTN_TILE; v likewise
// shapes:   k, v [pages of the cache, n_kv_heads, ATTN_TILE, head_dim] bf16 or fp8 (common/kv.cuh); qkv [rows,
//           n_heads + 2*n_kv_heads, head_dim] bf16; pos [rows] u32, places; pages [sequences, max_seq / ATTN_TILE] u32, the
//           page of each ATTN_TILE places.
// rounding: none; fp8: each row once, to the nearest code, ties to even.
// mapping:  block (r, c) copies elements c * 8 * VECTOR_THREADS onwards of the k heads and of the v heads of row r,
//           8 of each (16 bytes) a thread. fp8: block (r, c) has VECTOR_THREADS / 32 of the k and v heads of row r, a warp each.
// traffic:  reads 4*rows*n_kv_heads*head_dim + 8*rows bytes, writes 4*rows*n_kv_heads*head_dim, or 2*rows*n_kv_heads*(head_dim + 1).
//           Predicted, not measured: of one row 1 us and more, which is its launch and two round trips to memory.
// overlap:  waits before its first access: it is launched early after norm_qkv_rope_append, whose rows it stores in fp8, and lets
//           attn_decode ask for the keys of earlier steps meanwhile.
// requires: head_dim % 8 == 0, fp8: % 16; places are in pages of the cache, and differ (KvAppend::launch in src/ops/kv_append.rs)
// source:   ours. Not yet measured.
#include "common/kv.cuh"
#include "common/trace.cuh"

extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
kv_append_bf16(bf16* k, bf16* v, const bf16* qkv, const uint32_t* pos, const uint32_t* pages, int n_heads,
               int n_kv_heads, int head_dim, Span* trace) {
  Traced traced(trace);
  grid_dependency_wait();
  traced.ready();
  grid_launch_dependents();
  int i = (blockIdx.y * VECTOR_THREADS + threadIdx.x) * 8, kv_dim = n_kv_heads * head_dim;
  if (i >= kv_dim) return;
  const bf16* row = qkv + ((int64_t)blockIdx.x * (n_heads + 2 * n_kv_heads) + n_heads) * head_dim;
  uint32_t place = pos[blockIdx.x], page = pages[place / ATTN_TILE];
  int64_t to = (((int64_t)page * n_kv_heads + i / head_dim) * ATTN_TILE + place % ATTN_TILE) * head_dim + i % head_dim;
  st128(k + to, ld128(row + i));
  st128(v + to, ld128(row + kv_dim + i));
}
EXPORT_KERNEL(kv_append_bf16)

extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
kv_append_fp8(unsigned char* k, unsigned char* v, const bf16* qkv, const uint32_t* pos, const uint32_t* pages, int n_heads,
              int n_kv_heads, int head_dim, Span* trace) {
  Traced traced(trace);
  grid_dependency_wait();
  traced.ready();
  grid_launch_dependents();
  int h = blockIdx.y * (VECTOR_THREADS / 32) + threadIdx.x / 32;
  if (h >= 2 * n_kv_heads) return;
  const bf16* row = qkv + ((int64_t)blockIdx.x * (n_heads + 2 * n_kv_heads) + n_heads + h) * head_dim;
  uint32_t place = pos[blockIdx.x], page = pages[place / ATTN_TILE];
  unsigned char* cache = h < n_kv_heads ? k : v;
  cache += ((int64_t)page * n_kv_heads + h % n_kv_heads) * KvFp8::head(head_dim);
  store_fp8(cache, place % ATTN_TILE, row, head_dim);
}
EXPORT_KERNEL(kv_append_fp8)
