// lora_up: y[r,j] += scale * sum_t u[r,t] B[t,j], for n columns of y: an adapter's second factor          (LoRA, Hu et al. 2021)
// shapes:   y rows of `stride` bf16 from the first of its columns on; u [rows, rank] f32; B [rank, n] f32, PEFT's lora_B turned.
// rounding: u and B to 2^-17 of them (two bf16 each), sums in f32, one rounding with what is there.
// mapping:  one block per LORA_ROWS rows and LORA_COLS columns, 4 warps of 16 rows; y in 16-byte chunks, which are read before
//           the products and written after, by way of shared memory.
// traffic:  reads 2*rows*n + 4*rank*n + 4*rows*rank bytes, writes 2*rows*n; B from L2 once a block, as many bytes as y where
//           rank is 32. = LoraUp::cost
//           Predicted, not measured: 16384 rows of 4096 on an H200 are 268 MB, 62 us. A product that adds this in its epilogue
//           would save most of it.
// requires: n % 8 == 0, rank % 8 == 0, stride % 8 == 0; y and B aligned to 16 bytes    (LoraUp::launch in src/ops/train/lora_up.rs)
// source:   ours. Not yet measured.
#include "common/lora.cuh"

extern "C" __global__ void __launch_bounds__(LORA_THREADS)
lora_up_bf16(bf16* y, const float* u, const float* b, int rows, int n, int rank, int stride, float scale) {
  lora_wide(y, stride, u, b, rows, n, rank, scale, Dropout{});
}
EXPORT_KERNEL(lora_up_bf16)
