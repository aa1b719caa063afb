// argmax: token[r] = argmax_i logits[r,i], the lowest id of several equals; pos[r] += 1; the tokens also go to the host
// Rows of one sequence are side by side; each but the first has computed a guess, token[r], of the token that the row before it
// chooses. Only rows up to the first wrong guess count, and the others change nothing.
// shapes:   token, pos [rows] u32, where pos are places (sequence * max_seq + position); scratch [rows] of Best (common/best.cuh);
//           serial, ring: common/outbox.cuh; logits [rows, vocab] f32.
// rounding: none. NaN is smaller than everything; -0 equals 0.
// mapping:  up to ARGMAX_BLOCKS blocks of ARGMAX_THREADS threads stride over a row, 4 logits a thread; each block offers its
//           best to an atomic maximum. The last block of all rows takes the results, a lane of its first warp for each row.
// traffic:  reads 4*rows*vocab bytes. = Argmax::cost. Two atomics a block.
// requires: rows <= 32; scratch is 0; the kernel leaves it 0 again
//                                                                         (Argmax::launch in src/ops/argmax.rs)
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
  if (threadIdx.x >= 32) return;
  if (threadIdx.x == 0) scratch[r].offer(best);
  if (!Best::is_last_warp(scratch->arrived, gridDim.x * gridDim.y)) return;
  int rows = gridDim.y, chosen = threadIdx.x < rows ? candidate_id(scratch[threadIdx.x].take()) : 0;
  feed_back(token, pos, serial, ring, rows, max_seq, chosen);
}
EXPORT_KERNEL(argmax_f32)
