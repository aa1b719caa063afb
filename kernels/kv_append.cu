// kv_append: k[p,h,t,:] = k head h of row r of qkv, in page p = pages[pos[r] / ATTN_TILE] at t = pos[r] % ATTN_TILE; v likewise
// shapes:   k, v [pages of the cache, n_kv_heads, ATTN_TILE, head_dim] bf16; qkv [rows, n_heads + 2*n_kv_heads, head_dim] bf16;
//           pos [rows] u32, places; pages [sequences, max_seq / ATTN_TILE] u32, the page of each ATTN_TILE places.
// rounding: none.
// mapping:  block (r, c) copies elements c * 8 * VECTOR_THREADS onwards of the k heads and of the v heads of row r,
//           8 of each (16 bytes) a thread.
// traffic:  reads 4*rows*n_kv_heads*head_dim + 8*rows bytes, writes 4*rows*n_kv_heads*head_dim. = KvAppend::cost
// requires: head_dim % 8 == 0; places are in pages of the cache, and differ (KvAppend::launch in src/ops/kv_append.rs)
// source:   ours. Not yet measured.
#include "common/device.cuh"
#include "common/tiles.h"
#include "common/trace.cuh"

extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
kv_append_bf16(bf16* k, bf16* v, const bf16* qkv, const uint32_t* pos, const uint32_t* pages, int n_heads,
               int n_kv_heads, int head_dim, Span* trace) {
  Traced traced(trace);
  int i = (blockIdx.y * VECTOR_THREADS + threadIdx.x) * 8, kv_dim = n_kv_heads * head_dim;
  if (i >= kv_dim) return;
  const bf16* row = qkv + ((int64_t)blockIdx.x * (n_heads + 2 * n_kv_heads) + n_heads) * head_dim;
  uint32_t place = pos[blockIdx.x], page = pages[place / ATTN_TILE];
  int64_t to = (((int64_t)page * n_kv_heads + i / head_dim) * ATTN_TILE + place % ATTN_TILE) * head_dim + i % head_dim;
  st128(k + to, ld128(row + i));
  st128(v + to, ld128(row + kv_dim + i));
}
EXPORT_KERNEL(kv_append_bf16)
