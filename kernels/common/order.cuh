// order.cuh - logits as integers in the same order, and block-wide operations on 64-bit integers.
#pragma once
#include "device.cuh"

typedef unsigned long long u64;

// An integer whose order is that of y: -0 and 0 are one value, NaN is 0, below all others.
DEV uint32_t order_key(float y) {
  if (y != y) return 0;
  uint32_t bits = y == 0.f ? 0 : __float_as_uint(y);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The y of a key that is not NaN's.
DEV float order_value(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// The larger value is larger, and of equal values the lower id. Never 0.
DEV u64 candidate(float y, int id) { return (u64)order_key(y) << 32 | (uint32_t)~id; }
DEV int candidate_id(u64 c) { return (int)~(uint32_t)c; }
DEV float candidate_value(u64 c) { return order_value((uint32_t)(c >> 32)); }

// The maximum over a full warp, in every lane.
DEV u64 warp_max(u64 v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = max(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}

// The sum over a full warp, in every lane.
DEV u64 warp_sum(u64 v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

// The sum over this lane and those before it.
DEV u64 warp_scan(u64 v) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    u64 before = __shfl_up_sync(0xffffffffu, v, o);
    if (lane >= o) v += before;
  }
  return v;
}

// One value of each warp, for all: lane l gets that of warp l, and 0 beyond the last. All threads call it. scratch: 32
// words in shared memory, free again for the next call because the leading barrier waits for the readers of the last.
DEV u64 exchange(u64 v, u64* scratch) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;
  __syncthreads();
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  return lane < n_warps ? scratch[lane] : 0;
}

// The maximum over a block, in every thread.
DEV u64 block_max(u64 v, u64* scratch) { return warp_max(exchange(warp_max(v), scratch)); }
