// lora_grad: du[r,t] = scale * sum_j dy[r,j] B[t,j]; dA[t,j] += keep * sum_r du[r,t] drop(x[r,j]); dB[t,j] += scale *
//            sum_r u[r,t] dy[r,j]: the gradients of an adapter's factors
// shapes:   du, u [rows, rank] f32; dy rows of `stride` bf16, of which n columns; x [rows, k] bf16; B, dB [rank, n] f32; dA
//           [rank, k] f32. Two kernels: _du, and _factor, which makes dA from du and x, and dB from u and dy.
// rounding: dy and x exact, B, du and u to 2^-17 of them (two bf16), sums in f32.
// order:    of _factor: LORA_GRAD_PART rows are summed on their own, by mma.m16n8k16 in steps of 16 rows, then part by part.
//           So the bits depend on the sizes alone, not on the GPU.
// mapping:  _du as lora_down. _factor: one block per LORA_GRAD_COLS columns, LORA_RANKS ranks and part; 4 warps have a quarter of
//           the columns each. The last block of a tile to arrive adds its parts up. Five blocks an SM: without that number ptxas
//           spills for sm_120.
// pipeline: stages of cp.async; each thread drops from the chunks of x that it copied.
// traffic:  _du reads 2*rows*n + 4*rank*n bytes, writes 4*rows*rank; _factor reads 2*rows*n + 4*rows*rank + 4*rank*n, writes
//           4*rank*n, besides, from and to L2, 8*rank*n for each part where there are several. = LoraGrad::cost, which counts dy
//           once: one kernel that makes du and dB would read it once, but dB sums over rows and du over columns.
//           Predicted, not measured: 16384 rows, k and n 4096, rank 32 on an H200: 3 times 134 MB, 92 us.
// requires: k % 8 == 0, n % 8 == 0, rank % 8 == 0, stride % 8 == 0; factors and columns aligned to 16 bytes
//                                                                         (LoraGrad::launch in src/ops/train/lora_grad.rs)
// source:   ours. Not yet measured.
#include "common/lora.cuh"

extern "C" __global__ void __launch_bounds__(LORA_THREADS)
lora_grad_du_bf16(float* du, const bf16* dy, const float* b, int rows, int n, int rank, int stride, float scale) {
  lora_narrow(du, dy, stride, b, rows, n, rank, scale, Dropout{});
}
EXPORT_KERNEL(lora_grad_du_bf16)

