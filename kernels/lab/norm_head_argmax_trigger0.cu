// norm_head_argmax, variant trigger0: the next kernel may start at once instead of with 9;
//           otherwise kernels/norm_head_argmax.cu.
// idea:     when a kernel that waits should begin to load is a matter of latencies that only a GPU knows.
// expected: slower (3.77 ms a step of Llama-3-8B on an H200 instead of 3.63 if all products do so): the next kernel's
//           loads take the bandwidth that this one needs to end.
//           Not yet measured.
#include "common/tiles.h"
#undef HEAD_TRIGGER
#define HEAD_TRIGGER 0
#define VARIANT __trigger0
#include "norm_head_argmax.cu"
