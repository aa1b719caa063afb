#include "common/device.cuh"
// planted bugs (b_) and their correct twins (ok_): each must be reported, or must not be
#define K(n, ...) extern "C" __global__ void n(float* o, const float* x, int k){__VA_ARGS__} EXPORT_KERNEL(n)
#define T threadIdx.x
K(b_oob_read, o[T] = x[T + k];)
K(b_oob_write, o[T + k] = 1;)
K(b_null, o[T] = ((const float*)nullptr)[k];)
K(b_misaligned, uint4 v = ld128(x + 1); o[T] = v.x;)
K(b_uninit, o[T] = o[T + 1];)
K(b_uninit_shared, SHARED(float, s, 64); if (T < 32) s[T] = x[T]; __syncthreads(); o[T] = s[T];)
K(b_no_barrier, SHARED(float, s, 128); s[T] = x[T]; o[T] = s[(T + 32) & 127];)
K(ok_barrier, SHARED(float, s, 128); s[T] = x[T]; __syncthreads(); o[T] = s[(T + 32) & 127];)
K(
    b_no_barrier_in_loop, SHARED(float, s, 4); for (int i = 0; i < 4; i++) {
      if ((T & 31) == 0) s[T >> 5] = x[T] + i;
      __syncthreads();
      o[T] = s[0] + s[1] + s[2] + s[3];
    })
K(b_no_syncwarp, SHARED(float, s, 128); s[T] = x[T]; o[T] = s[T ^ 1];)
K(ok_syncwarp, SHARED(float, s, 128); s[T] = x[T]; __syncwarp(); o[T] = s[T ^ 1];)
K(
    ok_named_barrier, SHARED(float, s, 32); if (T < 32) {
      s[T] = x[T];
      named_barrier_arrive(1, 64);
    } else if (T < 64) {
      named_barrier_sync(1, 64);
      o[T] = s[T - 32];
    })
K(
    b_named_barrier, SHARED(float, s, 32); if (T < 32) {
      named_barrier_arrive(1, 64);
      s[T] = x[T];
    } else if (T < 64) {
      named_barrier_sync(1, 64);
      o[T] = s[T - 32];
    })
K(ok_pairs, unsigned m = 3u << (T & 30); float v = x[T];
  for (int i = 0; i <= (int)(T & 31) / 2; i++) v += __shfl_xor_sync(m, v, 1); o[T] = v;)
K(b_divergent_barrier, if (T < 64) __syncthreads(); o[T] = 1;)
K(b_early_exit, if (T >= 96) return; __syncthreads(); o[T] = 1;)
K(b_shuffle_mask, if (T < 16) o[T] = __shfl_xor_sync(0xffffffffu, x[T], 1);)
K(b_neighbour, SHARED(float, a, 32); SHARED(float, b, 32); a[T & 31] = 0; b[T & 31] = 0; __syncthreads();
  if (T == 0) a[k] = 7; o[T] = b[0];)
K(b_dynamic_too_small, DYN_SHARED(float, s); s[T] = x[T]; __syncthreads(); o[T] = s[T];)
K(b_two_blocks_write, if (T == 0) o[0] = blockIdx.x;)
K(b_plain_add, if (T == 0) o[0] = o[0] + 1;)
K(ok_atomic_add, if (T == 0) atomicAdd(o, 1.0f);)
K(b_read_of_atomic, if (T == 0) atomicAdd(o, 1.0f); if (T == 64) o[1] = o[0];)
K(
    b_spin_on_later_block, if (T == 0) {
      if (blockIdx.x == 0)
        while (ld_acquire((unsigned*)o) == 0) {
        }
      else
        st_release((unsigned*)o, 1u);
    })
K(
    ok_release_acquire, if (T == 0) {
      if (blockIdx.x == 1) {
        while (ld_acquire((unsigned*)o) == 0) {
        }
        o[2] = o[1];
      } else {
        o[1] = 5;
        st_release((unsigned*)o, 1u);
      }
    })
K(
    b_relaxed_flag, if (T == 0) {
      if (blockIdx.x == 1) {
        while (ld_relaxed((unsigned*)o) == 0) {
        }
        o[2] = o[1];
      } else {
        o[1] = 5;
        st_release((unsigned*)o, 1u);
      }
    })
K(ok_dynamic, DYN_SHARED(float, s); s[T] = x[T]; __syncthreads(); o[T] = s[T ^ 64];)
extern "C" __global__ void ok_bytes(unsigned char* o, const unsigned char* x, int k) { o[T] = x[T] + k; }
EXPORT_KERNEL(ok_bytes)  // neighbours write neighbouring bytes
