// Variants as kernels/lab has them, for aoji's tests/ops: one that is right if its launch is applied, others that are wrong.
#include "common/trace.cuh"

// A row by one warp: right with 32 threads, wrong with more.
extern "C" __global__ void rms_norm_bf16__warp(bf16* out, const bf16* x, const bf16* w, int first, int dim, float eps) {
  x += (int64_t)(first + blockIdx.x) * dim;
  out += (int64_t)blockIdx.x * dim;
  float sum = 0.f;
  for (int i = threadIdx.x; i < dim; i += 32) sum += __bfloat162float(x[i]) * __bfloat162float(x[i]);
  float scale = rsqrtf(warp_sum(sum) / dim + eps);
  for (int i = threadIdx.x; i < dim; i += 32)
    out[i] = __float2bfloat16(__bfloat162float(x[i]) * scale * __bfloat162float(w[i]));
}
EXPORT_KERNEL(rms_norm_bf16__warp)

// One thread does all of a row; what it divides by, or reads, is a parameter of the fault.
DEV void row(bf16* out, const bf16* x, const bf16* w, int dim, int count, int read, float eps) {
  if (threadIdx.x) return;
  float sum = 0.f;
  for (int i = 0; i < read; i++) sum += __bfloat162float(x[i]) * __bfloat162float(x[i]);
  float scale = rsqrtf(sum / count + eps);
  for (int i = 0; i < dim; i++)
    out[i] = __float2bfloat16(__bfloat162float(x[i]) * scale * __bfloat162float(w[i]));
}

// The variance of a sample, which has one degree of freedom less.
extern "C" __global__ void rms_norm_bf16__biased(bf16* out, const bf16* x, const bf16* w, int first, int dim, float eps) {
  row(out + (int64_t)blockIdx.x * dim, x + (int64_t)(first + blockIdx.x) * dim, w, dim, dim - 1, dim, eps);
}
EXPORT_KERNEL(rms_norm_bf16__biased)

// One element too many.
extern "C" __global__ void rms_norm_bf16__outside(bf16* out, const bf16* x, const bf16* w, int first, int dim, float eps) {
  row(out + (int64_t)blockIdx.x * dim, x + (int64_t)(first + blockIdx.x) * dim, w, dim, dim, dim + 1, eps);
}
EXPORT_KERNEL(rms_norm_bf16__outside)

// Of an op that the test does not run.
extern "C" __global__ void swiglu_bf16__idle(bf16* hb, const bf16* gate_up, int ffn_dim) {}
EXPORT_KERNEL(swiglu_bf16__idle)

// Never ends; in the place of any kernel.
extern "C" __global__ void endless() {
  for (volatile int on = 1; on;) {
  }
}
EXPORT_KERNEL(endless)

// Notes when it ran, and nothing else.
extern "C" __global__ void rms_norm_bf16__traced(bf16*, const bf16*, const bf16*, int, int, float, Span* trace) {
  Traced traced(trace);
}
EXPORT_KERNEL(rms_norm_bf16__traced)
