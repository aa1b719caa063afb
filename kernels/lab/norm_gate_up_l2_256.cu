// norm_gate_up, variant l2_256: L2 fetches weights 256 bytes at a time; otherwise kernels/norm_gate_up.cu.
// idea:     a warp asks for lines of 128 bytes of 16 rows; the other half of each pair is another warp's next request.
// expected: no difference where the memory is busy anyway; faster if DRAM pages are opened less often. Not yet measured.
#include "common/device.cuh"
#define cp_async16 cp_async16_l2_256
#define VARIANT __l2_256
#include "norm_gate_up.cu"
