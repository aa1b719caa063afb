#include "common/device.cuh"

// Planted bugs (b_) and their correct twins (ok_): each must be reported, or must not be. All take out, x and k.
#define KERNEL(name)                                                  \
  extern "C" __global__ void name(float* out, const float* x, int k); \
  EXPORT_KERNEL(name)                                                 \
  extern "C" __global__ void name(float* out, const float* x, int k)
#define T threadIdx.x

// --- memory
KERNEL(b_oob_read) { out[T] = x[T + k]; }
KERNEL(b_oob_write) { out[T + k] = 1; }
KERNEL(b_null) { out[T] = ((const float*)nullptr)[k]; }
KERNEL(b_misaligned) {
  uint4 v = ld128(x + 1);
  out[T] = v.x + v.y + v.z + v.w;  // all of it is used, or nvcc loads less than 16 bytes
}
KERNEL(b_uninit) { out[T] = out[T + 1]; }
KERNEL(b_uninit_shared) {
  SHARED(float, s, 64);
  if (T < 32) s[T] = x[T];
  __syncthreads();
  out[T] = s[T];
}
KERNEL(b_neighbour) {
  SHARED(float, a, 32);
  SHARED(float, b, 32);
  a[T & 31] = 0;
  b[T & 31] = 0;
  __syncthreads();
  if (T == 0) a[k] = 7;
  out[T] = a[T & 31] + b[0];  // both are read, or nvcc leaves the stores to one of them out
}
KERNEL(b_dynamic_too_small) {
  DYN_SHARED(float, small);
  small[T] = x[T];
  __syncthreads();
  out[T] = small[T];
}
KERNEL(ok_dynamic) {
  DYN_SHARED(float, enough);
  enough[T] = x[T];
  __syncthreads();
  out[T] = enough[T ^ 64];
}
extern "C" __global__ void ok_bytes(unsigned char* out, const unsigned char* x, int k) {  // neighbours write neighbours
  out[T] = x[T] + k;
}
EXPORT_KERNEL(ok_bytes)

// --- barriers and warps
KERNEL(b_no_barrier) {
  SHARED(float, s, 128);
  s[T] = x[T];
  out[T] = s[(T + 32) & 127];
}
KERNEL(ok_barrier) {
  SHARED(float, s, 128);
  s[T] = x[T];
  __syncthreads();
  out[T] = s[(T + 32) & 127];
}
KERNEL(b_no_barrier_in_loop) {
  SHARED(float, s, 4);
  for (int i = 0; i < 4; i++) {
    if ((T & 31) == 0) s[T >> 5] = x[T] + i;
    __syncthreads();
    out[T] = s[0] + s[1] + s[2] + s[3];
  }
}
KERNEL(b_no_syncwarp) {
  SHARED(float, s, 128);
  s[T] = x[T];
  out[T] = s[T ^ 1];
}
KERNEL(ok_syncwarp) {
  SHARED(float, s, 128);
  s[T] = x[T];
  __syncwarp();
  out[T] = s[T ^ 1];
}
// Accesses of 2 and of 16 bytes to the same memory, by different warps. BUG 1: no barrier before the wide reads; 2:
// none before the narrow writes that follow them.
template <int BUG> DEV void mixed_sizes(float* out) {
  SHARED(bf16, s, 128);
  if (T < 16) st128(s + T * 8, make_uint4(0, 0, 0, 0));
  __syncthreads();
  s[T] = __float2bfloat16((float)T);
  if (BUG != 1) __syncthreads();
  float f[8];
  unpack8(ld128(s + T / 8 * 8 % 96 + (T < 96 ? 32 : 0)), f);
  if (BUG != 2) __syncthreads();
  s[T] = __float2bfloat16(f[T & 7]);
  __syncthreads();
  out[T] = __bfloat162float(s[T]);
}
KERNEL(ok_mixed_sizes) { mixed_sizes<0>(out); }
KERNEL(b_wide_read_of_narrow_write) { mixed_sizes<1>(out); }
KERNEL(b_narrow_write_after_wide_read) { mixed_sizes<2>(out); }
KERNEL(b_named_barrier) {
  SHARED(float, s, 32);
  if (T < 32) {
    named_barrier_arrive(1, 64);
    s[T] = x[T];
  } else if (T < 64) {
    named_barrier_sync(1, 64);
    out[T] = s[T - 32];
  }
}
KERNEL(ok_named_barrier) {
  SHARED(float, s, 32);
  if (T < 32) {
    s[T] = x[T];
    named_barrier_arrive(1, 64);
  } else if (T < 64) {
    named_barrier_sync(1, 64);
    out[T] = s[T - 32];
  }
}
KERNEL(ok_pairs) {  // sixteen independent masks in one warp
  unsigned mask = 3u << (T & 30);
  float v = x[T];
  for (int i = 0; i <= (int)(T & 31) / 2; i++) v += __shfl_xor_sync(mask, v, 1);
  out[T] = v;
}
KERNEL(b_divergent_barrier) {
  if (T < 64) __syncthreads();
  out[T] = 1;
}
KERNEL(b_early_exit) {
  if (T >= 96) return;
  __syncthreads();
  out[T] = 1;
}
KERNEL(b_shuffle_mask) {
  if (T < 16) out[T] = __shfl_xor_sync(0xffffffffu, x[T], 1);
}

// --- other blocks
KERNEL(b_two_blocks_write) {
  if (T == 0) out[0] = blockIdx.x;
}
KERNEL(b_plain_add) {
  if (T == 0) out[0] = out[0] + 1;
}
KERNEL(ok_atomic_add) {
  if (T == 0) atomicAdd(out, 1.0f);
}
KERNEL(b_read_of_atomic) {
  if (T == 0) atomicAdd(out, 1.0f);
  if (T == 64) out[1] = out[0];
}
KERNEL(b_spin_on_later_block) {
  unsigned* flag = (unsigned*)out;
  if (T != 0) return;
  if (blockIdx.x == 0) {
    while (ld_acquire(flag) == 0) {
    }
  } else {
    st_release(flag, 1u);
  }
}
template <bool ACQUIRE> DEV void pass_on(float* out) {
  unsigned* flag = (unsigned*)out;
  if (T != 0) return;
  if (blockIdx.x == 1) {
    while ((ACQUIRE ? ld_acquire(flag) : ld_relaxed(flag)) == 0) {
    }
    out[2] = out[1];
  } else {
    out[1] = 5;
    st_release(flag, 1u);
  }
}
KERNEL(ok_release_acquire) { pass_on<true>(out); }
KERNEL(b_relaxed_flag) { pass_on<false>(out); }
