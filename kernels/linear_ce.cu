// linear_ce: loss[i] = -ln softmax(x[at[i]] w^T)[target[i]], and dx[at[i]] = scale * (softmax - onehot) w, 0 in all other rows
// shapes:   loss [labels] f32; dx, x [rows, dim] bf16; at, target [labels] u32; w [vocab, dim] bf16. Labels in chunks, of which the
//           scratch has gathered rows of x and dx [chunk, dim] bf16, logits [chunk, vocab] f32 and their gradient [chunk, vocab]
//           bf16. Per chunk: _gather, gemm, _loss, linear_dx, _scatter.
// rounding: logits in f32; the gradient of the logits to bf16, for the product with w; dx as in linear_dx, rounded once.
// mapping:  _loss: one block per label, CE_THREADS threads that stride over its logits twice, 4 (16 bytes) a thread: first maximum and
//           sum of exponentials together, then the gradient. _gather, _scatter: block (i, c) copies elements c * 8 * VECTOR_THREADS
//           onwards of row i, 8 (16 bytes) a thread.
// traffic:  w twice for each chunk; logits of a chunk: 4 bytes written, twice read, 2 bytes written and read again. LinearCe::cost
//           counts w twice and no logits.
//           Predicted, not measured: a chunk of 523 rows of Llama-3-8B on an H200: two products of 550 GFLOP, 1.6 ms, logits 1.1 GB,
//           0.25 ms: 3.5 us a label.
// requires: dim % 8 == 0, vocab % 8 == 0; each of at below rows, each target below vocab, no row twice
//                                                                         (LinearCe::launch in src/ops/train/linear_ce.rs)
// source:   chunks of logits as in Liger (arXiv 2410.10989), maximum and sum in one pass as Milakov & Gimelshein 2018; code ours.
//           Not yet measured.
#include "common/device.cuh"
#include "common/tiles.h"

// to[i] = x[at[i]]
extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
linear_ce_gather_bf16(bf16* to, const bf16* x, const uint32_t* at, int dim) {
  int j = (blockIdx.y * VECTOR_THREADS + threadIdx.x) * 8;
  if (j >= dim) return;
  st128(to + (int64_t)blockIdx.x * dim + j, ld128(x + (int64_t)at[blockIdx.x] * dim + j));
}
EXPORT_KERNEL(linear_ce_gather_bf16)

// x[at[i]] = from[i]
extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
linear_ce_scatter_bf16(bf16* x, const bf16* from, const uint32_t* at, int dim) {
  int j = (blockIdx.y * VECTOR_THREADS + threadIdx.x) * 8;
  if (j >= dim) return;
  st128(x + (int64_t)at[blockIdx.x] * dim + j, ld128(from + (int64_t)blockIdx.x * dim + j));
}
EXPORT_KERNEL(linear_ce_scatter_bf16)

// loss[i], and unless dlogits is null their gradient times scale. Exponentials are powers of 2, of logits times log2(e).
extern "C" __global__ void __launch_bounds__(CE_THREADS)
linear_ce_loss_f32(float* loss, bf16* dlogits, const float* logits, const uint32_t* target, int vocab, float scale) {
  constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
  SHARED(float, scratch, 32);
  const float* x = logits + (int64_t)blockIdx.x * vocab;
  float top = -3e38f, sum = 0.f;  // of this thread's logits: the maximum, and the sum of exp2(log2(e) (logit - maximum))
  for (int j = threadIdx.x * 4; j < vocab; j += CE_THREADS * 4) {
    uint4 v = ld128(x + j);
    float y[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
    float most = fmaxf(fmaxf(y[0], y[1]), fmaxf(y[2], y[3]));
    if (most > top) sum *= exp2f((top - most) * LOG2E), top = most;
    float shift = -top * LOG2E;
#pragma unroll
    for (int e = 0; e < 4; e++) sum += exp2f(fmaf(y[e], LOG2E, shift));
  }
  float all = block_max(top, scratch);
  sum = block_sum(sum * exp2f((top - all) * LOG2E), scratch);
  float lse = fmaf(all, LOG2E, log2f(sum));  // of powers of 2
  uint32_t learned = target[blockIdx.x];
  if (threadIdx.x == 0) loss[blockIdx.x] = fmaf(lse, LN2, -x[learned]);
  if (!dlogits) return;
  bf16* to = dlogits + (int64_t)blockIdx.x * vocab;
  for (int j = threadIdx.x * 4; j < vocab; j += CE_THREADS * 4) {
    uint4 v = ld128(x + j);
    float y[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
#pragma unroll
    for (int e = 0; e < 4; e++)
      y[e] = scale * (exp2f(fmaf(y[e], LOG2E, -lse)) - ((uint32_t)(j + e) == learned ? 1.f : 0.f));
    *reinterpret_cast<uint2*>(to + j) = make_uint2(pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]));
  }
}
EXPORT_KERNEL(linear_ce_loss_f32)
