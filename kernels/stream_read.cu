// stream_read: out[b] = the sum, modulo 2^32, of the words of x that block b reads
// Reads memory as fast as possible, which is what decoding is measured against: it computes only what keeps the compiler
// from removing the loads.
// shapes:   out [blocks] u32; x [words] u32.
// rounding: none.
// mapping:  x is cut into tiles of STREAM_THREADS * STREAM_LOADS * 16 bytes; block b reads tiles b, b + blocks, ...; a
//           thread has STREAM_LOADS loads of 16 bytes in flight, past L1, and 4 blocks fit a multiprocessor: 128 KiB.
// traffic:  reads 4*words bytes, writes 4*blocks. = StreamRead::cost
// requires: words % 4 == 0; no kernel in flight writes x          (StreamRead::launch in src/ops/stream_read.rs)
// source:   ours. Not yet measured.
#include "common/order.cuh"
#include "common/tiles.h"

extern "C" __global__ void __launch_bounds__(STREAM_THREADS, 4)
stream_read_u32(uint32_t* out, const uint32_t* x, int chunks) {
  SHARED(u64, warps, 32);
  constexpr int TILE = STREAM_THREADS * STREAM_LOADS;  // in chunks of 16 bytes
  uint32_t sum = 0;
  for (int64_t t = (int64_t)blockIdx.x * TILE; t < chunks; t += (int64_t)gridDim.x * TILE) {
    const uint32_t* tile = x + (t + threadIdx.x) * 4;
    if (t + TILE <= chunks) {
      uint4 v[STREAM_LOADS];
#pragma unroll
      for (int j = 0; j < STREAM_LOADS; j++) v[j] = ld128_stream(tile + j * STREAM_THREADS * 4);
#pragma unroll
      for (int j = 0; j < STREAM_LOADS; j++) sum += v[j].x + v[j].y + v[j].z + v[j].w;
    } else {
      for (int j = 0; t + threadIdx.x + j < chunks; j += STREAM_THREADS) {
        uint4 v = ld128_stream(tile + j * 4);
        sum += v.x + v.y + v.z + v.w;
      }
    }
  }
  u64 total = warp_sum(exchange(warp_sum((u64)sum), warps));
  if (threadIdx.x == 0) out[blockIdx.x] = (uint32_t)total;
}
EXPORT_KERNEL(stream_read_u32)
