// norm_gate_up, variant pastl1: x and gain from L2 for each block; otherwise kernels/norm_gate_up.cu.
// idea:     L1 keeps 16 KB of x and gain for the blocks of an SM, which costs a look-up and an allocation for each line.
// expected: slower: L2 gives 12% more bytes. It says what L1 is worth here.
//           Not yet measured.
#include "common/device.cuh"
#define cp_async16_l1 cp_async16
#define VARIANT __pastl1
#include "norm_gate_up.cu"
