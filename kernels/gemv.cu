// gemv: out[r,i] = epilogue( sum_j x[r,j] * w[i,j] ), 1 to 8 rows of x; store as bf16, add to bf16, or keep f32.
// shapes:   out [rows, n] bf16 or f32; x [rows, k] bf16; w [n, k] bf16.
// rounding: products exact, sums in f32 on tensor cores, one rounding at the store (after the residual's addition).
// mapping:  a block owns GEMV_TILE = 16 rows of w, which its GEMV_WARPS warps share by columns: warp v takes the
//           64-column stages v, v + GEMV_WARPS, ..., of which the next GEMV_STAGES are in flight: 8 KB a warp, 128 KB
//           an SM with the 4 blocks that fit. The grid is n / 16 blocks: on 132 SMs 1.94, 2.91, 13.6 and 60.7 blocks
//           an SM for the 4096, 6144, 28672 and 128256 rows of Llama-3-8B, at least 97% of what whole rounds would
//           hold.
// mma:      w is the 16-row operand and x, filled up with copies of its last row, the 8-column one: the cost is that
//           of one row whatever rows is, and a row's bits depend on nothing but that row. The 16 bytes that a lane
//           loads from w and from x hold the same 8 columns, so the operands are used as they arrive, without a
//           shuffle; only the order in which columns are summed differs from memory's.
// order:    columns within a stage by mma, stages of a warp in order, warps in order. Fixed by k alone.
// traffic:  reads 2*n*k + 2*rows*k (x from L2 once per block, usually from L1) and for add 2*rows*n; writes 2*rows*n,
//           for f32 4. = Gemv::cost (store). Predicted, not measured, at 4.37 TB/s: 6144x4096 50.3 MB 11.5 us;
//           4096x4096 33.6 MB 7.7 us; 28672x4096 234.9 MB 53.7 us; 4096x14336 117.4 MB 26.9 us; 128256x4096 1051 MB
//           240 us; plus about 2 us to fill and drain.
// requires: k % 8 == 0, rows <= DECODE_ROWS, n and k up to 2^30   (Gemv::check, Gemv::check_kernel in src/ops/gemv.rs)
// source:   ours; weights as the large operand of mma is common practice for few rows ("swap-AB"). Not yet measured.
#include "common/device.cuh"
#include "common/tiles.h"

constexpr int STAGE = 64;                     // columns of a stage: 128 bytes, one line, of each row of w
constexpr int STAGES = GEMV_STAGES;           // stages of a warp in flight
constexpr int STEP = GEMV_WARPS * STAGE;      // from a stage of a warp to its next
constexpr int ROUND = STAGES * STEP;          // columns that the block has in flight
constexpr int ROWS = DECODE_ROWS;             // columns of the mma's small operand
constexpr int THREADS = GEMV_WARPS * 32;
static_assert(ROWS == 8 && GEMV_TILE == 16, "the shape of mma m16n8k16");
static_assert(THREADS == GEMV_TILE * ROWS, "the epilogue has one thread for each output of the block");

// What one lane holds of one stage: 8 columns of w's rows g and g + 8 and of x's row g (g = lane / 4), twice.
struct Stage {
  uint4 lo[2], hi[2], x[2];
};

// Where a lane is: at its column of w's rows g and g + 8 and of x's row g, with `left` columns to the end.
struct Place {
  const bf16 *lo, *hi, *x;
  int left;
  DEV void advance() { lo += ROUND, hi += ROUND, x += ROUND, left -= ROUND; }
};

// The stage at `ahead` columns from p. CHECKED: columns beyond the end are zero.
template <bool CHECKED> DEV void load(Stage& s, const Place& p, int ahead) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int j = ahead + h * 32;
    if (CHECKED && j >= p.left) {
      s.lo[h] = s.hi[h] = s.x[h] = make_uint4(0, 0, 0, 0);
    } else {
      s.lo[h] = ld128_stream(p.lo + j), s.hi[h] = ld128_stream(p.hi + j);
      s.x[h] = ld128(p.x + j);
    }
  }
}

