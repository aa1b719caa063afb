// norm_head_argmax: token[r] = argmax_i sum_j norm(x[r])[j] * w[i,j], the lowest id of several equals; pos[r] += 1; the tokens
//           also go to the host; norm(x)[j] = x[j] * rsqrt(mean_j(x[j]^2) + eps) * gain[j].
// Guesses in rows of one sequence: as in argmax.cu.
// shapes:   token, pos [rows] u32, where pos are places (sequence * max_seq + position); scratch [rows] of Best
//           (common/best.cuh); serial, ring: common/outbox.cuh; x [rows, dim] bf16; gain [dim] bf16; w [vocab, dim] bf16 or packed.
// rounding: that of norm_head.cu: the logits are the same, bit for bit, but are not stored. NaN is smaller than everything.
// mapping:  common/gemv.cuh; block b owns rows 16b to 16b + 15 of w. For each row of x one thread of a block offers the best
//           of these, as an integer that orders like value and id, to an atomic maximum. The block that arrives last takes the
//           results, a lane of its first warp for each row.
// traffic:  reads 2*vocab*dim + 2*dim + 2*rows*dim (x and gain from L2 once per block). = NormHeadArgmax::cost. An atomic
//           a block and row, and one more a block, from 8016 blocks while 1051 MB arrive. Predicted, not measured: they hide behind
//           that (each of 17 addresses gets an atomic every 30 ns), and save the launch of argmax, or those of sample.
// requires: dim % 8 == 0, vocab >= 16, rows <= DECODE_ROWS; scratch is 0, and the kernel leaves it 0 again
//                                                       (NormHeadArgmax::launch in src/ops/norm_head_argmax.rs)
// source:   ours, see common/gemv.cuh. Not yet measured.
#include "common/best.cuh"
#include "common/gemv.cuh"
#include "common/outbox.cuh"
#include "common/trace.cuh"

template <class F, int MOST, int STAGES>
DEV void norm_head_argmax(const Traced& traced, uint32_t* token, uint32_t* pos, Best* scratch, uint32_t* serial,
                          u64* ring, const bf16* x, const bf16* gain, const typename F::Element* w, int rows,
                          int dim, int vocab, int max_seq, float eps) {
  int tile = blockIdx.x * GEMV_TILE, row = min(tile, vocab - GEMV_TILE);  // the last block may repeat some of the rows
  Product<F, true, MOST, STAGES, HEAD_TRIGGER> p;
  p.begin(w, row, row + 8, rows, dim);
  grid_dependency_wait();
  traced.ready();
  p.run(x, gain);
  float2 y = p.total(eps);
  int r = threadIdx.x / 8, i = row + threadIdx.x % 8;
  u64 best = max(candidate(y.x, i), candidate(y.y, i + 8));
#pragma unroll
  for (int o = 4; o; o >>= 1) best = max(best, __shfl_xor_sync(0xffffffffu, best, o));  // those of a row
  if (threadIdx.x % 8 == 0 && r < p.rows) scratch[r].offer(best);
  __syncthreads();  // all rows of x have their offer
  if (threadIdx.x >= 32 || !Best::is_last_warp(scratch->arrived, gridDim.x)) return;
  int chosen = threadIdx.x < p.rows ? candidate_id(scratch[threadIdx.x].take()) : 0;
  feed_back(token, pos, serial, ring, p.rows, max_seq, chosen);
}

#define NORM_HEAD_ARGMAX(name, F, MOST, STAGES, BLOCKS)                                                                \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                        \
      name(uint32_t* token, uint32_t* pos, Best* scratch, uint32_t* serial, u64* ring, const bf16* x,                  \
           const bf16* gain, const F::Element* w, int rows, int dim, int vocab, int max_seq, float eps,                \
           Span* trace) {                                                                                              \
    Traced traced(trace);                                                                                              \
    norm_head_argmax<F, MOST, STAGES>(traced, token, pos, scratch, serial, ring, x, gain, w, rows, dim, vocab, max_seq,   \
                                   eps);                                                                               \
  }                                                                                                                    \
  EXPORT_KERNEL(name)

#define NORM_HEAD_ARGMAX_PACKED(name, F) PACKED_PRODUCT(NORM_HEAD_ARGMAX, name, F, GEMV_BLOCKS - 1)

EACH_PRODUCT(NORM_HEAD_ARGMAX, norm_head_argmax_bf16)
EACH_PACKED(NORM_HEAD_ARGMAX_PACKED, norm_head_argmax, )
