// gemv, variant deep: rings of 8 stages instead of 4; otherwise kernels/gemv.cu.
// idea:     a block has 56 KB of weights on their way instead of 24: 4096 rows are only 2 blocks an SM, 112 KB instead of 48.
// expected: faster for 4096 rows if 48 KB an SM do not cover the latency under load (33 KB do by Little's law at 1 us).
//           Not yet measured.
// launch: shared shared*2
#include "common/tiles.h"
#undef GEMV_STAGES
#undef GEMV_BLOCKS
#define GEMV_STAGES 8
#define GEMV_BLOCKS 2
#define gemv_bf16_store gemv_bf16_store__deep
#define gemv_bf16_add gemv_bf16_add__deep
#define gemv_bf16_f32 gemv_bf16_f32__deep
#include "gemv.cu"
