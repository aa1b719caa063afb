// rope: (a, b) = (a c - b s, b c + a s) for a = h[i], b = h[i + head_dim/2], i < head_dim/2, in place, for each q and k
//       head h of a row; c, s = cos, sin of t * inv_freq[i], t = pos[r] % max_seq the position of the row.
//       Half-split (Hugging Face), not interleaved (Su et al. 2021).
// shapes:   qkv [rows, n_heads + 2*n_kv_heads, head_dim] bf16, of which the v heads stay as they are; pos [rows] u32,
//           places (sequence * max_seq + position); table [positions, head_dim] f32, cosines then sines of a position.
// rounding: each f32 operation by itself (no fused multiply-add), so the bits are those of Rope::reference;
//           one at the store.
// mapping:  block (r, c) rotates the pairs from c * 8 * VECTOR_THREADS onwards of row r, 8 pairs (2 x 16 bytes) a
//           thread.
// traffic:  reads 2*rows*rot + 4*rows*head_dim + 4*rows bytes, writes 2*rows*rot,
//           rot = (n_heads + n_kv_heads) * head_dim. = Rope::cost
// requires: head_dim % 16 == 0; each position in the table                   (Rope::launch in src/ops/rope.rs)
// source:   ours. Not yet measured.
#include "common/device.cuh"
#include "common/tiles.h"
#include "common/trace.cuh"

extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
rope_bf16(bf16* qkv, const uint32_t* pos, const float* table, int qkv_dim, int rotated_heads, int head_dim,
          int max_seq, Span* trace) {
  Traced traced(trace);
  int half = head_dim / 2;
  int pair = (blockIdx.y * VECTOR_THREADS + threadIdx.x) * 8;
  int h = pair / half, i = pair % half;
  if (h >= rotated_heads) return;
  bf16* head = qkv + (int64_t)blockIdx.x * qkv_dim + h * head_dim;
  const float* row = table + (int64_t)(pos[blockIdx.x] % (uint32_t)max_seq) * head_dim;
  float a[8], b[8];
  unpack8(ld128(head + i), a);
  unpack8(ld128(head + half + i), b);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    float c = row[i + j], s = row[half + i + j], x = a[j];  // neighbouring threads' loads share their lines
    a[j] = __fsub_rn(__fmul_rn(x, c), __fmul_rn(b[j], s));
    b[j] = __fadd_rn(__fmul_rn(b[j], c), __fmul_rn(x, s));
  }
  st128(head + i, pack8(a));
  st128(head + half + i, pack8(b));
}
EXPORT_KERNEL(rope_bf16)
