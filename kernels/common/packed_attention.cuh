// packed_attention.cuh - what attention over documents that lie one after the other needs forwards and backwards: attn_packed,
// attn_bwd.
#pragma once
#include "device.cuh"
#include "tiles.h"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr int TILE_CHUNKS = PACKED_THREADS / PACKED_TILE;  // chunks of a row that are copied at a time, one a thread
static_assert(PACKED_THREADS / 32 * 16 == PACKED_ROWS && PACKED_TILE % 16 == 0, "a warp has 16 rows, and takes 16 at a time");

// Elements of a row in shared memory, for heads of D.
template <int D> constexpr int packed_width = D <= 64 ? 64 : 128;

// Rows [begin, end).
struct Range {
  int begin, end;
};

// The document that a row is in.
DEV Range document_of(const uint32_t* starts, int documents, int row) {
  int low = 0, high = documents;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    ((int)starts[middle] <= row ? low : high) = middle;
  }
  return {(int)starts[low], (int)starts[low + 1]};
}

// The keys that a query sees, or the queries that see a key; none for what is no row. Both ends rise with the row.
DEV Range seen_by(const uint32_t* starts, int documents, int rows, int query) {
  if (query >= rows) return {rows, rows};
  return {document_of(starts, documents, query).begin, query + 1};
}
DEV Range that_see(const uint32_t* starts, int documents, int rows, int key) {
  if (key >= rows) return {rows, rows};
  return {key, document_of(starts, documents, key).end};
}

// Begins to copy D columns of rows [first, first + PACKED_TILE) to a tile; rows from `end` on become zero.
template <int D> DEV void copy_tile(bf16* tile, const bf16* from, int64_t stride, int first, int end) {
  int row = threadIdx.x / TILE_CHUNKS;
  bool in = first + row < end;
  const bf16* source = in ? from + (first + row) * stride : from;
#pragma unroll
  for (int i = 0; i < D / 8; i += TILE_CHUNKS) {
    int chunk = i + threadIdx.x % TILE_CHUNKS;
    if (D / 8 % TILE_CHUNKS && chunk >= D / 8) break;
    cp_async16(tile + tile_at<packed_width<D>>(row, chunk), source + chunk * 8, in);
  }
}

// The first operand of mma for 16 rows of a head: columns [16 d, 16 d + 16) of rows `row` and `row` + 8, which the thread holds,
// read from global memory; rows from `end` on are read as the last.
template <int D> DEV void row_operand(uint32_t (&a)[D / 16][4], const bf16* from, int64_t stride, int row, int end) {
  int c = threadIdx.x & 3;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const bf16* p = from + min(row + (i & 1) * 8, end - 1) * stride + (i >> 1) * 8 + c * 2;
#pragma unroll
    for (int d = 0; d < D / 16; d++) a[d][i] = *reinterpret_cast<const uint32_t*>(p + d * 16);
  }
}

// Second operands from 16 rows of a tile, from row t on: for a sum over columns [16 d, 16 d + 16), of which each row is a result
// column, and for a sum over the rows, whose result columns are these.
template <int D> DEV void columns_operand(uint32_t (&b)[4], const bf16* tile, int t, int d) {
  int lane = threadIdx.x & 31;
  ldmatrix_x4(b, tile + tile_at<packed_width<D>>(t + (lane & 7) + (lane >> 4) * 8, d * 2 + (lane >> 3 & 1)));
}
template <int D> DEV void rows_operand(uint32_t (&b)[4], const bf16* tile, int t, int d) {
  int lane = threadIdx.x & 31;
  ldmatrix_x4_trans(b, tile + tile_at<packed_width<D>>(t + (lane & 15), d * 2 + (lane >> 4)));
}

// d[0], d[1] += a b: both halves of what columns_operand and rows_operand give.
DEV void mma_pair(float (&d0)[4], float (&d1)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma_m16n8k16(d0, a, {b[0], b[1]});
  mma_m16n8k16(d1, a, {b[2], b[3]});
}
