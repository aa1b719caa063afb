// norm_gate_up, variant deep: rings of 8 stages instead of 4; otherwise kernels/norm_gate_up.cu.
// idea:     a warp has 7 stages on their way instead of 3, an SM 2 blocks instead of 5: 112 KB instead of 120, in fewer hands.
// expected: no difference where other blocks fill the gaps; slower where few blocks leave the end of a launch bare.
//           Not yet measured.
// launch: shared shared*2
#include "common/tiles.h"
#undef GEMV_STAGES
#undef GEMV_BLOCKS
#define GEMV_STAGES 8
#define GEMV_BLOCKS 2
#define norm_gate_up_bf16 norm_gate_up_bf16__deep
#include "norm_gate_up.cu"
