#include "common/device.cuh"

// Decode, split over the keys: block (kv head, split) does G query heads with 4 warps and online softmax, writes a
// partial result, and the last block of a head to arrive merges them. part: [heads][splits][D + 2]; count: [kv heads],
// zero before and after. HOW 0: __threadfence and a plain atomicAdd; 1: one acq_rel atomic; bugs: 2 no release fence, 3
// no acquire fence, 4 no barrier between the writes and the atomic that releases them.
template <int D, int G, int HOW> DEV void decode(bf16* out, float* part, unsigned* count, const bf16* q, const bf16* kc,
                                                 const bf16* vc, int len, int stride, float scale) {
  DYN_SHARED(float, sm);  // [warps][G][D + 2]
  SHARED(unsigned, last, 1);
  constexpr int N = D / 32;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, nw = blockDim.x >> 5, kv = blockIdx.x, splits = gridDim.y,
      per = (len + splits - 1) / splits;
  int from = blockIdx.y * per, to = min(len, from + per);
  float qr[G][N], acc[G][N], m[G], l[G];
  for (int g = 0; g < G; g++) {
    m[g] = -INFINITY;
    l[g] = 0;
    for (int e = 0; e < N; e++) {
      qr[g][e] = __bfloat162float(q[(kv * G + g) * D + lane * N + e]) * scale;
      acc[g][e] = 0;
    }
  }
  for (int t = from + warp; t < to; t += nw) {
    const bf16 *k = kc + (size_t)t * stride + kv * D + lane * N, *v = vc + (size_t)t * stride + kv * D + lane * N;
    float ke[N], ve[N];
    for (int e = 0; e < N; e++) {
      ke[e] = __bfloat162float(k[e]);
      ve[e] = __bfloat162float(v[e]);
    }
    for (int g = 0; g < G; g++) {
      float s = 0;
      for (int e = 0; e < N; e++) s = fmaf(qr[g][e], ke[e], s);
      s = warp_sum(s);
      float mn = fmaxf(m[g], s), c = __expf(m[g] - mn), p = __expf(s - mn);
      m[g] = mn;
      l[g] = l[g] * c + p;
      for (int e = 0; e < N; e++) acc[g][e] = acc[g][e] * c + p * ve[e];
    }
  }
  for (int g = 0; g < G; g++) {
    float* r = sm + (warp * G + g) * (D + 2);
    for (int e = 0; e < N; e++) r[lane * N + e] = acc[g][e];
    if (lane == 0) r[D] = m[g], r[D + 1] = l[g];
  }
  __syncthreads();
  auto merge = [&](const float* r0, int n, int step, int d, float& M, float& L) {
    M = -INFINITY;
    L = 0;
    float o = 0;
    for (int w = 0; w < n; w++) M = fmaxf(M, r0[w * step + D]);
    for (int w = 0; w < n; w++) {
      const float* r = r0 + w * step;
      float c = r[D] == -INFINITY ? 0.f : __expf(r[D] - M);
      L += r[D + 1] * c;
      o += r[d] * c;
    }
    return o;
  };
  float M, L;
  for (int i = threadIdx.x; i < G * D; i += blockDim.x) {
    int g = i / D, d = i % D;
    float o = merge(sm + g * (D + 2), nw, G * (D + 2), d, M, L),
          *r = part + ((size_t)(kv * G + g) * splits + blockIdx.y) * (D + 2);
    r[d] = o;
    if (d == 0) r[D] = M, r[D + 1] = L;
  }
  if (HOW == 0 || HOW == 3) __threadfence();
  if (HOW != 4) __syncthreads();
  if (threadIdx.x == 0) {
    unsigned before = HOW == 1 || HOW == 4 ? atomic_add_acq_rel(count + kv, 1u) : atomicAdd(count + kv, 1u);
    if (HOW == 0 || HOW == 2) __threadfence();
    last[0] = before == splits - 1;
  }
  __syncthreads();
  if (!last[0]) return;
  for (int i = threadIdx.x; i < G * D; i += blockDim.x) {
    int g = i / D, d = i % D;
    float o = merge(part + (size_t)(kv * G + g) * splits * (D + 2), splits, D + 2, d, M, L);
    out[(kv * G + g) * D + d] = __float2bfloat16(o / L);
  }
  if (threadIdx.x == 0) count[kv] = 0;
}
#define DECODE(name, D, G, HOW)                                                                                       \
  extern "C" __global__ void __launch_bounds__(128)                                                                   \
      name(bf16* out, float* part, unsigned* count, const bf16* q, const bf16* k, const bf16* v, int len, int stride, \
           float scale) {                                                                                             \
    decode<D, G, HOW>(out, part, count, q, k, v, len, stride, scale);                                                 \
  }                                                                                                                   \
  EXPORT_KERNEL(name)
DECODE(t_decode_attn_fence, 64, 4, 0)
DECODE(t_decode_attn_acq_rel, 64, 4, 1)
DECODE(t_decode_no_release, 64, 4, 2)
DECODE(t_decode_no_acquire, 64, 4, 3)
DECODE(t_decode_no_barrier, 64, 4, 4)