// grad [rank, n] += scale * sum_r p[r,t] drop(x[r,j]); sums and arrived (0 before and after) are scratch, by
// LoraGrad::workspace.
extern "C" __global__ void __launch_bounds__(LORA_THREADS, 5)
lora_grad_factor_bf16(float* grad, float* sums, uint32_t* arrived, const float* p, const bf16* x, int rows, int n, int rank,
                      int stride, float scale, uint32_t threshold, unsigned long long seed, uint32_t step, uint32_t site) {
  constexpr int X = LORA_GRAD_DEPTH * LORA_GRAD_COLS, LD = LORA_RANKS + 4, P = LORA_GRAD_DEPTH * LD;
  constexpr int CHUNKS = LORA_GRAD_COLS / 8, MI = LORA_RANKS / 16, NI = LORA_GRAD_COLS / 32;  // chunks of a row; mma tiles
  static_assert(LORA_THREADS == 4 * 32 && LD % 32 == 4 && NI % 2 == 0, "four warps; no bank twice; pairs of tiles");
  DYN_SHARED(unsigned char, stages);  // [LORA_GRAD_STAGES]: x [LORA_GRAD_DEPTH][LORA_GRAD_COLS] bf16, p [LORA_GRAD_DEPTH][LD] f32
  auto x_of = [&](int stage) { return reinterpret_cast<bf16*>(stages + stage * (X * 2 + P * 4)); };
  auto p_of = [&](int stage) { return reinterpret_cast<float*>(stages + stage * (X * 2 + P * 4) + X * 2); };
  Dropout drop{threshold, step, site, seed};
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  int j0 = blockIdx.x * LORA_GRAD_COLS, t0 = blockIdx.y * LORA_RANKS;
  int begin = blockIdx.z * LORA_GRAD_PART, end = min(begin + LORA_GRAD_PART, rows);

  auto load = [&](int stage, int r0) {
#pragma unroll
    for (int m = 0; m < LORA_GRAD_DEPTH * CHUNKS / LORA_THREADS; m++) {
      int i = m * LORA_THREADS + threadIdx.x, row = i / CHUNKS, chunk = i % CHUNKS, j = j0 + chunk * 8;
      bool in = r0 + row < end && j < n;
      cp_async16(x_of(stage) + tile_at<LORA_GRAD_COLS>(row, chunk), in ? x + (int64_t)(r0 + row) * stride + j : x, in);
    }
#pragma unroll
    for (int m = 0; m < LORA_GRAD_DEPTH * LORA_RANKS / 4 / LORA_THREADS; m++) {
      int i = m * LORA_THREADS + threadIdx.x, row = i / (LORA_RANKS / 4), t = i % (LORA_RANKS / 4) * 4;
      bool in = r0 + row < end && t0 + t < rank;
      cp_async16(p_of(stage) + row * LD + t, in ? p + (int64_t)(r0 + row) * rank + t0 + t : p, in);
    }
  };

  int steps = (end - begin + LORA_GRAD_DEPTH - 1) / LORA_GRAD_DEPTH;
#pragma unroll
  for (int s = 0; s < LORA_GRAD_STAGES - 1; s++) {
    if (s < steps) load(s, begin + s * LORA_GRAD_DEPTH);
    cp_commit();  // also when empty, so that the count of groups below holds
  }
  float acc[MI][NI][4] = {};
  for (int s = 0; s < steps; s++) {
    bf16* tx = x_of(s % LORA_GRAD_STAGES);
    const float* tp = p_of(s % LORA_GRAD_STAGES);
    cp_wait<LORA_GRAD_STAGES - 2>();
    if (drop.threshold) {  // a thread drops from what it copied itself
#pragma unroll
      for (int m = 0; m < LORA_GRAD_DEPTH * CHUNKS / LORA_THREADS; m++) {
        int i = m * LORA_THREADS + threadIdx.x, row = i / CHUNKS, chunk = i % CHUNKS;
        bf16* at = tx + tile_at<LORA_GRAD_COLS>(row, chunk);
        st128(at, drop.masked(ld128(at), (int64_t)(begin + s * LORA_GRAD_DEPTH + row) * n + j0 + chunk * 8));
      }
    }
    __syncthreads();  // stage s has landed, and everybody is done with the stage that the next copies overwrite
    int next = s + LORA_GRAD_STAGES - 1;
    if (next < steps) load(next % LORA_GRAD_STAGES, begin + next * LORA_GRAD_DEPTH);
    cp_commit();
#pragma unroll
    for (int kk = 0; kk < LORA_GRAD_DEPTH; kk += 16) {
      uint32_t b[NI][2];
#pragma unroll
      for (int j = 0; j < NI; j += 2) {
        uint32_t v[4];
        ldmatrix_x4_trans(v, tx + tile_at<LORA_GRAD_COLS>(kk + (lane & 15), warp * NI + j + (lane >> 4)));
        b[j][0] = v[0], b[j][1] = v[1], b[j + 1][0] = v[2], b[j + 1][1] = v[3];
      }
#pragma unroll
      for (int m = 0; m < MI; m++) {
        if (t0 + m * 16 >= rank) break;
        uint32_t hi[4], lo[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {  // rows of p are columns of the first operand
          const float* from = tp + (kk + (i >> 1) * 8 + c * 2) * LD + m * 16 + (i & 1) * 8 + g;
          split(hi[i], lo[i], from[0], from[LD]);
        }
#pragma unroll
        for (int j = 0; j < NI; j++) {
          mma_m16n8k16(acc[m][j], hi, b[j]);
          mma_m16n8k16(acc[m][j], lo, b[j]);
        }
      }
    }
  }

  int tile = blockIdx.y * gridDim.x + blockIdx.x, tile_count = gridDim.x * gridDim.y;
  if (gridDim.z > 1) {
    // The place of this thread's sums of a part: a warp's lie side by side.
    auto place = [&](int part, int m, int j) {
      return sums + ((((int64_t)part * tile_count + tile) * MI + m) * NI + j) * (LORA_THREADS * 4) + threadIdx.x * 4;
    };
#pragma unroll
    for (int m = 0; m < MI; m++)
#pragma unroll
      for (int j = 0; j < NI; j++) {
        float* v = acc[m][j];
        st128(place(blockIdx.z, m, j), make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                                                  __float_as_uint(v[3])));
      }
    uint32_t* before = reinterpret_cast<uint32_t*>(stages);
    cp_wait<0>();
    __syncthreads();  // all threads have written their sums, which the next line publishes, and are done with the stages
    if (threadIdx.x == 0) before[0] = atomic_add_acq_rel(arrived + tile, 1u);
    __syncthreads();  // everyone knows, and sees the sums of the blocks that came before
    if (before[0] + 1 != gridDim.z) return;
    if (threadIdx.x == 0) arrived[tile] = 0;
#pragma unroll
    for (int m = 0; m < MI; m++)
#pragma unroll
      for (int j = 0; j < NI; j++)
        for (int part = 0; part < (int)gridDim.z; part++) {  // in their order, its own too
          uint4 v = ld128(place(part, m, j));
          float of_part[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
#pragma unroll
          for (int e = 0; e < 4; e++) acc[m][j][e] = part ? acc[m][j][e] + of_part[e] : of_part[e];
        }
  }
#pragma unroll
  for (int m = 0; m < MI; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int t = t0 + m * 16 + half * 8 + g;
      if (t >= rank) continue;
#pragma unroll
      for (int j = 0; j < NI; j++) {
        int column = j0 + (warp * NI + j) * 8 + c * 2;
        if (column >= n) continue;
        float* to = grad + (int64_t)t * n + column;
        to[0] = fmaf(scale, acc[m][j][2 * half], to[0]);
        to[1] = fmaf(scale, acc[m][j][2 * half + 1], to[1]);
      }
    }
}
EXPORT_KERNEL(lora_grad_factor_bf16)
