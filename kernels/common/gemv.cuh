// gemv.cuh - up to 8 rows of x times 16 rows of w: the stage that every matrix-vector kernel of a decode step shares.
//
// mapping:  a block owns GEMV_TILE = 16 rows of w, two groups of 8 that its kernel chooses (they need not be
//           neighbours), which its GEMV_WARPS warps share by columns: warp v takes the 64-column stages v,
//           v + GEMV_WARPS, ... in a ring of its own of GEMV_STAGES stages in shared memory, so it waits for no other
//           warp before the end. A block has 24 KB of weights on their way, an SM 120 KB with the 5 blocks that shared
//           memory holds. Of the matrices of Llama-3-8B on 132 SMs, 4096, 6144, 28672 and 128256 rows are 1.94, 2.91, 13.6
//           and 60.7 blocks an SM: at least 97% of what whole rounds would hold, and the first two leave room for the
//           blocks of the next kernel, whose weights are then on their way.
// overlap:  `Product::begin` asks for the first 24 KB of weights, which depend on nothing, and comes before
//           grid_dependency_wait; x, its norm and the epilogue's inputs come after it.
// traffic:  x and gain come through L1, which the blocks of an SM share: from L2 they would be a sixteenth each of what w is.
// mma:      w is the 16-row operand and x, filled up with copies of its last row, the 8-column one: the cost is that
//           of one row whatever rows is, and a row's bits depend on nothing but that row.
// norm:     with NORM the product is of x * gain, rounded to bf16, and each lane adds up the squares of the x that it
//           sees; the root of their mean divides the sums at the end. So no statistic delays a load, and no block
//           reads x twice. What the norm rounds to bf16 is x * gain instead of x * gain / rms: as much, elsewhere.
// order:    columns of a stage by mma, stages of a warp in order, warps in order; squares likewise. Fixed by k.
// issue:    about 180 instructions a stage and warp (SASS of sm_90a), of the 430 that an SM of an H200 can issue while 2 KB
//           arrive at 4.37 TB/s.
// lost:     a ring in registers, filled by 16-byte loads: ptxas gathers the loads of a round at its end, so the ring runs
//           dry once a round, and 96 registers hold 5 blocks only with spills (seen in SASS of 13.0; not timed).
// source:   ours; weights as the large operand of mma is common practice for few rows ("swap-AB"); the norm's factor
//           after the product is calm's (zeux/calm). Not yet measured.
#pragma once
#include "device.cuh"
#include "tiles.h"

constexpr int STAGE = 64;                 // columns of a stage: 128 bytes, one line, of each row of w
constexpr int STAGES = GEMV_STAGES;       // stages of a warp's ring
constexpr int STEP = GEMV_WARPS * STAGE;  // from a stage of a warp to its next
constexpr int ROWS = DECODE_ROWS;         // columns of the mma's small operand
constexpr int THREADS = GEMV_WARPS * 32;
static_assert(ROWS == 8 && GEMV_TILE == 16 && STAGE == GEMV_STAGE, "the shape of mma m16n8k16, four times");
static_assert(THREADS == GEMV_TILE * ROWS, "the epilogue has one thread for each output of the block");
static_assert((STAGES & (STAGES - 1)) == 0, "a stage's place in the ring is its number's low bits");

// p's 16-byte chunk in its line of 128 bytes, its number xor c.
DEV const bf16* flip(const bf16* p, int c) { return (const bf16*)((uintptr_t)p ^ (uintptr_t)(c * 16)); }

