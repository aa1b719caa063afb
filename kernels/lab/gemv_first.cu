// gemv, variant first: weights are the first lines that L2 gives up; otherwise kernels/gemv.cu.
// idea:     a step reads 15 GB of weights through 50 MB of L2, each once. What is read again (x, gains, keys and values,
//           the logits) stays there longer if the weights make room for each other.
// expected: no difference or a little faster: what is read again is small, and read again soon. Not yet measured.
#include "common/device.cuh"
#define cp_async16 cp_async16_first
#define VARIANT __first
#include "gemv.cu"
