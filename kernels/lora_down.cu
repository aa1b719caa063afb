// lora_down: u[r,t] = keep * sum_j drop(x[r,j]) A[t,j]: an adapter's first factor                         (LoRA, Hu et al. 2021)
// shapes:   u [rows, rank] f32; x [rows, k] bf16; A [rank, k] f32.
// rounding: x exact, A to 2^-17 of it (two bf16), sums in f32, in steps of 16 columns from 0 up; `keep` = 1 / (1 - p) at the end.
// dropout:  a mask of x by Philox, a function of seed, step, site and element, computed where it is needed; threshold 0: none.
// mapping:  one block per LORA_ROWS rows and LORA_RANKS ranks, 4 warps of 16 rows. The bits of a row depend on the row alone.
// pipeline: LORA_STAGES stages of cp.async, one barrier a stage; each thread drops from the chunks that it copied.
// traffic:  reads 2*rows*k + 4*rank*k bytes, and A from L2 once a block, as many bytes again where rank is 32; writes
//           4*rows*rank. = LoraDown::cost
//           Predicted, not measured: 16384 rows of 4096 on an H200 are 134 MB, 31 us; with dropout 17 million draws of 120
//           integer operations, 60 us by the integer units.
// requires: k % 8 == 0, rank % 8 == 0, A aligned to 16 bytes               (LoraDown::launch in src/ops/train/lora_down.rs)
// source:   ours. Not yet measured.
#include "common/lora.cuh"

extern "C" __global__ void __launch_bounds__(LORA_THREADS)
lora_down_bf16(float* u, const bf16* x, const float* a, int rows, int k, int rank, float keep, uint32_t threshold,
               unsigned long long seed, uint32_t step, uint32_t site) {
  lora_narrow(u, x, k, a, rows, k, rank, keep, Dropout{threshold, step, site, seed});
}
EXPORT_KERNEL(lora_down_bf16)
