// embed: x[r,i] = table[tokens[r],i]
// shapes:   x [rows, dim] bf16; tokens [rows] u32; table [vocab, dim] bf16.
// rounding: none.
// mapping:  block (r, c) copies elements c * 8 * VECTOR_THREADS onwards of row r, 8 (16 bytes) a thread.
// traffic:  reads 2*rows*dim + 4*rows bytes, writes 2*rows*dim. = Embed::cost
// requires: dim % 8 == 0; each token < vocab                               (Embed::launch in src/ops/embed.rs)
// source:   ours. Not yet measured.
#include "common/device.cuh"
#include "common/tiles.h"
#include "common/trace.cuh"

extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
embed_bf16(bf16* x, const uint32_t* tokens, const bf16* table, int dim, Span* trace) {
  Traced traced(trace);
  int i = (blockIdx.y * VECTOR_THREADS + threadIdx.x) * 8;
  if (i >= dim) return;
  grid_dependency_wait();
  traced.ready();
  grid_launch_dependents();
  int64_t r = blockIdx.x;
  st128(x + r * dim + i, ld128(table + (int64_t)tokens[r] * dim + i));
}
EXPORT_KERNEL(embed_bf16)