// Prefill: 64 query rows per block (4 warps x 16), 64 keys per tile, cp.async double buffering, mma.m16n8k16, causal,
// GQA. BUG 1: no wait for the copies; 2: no barrier before the next ones.
template <int D, int BUG> DEV void prefill(bf16* out, const bf16* q, const bf16* k, const bf16* v, int T, int qstride,
                                           int kvstride, int group, float scale) {
  constexpr int P = D + 8, BR = 64, BC = 64;  // P: padded row, keeps ldmatrix free of bank conflicts
  DYN_SHARED(bf16, sm);
  bf16 *sq = sm, *sk = sq + BR * P, *sv = sk + 2 * BC * P;
  int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, h = blockIdx.y, kvh = h / group, r0 = blockIdx.x * BR;
  auto load = [&](bf16* dst, const bf16* src, int row0, int stride, int head) {
    for (int i = tid; i < 64 * (D / 8); i += 128) {
      int r = i / (D / 8), c = i % (D / 8) * 8;
      bool ok = row0 + r < T;
      cp_async16(dst + r * P + c, src + (size_t)(ok ? row0 + r : 0) * stride + head * D + c, ok);
    }
  };
  int tiles = (min(r0 + BR, T) + BC - 1) / BC;
  load(sq, q, r0, qstride, h);
  load(sk, k, 0, kvstride, kvh);
  load(sv, v, 0, kvstride, kvh);
  cp_commit();
  float o[D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
  for (int j = 0; j < tiles; j++) {
    int cb = j & 1;
    if (j + 1 < tiles) {
      int nb = cb ^ 1;
      load(sk + nb * BC * P, k, (j + 1) * BC, kvstride, kvh);
      load(sv + nb * BC * P, v, (j + 1) * BC, kvstride, kvh);
    }
    cp_commit();
    if (BUG != 1) cp_wait<1>();
    __syncthreads();
    const bf16 *tk = sk + cb * BC * P, *tv = sv + cb * BC * P;
    float s[BC / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
      uint32_t a[4];
      ldmatrix_x4(a, sq + (warp * 16 + (lane & 15)) * P + kk * 16 + (lane >> 4) * 8);
#pragma unroll
      for (int n = 0; n < BC / 16; n++) {
        uint32_t b[4];
        ldmatrix_x4(b, tk + (n * 16 + (lane & 7) + (lane >> 4) * 8) * P + kk * 16 + (lane >> 3 & 1) * 8);
        uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
        mma_m16n8k16(s[2 * n], a, b0);
        mma_m16n8k16(s[2 * n + 1], a, b1);
      }
    }
    int row = r0 + warp * 16 + (lane >> 2);
    float mx[2] = {m[0], m[1]};
#pragma unroll
    for (int n = 0; n < BC / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int col = j * BC + n * 8 + (lane & 3) * 2 + (i & 1);
        s[n][i] = col <= row + (i >> 1) * 8 && col < T ? s[n][i] * scale : -INFINITY;
        mx[i >> 1] = fmaxf(mx[i >> 1], s[n][i]);
      }
    float c[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      mx[r] = fmaxf(mx[r], __shfl_xor_sync(0xffffffffu, mx[r], 1));
      mx[r] = fmaxf(mx[r], __shfl_xor_sync(0xffffffffu, mx[r], 2));
      c[r] = __expf(m[r] - mx[r]);
      m[r] = mx[r];
      l[r] *= c[r];
    }
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      o[n][0] *= c[0];
      o[n][1] *= c[0];
      o[n][2] *= c[1];
      o[n][3] *= c[1];
    }
#pragma unroll
    for (int n = 0; n < BC / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        s[n][i] = __expf(s[n][i] - m[i >> 1]);
        l[i >> 1] += s[n][i];
      }
#pragma unroll
    for (int kk = 0; kk < BC / 16; kk++) {
      uint32_t a[4] = {pack_bf16(s[2 * kk][0], s[2 * kk][1]), pack_bf16(s[2 * kk][2], s[2 * kk][3]),
                       pack_bf16(s[2 * kk + 1][0], s[2 * kk + 1][1]), pack_bf16(s[2 * kk + 1][2], s[2 * kk + 1][3])};
#pragma unroll
      for (int n = 0; n < D / 16; n++) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, tv + (kk * 16 + (lane & 15)) * P + n * 16 + (lane >> 4) * 8);
        uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
        mma_m16n8k16(o[2 * n], a, b0);
        mma_m16n8k16(o[2 * n + 1], a, b1);
      }
    }
    if (BUG != 2) __syncthreads();  // the next cp.async overwrites the other buffer
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    l[r] += __shfl_xor_sync(0xffffffffu, l[r], 1);
    l[r] += __shfl_xor_sync(0xffffffffu, l[r], 2);
    int row = r0 + warp * 16 + (lane >> 2) + r * 8;
    if (row < T)
#pragma unroll
      for (int n = 0; n < D / 8; n++)
        *(uint32_t*)(out + (size_t)row * qstride + h * D + n * 8 + (lane & 3) * 2) =
            pack_bf16(o[n][2 * r] / l[r], o[n][2 * r + 1] / l[r]);
  }
}
#define PREFILL(name, D, BUG)                                                                                        \
  extern "C" __global__ void __launch_bounds__(128)                                                                  \
      name(bf16* out, const bf16* q, const bf16* k, const bf16* v, int T, int qs, int kvs, int group, float scale) { \
    prefill<D, BUG>(out, q, k, v, T, qs, kvs, group, scale);                                                         \
  }                                                                                                                  \
  EXPORT_KERNEL(name)
PREFILL(t_prefill_attn_d64, 64, 0)
PREFILL(t_prefill_no_wait, 64, 1)
PREFILL(t_prefill_no_barrier, 64, 2)
