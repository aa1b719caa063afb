// argmax: token[r] = argmax_i logits[r,i], the lowest id of several equals; pos[r] += 1; the tokens also go to the host
// shapes:   token, pos [rows] u32, where pos are places (sequence * max_seq + position) of different sequences; scratch
//           [rows] of Best (common/best.cuh); serial, ring: common/outbox.cuh; logits [rows, vocab] f32.
// rounding: none. NaN is smaller than everything; -0 equals 0.
// mapping:  up to ARGMAX_BLOCKS blocks of ARGMAX_THREADS threads stride over a row, 4 logits a thread; each block offers its
//           best to an atomic maximum, and the block that arrives last takes the result.
// traffic:  reads 4*rows*vocab bytes. = Argmax::cost. Two atomics a block.
// requires: scratch is 0; the kernel leaves it 0 again                  (Argmax::launch in src/ops/argmax.rs)
// source:   ours. Not yet measured.
#include "common/best.cuh"
#include "common/outbox.cuh"
#include "common/trace.cuh"

extern "C" __global__ void __launch_bounds__(ARGMAX_THREADS)
argmax_f32(uint32_t* token, uint32_t* pos, Best* scratch, uint32_t* serial, u64* ring, const float* logits, int vocab,
           int max_seq, Span* trace) {
  Traced traced(trace);
  SHARED(u64, warps, 32);
  int r = blockIdx.y;
  logits += (int64_t)r * vocab;
  u64 best = 0;
  grid_dependency_wait();
  traced.ready();
  grid_launch_dependents();
  for (int base = blockIdx.x * ARGMAX_THREADS * 4; base < vocab; base += gridDim.x * ARGMAX_THREADS * 4) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int i = base + j * ARGMAX_THREADS + threadIdx.x;
      if (i < vocab) best = max(best, candidate(logits[i], i));
    }
  }
  best = block_max(best, warps);
  if (threadIdx.x > 0) return;
  scratch[r].offer(best);
  if (!scratch[r].is_last(gridDim.x)) return;
  int chosen = candidate_id(scratch[r].take());
  post(ring, serial, pos[r] / (uint32_t)max_seq, chosen);
  token[r] = chosen;
  pos[r] += 1;
}
EXPORT_KERNEL(argmax_f32)
