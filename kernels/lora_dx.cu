// lora_dx: dx[r,j] += keep * drop(sum_t du[r,t] A[t,j]): what an adapter adds to the gradient of its input (LoRA, Hu et al. 2021)
// shapes:   dx [rows, k] bf16; du [rows, rank] f32; A [rank, k] f32.
// rounding: du and A to 2^-17 of them (two bf16 each), sums in f32, one rounding with what is there. `keep` = 1 / (1 - p).
// dropout:  the mask of lora_down: the same seed, step and site. threshold 0: none.
// mapping:  one block per LORA_ROWS rows and LORA_COLS columns, as in lora_up.
// traffic:  reads 2*rows*k + 4*rank*k + 4*rows*rank bytes, writes 2*rows*k; A from L2 once a block, as many bytes as dx where
//           rank is 32. = LoraDx::cost
//           Predicted, not measured: 16384 rows of 4096 on an H200 are 268 MB, 62 us, with or without dropout.
// requires: k % 8 == 0, rank % 8 == 0, A aligned to 16 bytes                   (LoraDx::launch in src/ops/train/lora_dx.rs)
// source:   ours. Not yet measured.
#include "common/lora.cuh"

extern "C" __global__ void __launch_bounds__(LORA_THREADS)
lora_dx_bf16(bf16* dx, const float* du, const float* a, int rows, int k, int rank, float keep, uint32_t threshold,
             unsigned long long seed, uint32_t step, uint32_t site) {
  lora_wide(dx, k, du, a, rows, k, rank, keep, Dropout{threshold, step, site, seed});
}
EXPORT_KERNEL(lora_dx_bf16)
