// log_prob: out[r,j] = logits[r,t] - max_i(logits[r,i]) - ln(sum_i(exp(logits[r,i] - max))), t = target[r,j];
//           greedy[r,j] = 1 if t is the lowest id of the largest logit, else 0
// shapes:   out [rows, targets] f32; greedy, target [rows, targets] u32; logits [rows, vocab] f32.
// rounding: f32. A thread adds vocab / LOG_PROB_THREADS terms of at most 1, then a tree: the logarithm is off by some
//           1e-7.
// mapping:  one block per row, LOG_PROB_THREADS threads that stride over it twice, 4 logits (16 bytes) a thread; so a
//           row's bits do not depend on the rows beside it.
// traffic:  reads 4*rows*vocab bytes (the second pass comes from the L2 cache), 8 more per target. = LogProb::cost
// requires: targets <= LOG_PROB_THREADS; each target is below vocab       (LogProb::launch in src/ops/log_prob.rs)
// source:   ours. Not yet measured.
#include "common/order.cuh"
#include "common/tiles.h"
#include "common/trace.cuh"

// Calls f(logit, id) for this thread's logits of a row.
template <class F> DEV void each_logit(const float* x, int vocab, F f) {
  if (vocab % 4) {  // only then is a row not aligned to 16 bytes
    for (int i = threadIdx.x; i < vocab; i += LOG_PROB_THREADS) f(x[i], i);
    return;
  }
#pragma unroll 4
  for (int i = threadIdx.x * 4; i < vocab; i += LOG_PROB_THREADS * 4) {
    uint4 v = ld128(x + i);
    f(__uint_as_float(v.x), i), f(__uint_as_float(v.y), i + 1);
    f(__uint_as_float(v.z), i + 2), f(__uint_as_float(v.w), i + 3);
  }
}

extern "C" __global__ void __launch_bounds__(LOG_PROB_THREADS)
log_prob_f32(float* out, uint32_t* greedy, const float* logits, const uint32_t* target, int targets, int vocab,
             Span* trace) {
  Traced traced(trace);
  SHARED(u64, candidates, 32);
  SHARED(float, sums, 32);
  const float* x = logits + (int64_t)blockIdx.x * vocab;
  u64 best = 0;
  each_logit(x, vocab, [&](float y, int id) { best = max(best, candidate(y, id)); });
  best = block_max(best, candidates);
  float top = candidate_value(best), sum = 0.f;
  each_logit(x, vocab, [&](float y, int) { sum += expf(y - top); });
  float log_sum = logf(block_sum(sum, sums));
  if ((int)threadIdx.x < targets) {
    int64_t at = (int64_t)blockIdx.x * targets + threadIdx.x;
    uint32_t t = target[at];
    out[at] = x[t] - top - log_sum;
    greedy[at] = t == (uint32_t)candidate_id(best);
  }
}
EXPORT_KERNEL(log_prob_f32)
