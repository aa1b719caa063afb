// norm_head_argmax, variant trigger12: the next kernel may start with 12 stages of a deep ring left instead of with 9;
//           otherwise kernels/norm_head_argmax.cu.
// idea:     when a kernel that waits should begin to load is a matter of latencies that only a GPU knows.
// expected: slower (3.71 ms a step of Llama-3-8B on an H200 instead of 3.63 if all products do so), though the trigger
//           differs little from 9: the model has a cliff there, of which a measurement must say whether it exists.
//           Not yet measured.
#include "common/tiles.h"
#undef HEAD_TRIGGER
#define HEAD_TRIGGER 12
#define VARIANT __trigger12
#include "norm_head_argmax.cu"