DEV void multiply(float (&sum)[4], const Stage& s) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    mma_m16n8k16(sum, {s.lo[h].x, s.hi[h].x, s.lo[h].y, s.hi[h].y}, {s.x[h].x, s.x[h].y});
    mma_m16n8k16(sum, {s.lo[h].z, s.hi[h].z, s.lo[h].w, s.hi[h].w}, {s.x[h].z, s.x[h].w});
  }
}

enum Epilogue { STORE, ADD, F32 };

template <Epilogue E, class T> DEV void gemv(T* out, const bf16* x, const bf16* w, int rows, int n, int k) {
  SHARED(float, part, GEMV_WARPS * GEMV_TILE * ROWS);
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  int first = blockIdx.x * GEMV_TILE;
  int column = warp * STAGE + c * 8;
  // rows of w beyond n and of x beyond rows are read as the last ones; what comes of them is not stored
  Place p = {w + (int64_t)min(first + g, n - 1) * k + column, w + (int64_t)min(first + g + 8, n - 1) * k + column,
             x + (int64_t)min(g, rows - 1) * k + column, k - column};

  Stage ring[STAGES];
#pragma unroll
  for (int i = 0; i < STAGES; i++) load<true>(ring[i], p, i * STEP);

  // this thread's output, and the residual early: its latency would show at the end
  int r = threadIdx.x / GEMV_TILE, i = first + threadIdx.x % GEMV_TILE;
  bool stores = r < rows && i < n;
  float residual = 0.f;
  if constexpr (E == ADD) {
    if (stores) residual = __bfloat162float(out[(int64_t)r * n + i]);
  }

  float sum[4] = {};  // w's row g times x's rows 2c and 2c + 1, then w's row g + 8 times the same
  int next = ROUND;  // columns from here on are not in the ring yet
#pragma unroll 1
  for (; next + ROUND <= k; next += ROUND) {
    p.advance();
#pragma unroll
    for (int i = 0; i < STAGES; i++) {
      multiply(sum, ring[i]);
      load<false>(ring[i], p, i * STEP);
    }
  }
  if (next < k) {
    p.advance();
#pragma unroll
    for (int i = 0; i < STAGES; i++) multiply(sum, ring[i]);
#pragma unroll
    for (int i = 0; i < STAGES; i++) load<true>(ring[i], p, i * STEP);
  }
#pragma unroll
  for (int i = 0; i < STAGES; i++) multiply(sum, ring[i]);

  float* mine = part + warp * GEMV_TILE * ROWS;  // [x's row][w's row]
  mine[2 * c * GEMV_TILE + g] = sum[0];
  mine[(2 * c + 1) * GEMV_TILE + g] = sum[1];
  mine[2 * c * GEMV_TILE + g + 8] = sum[2];
  mine[(2 * c + 1) * GEMV_TILE + g + 8] = sum[3];
  __syncthreads();  // the parts of all warps are there
  float total = part[threadIdx.x];
#pragma unroll
  for (int v = 1; v < GEMV_WARPS; v++) total += part[v * GEMV_TILE * ROWS + threadIdx.x];
  if (!stores) return;
  out += (int64_t)r * n + i;
  if constexpr (E == F32)
    *out = total;
  else
    *out = __float2bfloat16(total + residual);
}

#define GEMV(name, E, T)                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS, 4)                  \
      name(T* out, const bf16* x, const bf16* w, int rows, int n, int k) {  \
    gemv<E>(out, x, w, rows, n, k);                                         \
  }                                                                         \
  EXPORT_KERNEL(name)

// What is supported: bf16 weights, three epilogues, 1 to DECODE_ROWS rows.
GEMV(gemv_bf16_store, STORE, bf16)
GEMV(gemv_bf16_add, ADD, bf16)
GEMV(gemv_bf16_f32, F32, float)
