#include "common/device.cuh"

// What must have the same bits on host and device: one value per slot, from a[lane], b[lane], c[lane].
extern "C" __global__ void t_arithmetic(unsigned* out, const float* a, const float* b, const float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x, slot = 0;
  if (i >= n) return;
  float x = a[i], y = b[i], z = c[i];
  unsigned ux = __float_as_uint(x), uy = __float_as_uint(y);
  unsigned long long wx = (unsigned long long)ux << 32 | uy, wy = (unsigned long long)uy << 32 | ux;
  auto put = [&](unsigned v) { out[n * slot++ + i] = v; };
  put(__float_as_uint(__fadd_rn(x, y)));
  put(__float_as_uint(__fsub_rn(x, y)));
  put(__float_as_uint(__fmul_rn(x, y)));
  put(__float_as_uint(__fdiv_rn(x, y)));
  put(__float_as_uint(__fsqrt_rn(fabsf(x))));
  put(__float_as_uint(__fmaf_rn(x, y, z)));
  put(__float_as_uint(__fadd_rn(__fmul_rn(x, y), z)));
  put(__float2uint_rz(x));
  put(__float2int_rz(x));
  put(__float2int_rn(x));
  put(__umulhi(ux, uy));
  put((unsigned)(__umul64hi(wx, wy) >> 32));
  put(__float_as_uint(__ull2float_rn(wx)));
  put(__float_as_uint(__uint2float_rn(ux)));
  put((unsigned)__float2ull_rz(x));
  put(__funnelshift_l(ux, uy, 13));
  put(__brev(ux));
}
EXPORT_KERNEL(t_arithmetic)

// 64-bit atomics and shuffles, match: out[0] the sum, out[1] the maximum, out[2 + lane] the value of lane ^ 1,
// out[34 + lane] the match.
extern "C" __global__ void t_wide(unsigned long long* out, const unsigned long long* x) {
  unsigned long long v = x[threadIdx.x];
  atomicAdd(out, v);
  atomicMax(out + 1, v);
  out[2 + threadIdx.x] = __shfl_xor_sync(0xffffffffu, v, 1);
  out[34 + threadIdx.x] = __match_any_sync(0xffffffffu, v);
}
EXPORT_KERNEL(t_wide)

// unpack8 and pack8: y = 2 x, eight at a time.
extern "C" __global__ void t_pack(bf16* y, const bf16* x) {
  float f[8];
  unpack8(ld128(x + threadIdx.x * 8), f);
  for (int i = 0; i < 8; i++) f[i] *= 2;
  st128(y + threadIdx.x * 8, pack8(f));
}
EXPORT_KERNEL(t_pack)

extern "C" __global__ void t_halves(float* out, const unsigned* x, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[2 * i] = half_lo(x[i]), out[2 * i + 1] = half_hi(x[i]);
}
EXPORT_KERNEL(t_halves)

extern "C" __global__ void t_bytes(unsigned* out, unsigned x, unsigned y) {
  const unsigned order[] = {0x3210, 0x7654, 0x0123, 0x4341, 0x3232};
  for (int i = threadIdx.x; i < 5; i += blockDim.x) out[i] = __byte_perm(x, y, order[i]);
}
EXPORT_KERNEL(t_bytes)
