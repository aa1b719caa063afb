// argmax: token[0] = argmax_i logits[i], the lowest id of equals; pos[0] += 1; the token to the host too
// shapes:   token, pos [1] u32, pos a place; scratch [2*ARGMAX_BLOCKS + 4] u32; serial, ring: common/outbox.cuh; logits [vocab] f32.
// rounding: none. NaN is smaller than everything; -0 equals 0.
// mapping:  up to ARGMAX_BLOCKS blocks of ARGMAX_THREADS threads stride over the logits, 4 (16 bytes) a thread; each
//           leaves its best in scratch, and the block that arrives last takes the best of these.
// traffic:  reads 4*vocab bytes; the partial results stay in the L2 cache. = Argmax::cost
// requires: scratch[0] is 0: the counter of arrived blocks, 0 again when the kernel is done; the next 3 words stay 0
//                                                                          (Argmax::launch in src/ops/argmax.rs)
// source:   ours. Not yet measured.
#include "common/order.cuh"
#include "common/outbox.cuh"
#include "common/tiles.h"
#include "common/trace.cuh"

extern "C" __global__ void __launch_bounds__(ARGMAX_THREADS)
argmax_f32(uint32_t* token, uint32_t* pos, uint32_t* scratch, uint32_t* serial, u64* ring, const float* logits,
           int vocab, int max_seq, Span* trace) {
  Traced traced(trace);
  SHARED(u64, warps, 32);
  SHARED(uint32_t, is_last, 1);
  u64* part = (u64*)scratch + 2;
  u64 best = 0;
  grid_dependency_wait();
  traced.ready();
  grid_launch_dependents();
  for (int i = (blockIdx.x * ARGMAX_THREADS + threadIdx.x) * 4; i < vocab; i += gridDim.x * ARGMAX_THREADS * 4) {
    if (i + 4 <= vocab) {
      uint4 v = ld128(logits + i);
      best = max(max(best, candidate(__uint_as_float(v.x), i)), candidate(__uint_as_float(v.y), i + 1));
      best = max(max(best, candidate(__uint_as_float(v.z), i + 2)), candidate(__uint_as_float(v.w), i + 3));
    } else {
      for (int j = i; j < vocab; j++) best = max(best, candidate(logits[j], j));
    }
  }
  best = block_max(best, warps);
  if (threadIdx.x == 0) {
    part[blockIdx.x] = best;
    // releases part to, or acquires all parts for, the block that is last
    is_last[0] = atomic_add_acq_rel(scratch, 1u) + 1 == gridDim.x;
  }
  __syncthreads();  // is_last, and the parts that thread 0 acquired
  if (!is_last[0]) return;
  best = block_max(threadIdx.x < gridDim.x ? part[threadIdx.x] : 0, warps);
  if (threadIdx.x == 0) {
    post(ring, serial, pos[0] / (uint32_t)max_seq, candidate_id(best));
    token[0] = candidate_id(best);
    pos[0] += 1;
    scratch[0] = 0;
  }
}
EXPORT_KERNEL(argmax_f32)
static_assert(ARGMAX_BLOCKS <= ARGMAX_THREADS, "one thread reads each block's part");
