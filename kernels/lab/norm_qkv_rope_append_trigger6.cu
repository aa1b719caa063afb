// norm_qkv_rope_append, variant trigger6: the next kernel may start with 6 stages of a deep ring left instead of with 9;
//           otherwise kernels/norm_qkv_rope_append.cu.
// idea:     when a kernel that waits should begin to load is a matter of latencies that only a GPU knows.
// expected: slower (3.76 ms a step of Llama-3-8B on an H200 instead of 3.63 if all products do so): the next kernel
//           comes too late to fill the end of this one.
//           Not yet measured.
#include "common/tiles.h"
#undef QKV_TRIGGER
#define QKV_TRIGGER 6
#define VARIANT __trigger6
#include "norm_qkv_rope_append.cu"