// One warp's share of the block's product.
template <bool NORM> struct Product {
  // A stage in shared memory: 16 rows of w, `rows` rows of x, with NORM the gain; a row is 8 chunks of 16 bytes, swizzled.
  bf16* ring;
  int rows, k, stages;         // stages: of this warp
  int next = 0, left;          // next stage to ask for, and columns from this lane's chunk of it to the end
  const bf16 *lo, *hi;         // this lane's chunk of it, in row lane / 8 of each group of w
  const bf16* from = nullptr;  // and, from `run` on, of x or gain
  float sum[4] = {};           // w's row g times x's rows 2c and 2c + 1, then w's row g + 8 (g = lane / 4, c = lane % 4)
  float square = 0.f;          // NORM: of row min(g, rows - 1) of x, over this lane's columns

  DEV static int lane() { return threadIdx.x & 31; }
  DEV static int warp() { return threadIdx.x >> 5; }
  DEV bf16* at(int stage) const { return ring + (stage & (STAGES - 1)) * (GEMV_TILE + rows + NORM) * STAGE; }

  // Asks for the weights of the next stage, 4 rows an instruction, each a whole line.
  DEV void load_w() {
    int64_t four = 4 * (int64_t)k;
    bf16 *to = at(next) + tile_at<STAGE>(lane() >> 3, lane() & 7), *to4 = (bf16*)flip(to, 4) + 4 * STAGE;
    cp_async16(to, lo, left > 0);
    cp_async16(to4, lo + four, left > 0);
    cp_async16(to + 8 * STAGE, hi, left > 0);
    cp_async16(to4 + 8 * STAGE, hi + four, left > 0);
  }

  // Asks for x and gain of the next stage.
  DEV void load_x(const bf16* x, const bf16* gain) {
    int r = lane() >> 3, chunk = lane() & 7;
    bf16* to = at(next) + GEMV_TILE * STAGE;
    if (r < rows + NORM) cp_async16_l1(to + tile_at<STAGE>(r, chunk), from, left > 0);
    if (rows + NORM <= 4) return;  // four rows an instruction
#pragma unroll 1
    for (r += 4; r < rows + NORM; r += 4) {
      const bf16* row = NORM && r == rows ? gain : x + (int64_t)r * k;
      cp_async16_l1(to + tile_at<STAGE>(r, chunk), row + (k - left), left > 0);
    }
  }

  DEV void advance_w() { lo += STEP, hi += STEP, left -= STEP, next++; }

  // Asks for the first stages of weights: 8 rows of n_columns columns from w_lo on, 8 from w_hi on.
  DEV void begin(const bf16* w_lo, const bf16* w_hi, int n_rows, int n_columns) {
    DYN_SHARED(bf16, shared);
    rows = n_rows, k = n_columns;
    ring = shared + warp() * STAGES * (GEMV_TILE + rows + NORM) * STAGE;
    stages = ((k + STAGE - 1) / STAGE - warp() + GEMV_WARPS - 1) / GEMV_WARPS;
    int column = warp() * STAGE + (lane() & 7) * 8;
    int64_t first = (int64_t)(lane() >> 3) * k + column;
    lo = w_lo + first, hi = w_hi + first, left = k - column;
#pragma unroll 1
    for (; next < min(stages, STAGES - 1); advance_w()) load_w();
  }

  DEV void multiply(int stage) {
    const bf16 *w = at(stage), *v = w + GEMV_TILE * STAGE;
    int l = lane() & 7, m = lane() >> 3;  // the row and the 8x8 matrix whose address this lane gives
    w += tile_at<STAGE>((m & 1) * 8 + l, m >> 1);
    const bf16 *gain = v + tile_at<STAGE>(rows, m), *x = v + tile_at<STAGE>(min(l, rows - 1), m);
#pragma unroll
    for (int half = 0; half < 8; half += 4) {  // chunks of the stage
      uint32_t b[4];                           // chunks half to half + 3 of x's row g
      ldmatrix_x4(b, flip(x, half));
      if constexpr (NORM) {
#pragma unroll
        for (int i = 0; i < 4; i++)
          square = fmaf(bf_lo(b[i]), bf_lo(b[i]), square), square = fmaf(bf_hi(b[i]), bf_hi(b[i]), square);
        uint32_t g[4];
        ldmatrix_x4(g, flip(gain, half));
#pragma unroll
        for (int i = 0; i < 4; i++) b[i] = mul_bf16x2(b[i], g[i]);
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        uint32_t a[4];
        ldmatrix_x4(a, flip(w, half + i));
        mma_m16n8k16(sum, a, {b[i], b[i + 1]});
      }
    }
  }

  // Multiplies all columns. x: [rows, k]; gain: the norm's [k], with NORM.
  DEV void run(const bf16* x, const bf16* gain) {
    int column = warp() * STAGE + (lane() & 7) * 8, r = lane() >> 3;
    from = (NORM && r == rows ? gain : x + (int64_t)r * k) + column;
    int asked = next;  // by begin: x of these stages is still to come
    next = 0, left = k - column;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
      if (s < asked) load_x(x, gain), from += STEP, left -= STEP, next++;
      cp_commit();  // the first one has all the weights of begin, which are waited for with it
    }
#pragma unroll 1
    for (int s = 0; s < stages; s++) {
      cp_wait<STAGES - 2>();
      __syncwarp();  // the stage is there for all lanes, and all are done with the one before, whose place is next
      if (next < stages) load_w(), load_x(x, gain), from += STEP, advance_w();
      cp_commit();
      multiply(s);
    }
  }

  // Output (r, i) of thread r * GEMV_TILE + i: row r of x times row i of the tile (the first group is 0 to 7), times
  // 1 / rms of x's row with NORM. All threads call it, once.
  DEV float total(float eps) {
    SHARED(float, part, GEMV_WARPS * GEMV_TILE * ROWS);  // [warp][x's row][w's row]
    SHARED(float, squares, GEMV_WARPS * ROWS);           // [warp][x's row]
    int g = lane() >> 2, c = lane() & 3;
    float* mine = part + warp() * GEMV_TILE * ROWS;
    mine[2 * c * GEMV_TILE + g] = sum[0];
    mine[(2 * c + 1) * GEMV_TILE + g] = sum[1];
    mine[2 * c * GEMV_TILE + g + 8] = sum[2];
    mine[(2 * c + 1) * GEMV_TILE + g + 8] = sum[3];
    if constexpr (NORM) {
      square += __shfl_xor_sync(0xffffffffu, square, 1);
      square += __shfl_xor_sync(0xffffffffu, square, 2);
      if (c == 0) squares[warp() * ROWS + g] = square;
    }
    __syncthreads();  // the parts of all warps are there
    float y = part[threadIdx.x];
#pragma unroll
    for (int v = 1; v < GEMV_WARPS; v++) y += part[v * GEMV_TILE * ROWS + threadIdx.x];
    if constexpr (NORM) {
      float s = squares[threadIdx.x / GEMV_TILE];
#pragma unroll
      for (int v = 1; v < GEMV_WARPS; v++) s += squares[v * ROWS + threadIdx.x / GEMV_TILE];
      y *= rsqrtf(s / k + eps);
    }
    return y;
  }
};
