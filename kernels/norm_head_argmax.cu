// norm_head_argmax: token[0] = argmax_i sum_j norm(x)[j] * w[i,j], the lowest id of equals; pos[0] += 1; the token to the
//           host too; norm(x)[j] = x[j] * rsqrt(mean_j(x[j]^2) + eps) * gain[j].
// shapes:   token, pos [1] u32, pos a place; scratch [4] u32; serial, ring: common/outbox.cuh; x [1, dim] bf16; gain [dim] bf16;
//           w [vocab, dim] bf16.
// rounding: that of norm_head.cu, whose logits these are, bit for bit; none is stored. NaN is smaller than everything.
// mapping:  common/gemv.cuh; block b owns rows 16b to 16b + 15 of w. One thread of each block offers the block's best, as
//           an integer that orders like value and id, to an atomic maximum, and the block that arrives last takes it.
// traffic:  reads 2*vocab*dim + 4*dim (x and gain from L2 once per block). = NormHeadArgmax::cost. Two atomics a block,
//           8016 blocks while 1051 MB arrive: predicted, not measured, to hide there, and to save the launch of argmax.
// requires: dim % 8 == 0, vocab >= 16; scratch is 0, as it is again when the kernel is done
//                                                       (NormHeadArgmax::launch in src/ops/norm_head_argmax.rs)
// source:   ours, see common/gemv.cuh. Not yet measured.
#include "common/gemv.cuh"
#include "common/order.cuh"
#include "common/outbox.cuh"
#include "common/trace.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, GEMV_BLOCKS)
norm_head_argmax_bf16(uint32_t* token, uint32_t* pos, uint32_t* scratch, uint32_t* serial, u64* ring, const bf16* x,
                      const bf16* gain, const bf16* w, int dim, int vocab, int max_seq, float eps,
                      Span* trace) {
  Traced traced(trace);
  int tile = blockIdx.x * GEMV_TILE, row = min(tile, vocab - GEMV_TILE);  // the last block may repeat some of the rows
  Product<true> p;
  p.begin(w + (int64_t)row * dim, w + (int64_t)(row + 8) * dim, 1, dim);
  grid_dependency_wait();
  traced.ready();
  grid_launch_dependents();
  p.run(x, gain);
  float y = p.total(eps);
  if (threadIdx.x >= 32) return;  // the outputs of the one row are in lanes 0 to 15 of the first warp
  u64 best = warp_max(threadIdx.x < GEMV_TILE ? candidate(y, row + threadIdx.x) : 0);
  if (threadIdx.x > 0) return;
  u64* all = (u64*)scratch + 1;
  atomicMax(all, best);
  // releases what this block offered to, or acquires what all have for, the block that is last
  if (atomic_add_acq_rel(scratch, 1u) + 1 != gridDim.x) return;
  uint32_t chosen = candidate_id(atomicExch(all, (u64)0));
  post(ring, serial, pos[0] / (uint32_t)max_seq, chosen);
  token[0] = chosen;
  pos[0] += 1;
  scratch[0] = 0;
}
EXPORT_KERNEL(norm_head_argmax_bf16)
