// gemv.cuh - up to 16 rows of x times 16 rows of w: the code that every matrix-vector kernel of a decode step shares.
//
// mapping:  a block owns GEMV_TILE = 16 rows of w, two groups of 8 that its kernel chooses (they need not be
//           neighbours). Its GEMV_WARPS warps share them by columns: warp v takes the 64-column stages v,
//           v + GEMV_WARPS, ... through a ring (buffers for some stages) of its own in shared memory, so it waits for no
//           other warp before the end.
// kernels:  each product is compiled for 1 row of x, for 2 to 8 and for 9 to 16 (r1, r8, r16). Matrices of Llama-3-8B with
//           4096, 6144, 28672 and 128256 rows make 1.94, 2.91, 13.6 and 60.7 blocks of 16 rows for each of 132 SMs: at least
//           97% of what whole rounds would hold. The first two leave room for blocks of the next kernel, whose weights can
//           then be on their way.
// ring:     GEMV_STAGES = 4 stages a warp, of which 3 are on their way: 24 KB of weights a block. If an SM holds three
//           blocks with GEMV_DEEP_STAGES = 8, products of one row use these (r1_deep; 228 KB of shared memory: sm_90,
//           sm_100): 168 KB on their way an SM, and 112 instead of 48 for a matrix with 2 blocks an SM. It does not pay
//           where only two fit: on sm_80 the blocks of a small matrix would no longer all run at once (predicted 8.89 ms
//           instead of 8.75 a step); nor with more rows. The host chooses (Ring in src/ops/gemv.rs); the bits are the same.
// overlap:  `Product::begin` asks for the first stages of weights, which depend on nothing, and comes before
//           grid_dependency_wait; x, its norm and the epilogue's inputs come after it. The next kernel may start
//           (grid_launch_dependents) when a warp has TRIGGER stages of a deep ring left, of a short one in proportion:
//           earlier, its loads take the bandwidth that this kernel needs to end; later, the memory idles at the seam.
// traffic:  x and gain come through L1, which the blocks of an SM share: from L2, each would have a sixteenth of the bytes of
//           w. With R rows that is R/16 of w, half at 8 and all of it at 16, if L1 (28 KB beside the rings) holds nothing.
//           Reading x once an SM would need its blocks to share it: one block an SM, whose seams cost more than x does
//           (predicted 3.7 to 4.2 ms a step for one row), or blocks in lockstep, in clusters, which only Hopper has. So x
//           is read once a block.
// mma:      w is the 16-row operand. x, filled up with copies of its last row, is the 8-column one, so up to 8 rows cost as
//           much as one; from 9 on, each fragment of w meets a second operand of 8 rows. A row's bits depend on nothing but
//           that row.
// norm:     with NORM, w is multiplied by x * gain, rounded to bf16, and each lane adds up the squares of the x that it
//           sees; the root of their mean divides the sums at the end. So no statistic delays a load, and no block reads x
//           twice. The norm rounds x * gain to bf16 instead of x * gain / rms: the same number of roundings, elsewhere.
// order:    columns of a stage by mma, stages of a warp in order, warps in order; squares likewise. k alone decides it.
// issue:    instructions a stage and warp in SASS of sm_90a, of the 430 that an SM of an H200 can issue while 2 KB arrive
//           at 4.37 TB/s: 66 to 69 (gemv) and 107 to 110 (NORM) with one row, 74 and 125 with 2 to 8, 96 and 182 with 9 to
//           16. They were 137 and 192 before addresses in shared memory were 32-bit integers and one row a constant.
// packed:   weights of 4 and 8 bits come in records (packed.cuh), through the same ring: for one row 8 stages, of 1.1 or 0.6 KB,
//           of which five blocks fit 228 KB of shared memory. Rows of w that a block takes are whole groups of 8.
//           Instructions a stage and warp, one row, gemv and NORM: q8 144 and 187, i8 128 and 169, f8 142 and 183, q4 127 and
//           170, i4 122 and 165, of the 228 (8 bits) or 121 (4 bits) that an SM of an H200 can issue while the stage arrives.
//           Predicted, not measured, with 75% of the slots: 8 bits are read at 0.94 of the memory's rate, 4 bits at 0.58, so
//           a step of Llama-3-8B takes some 2.1 ms (8 bits) and 1.9 ms (4 bits) on an H200; on a 4090, which can issue 700
//           instructions while such a stage arrives, the bytes decide.
// lost:     (tried and given up) a ring in registers, filled by 16-byte loads: ptxas collects the loads of a round at its
//           end, so the ring runs dry once a round, and 5 blocks of 96 registers fit only with spills (seen in SASS of 13.0;
//           not timed).
// source:   ours; weights as the large operand of mma is common practice for few rows ("swap-AB"); the norm's factor
//           after the product is calm's (zeux/calm). Times are predictions; not yet measured.
#pragma once
#include "device.cuh"
#include "packed.cuh"
#include "tiles.h"

constexpr int STAGE = 64;                 // columns of a stage: 128 bytes, one line, of each row of w
constexpr int LINE = STAGE * 2;           // their bytes
constexpr int STEP = GEMV_WARPS * STAGE;  // from a stage of a warp to its next
constexpr int THREADS = GEMV_WARPS * 32;
static_assert(GEMV_TILE == 16 && STAGE == GEMV_STAGE, "the shape of mma m16n8k16, four times");
static_assert(THREADS == DECODE_ROWS * 8, "the epilogue has one thread for each pair of outputs of the block");

// What is added to outputs lo and hi of a product; nothing without biases.
DEV float2 biases(const bf16* bias, int lo, int hi) {
  return bias ? make_float2(__bfloat162float(bias[lo]), __bfloat162float(bias[hi])) : make_float2(0.f, 0.f);
}

// KERNEL(name, kind of w, most rows of x, stages of a ring, blocks an SM that its registers must allow) for each kernel of a
// product, or for those of one row. A file of the lab defines VARIANT as __<its name> and has those of one row only.
#define JOIN_EXPANDED(name, kind, variant) name##kind##variant
#define JOIN(name, kind, variant) JOIN_EXPANDED(name, kind, variant)
#define EACH_PRODUCT_OF_ONE(KERNEL, name)           \
  KERNEL(JOIN(name, _r1, VARIANT), Bf16, 1, GEMV_STAGES, 9) \
  KERNEL(JOIN(name, _r1_deep, VARIANT), Bf16, 1, GEMV_DEEP_STAGES, 9)
#ifdef VARIANT
#define EACH_PRODUCT EACH_PRODUCT_OF_ONE
#define PACKED_PRODUCT(KERNEL, name, F)
#else
// Of a packed kind: one row, and 2 to 16.
#define PACKED_PRODUCT(KERNEL, name, F)                    \
  KERNEL(name##_r1, F, 1, GEMV_DEEP_STAGES, GEMV_BLOCKS)   \
  KERNEL(name##_r16, F, 16, GEMV_STAGES, GEMV_BLOCKS)
#define VARIANT
#define EACH_PRODUCT(KERNEL, name)               \
  EACH_PRODUCT_OF_ONE(KERNEL, name)              \
  KERNEL(name##_r8, Bf16, 8, GEMV_STAGES, GEMV_BLOCKS) \
  KERNEL(name##_r16, Bf16, 16, GEMV_STAGES, GEMV_BLOCKS)
#endif

// One warp's share of the block's product, of x * gain with NORM.
template <class F, bool NORM, int MOST, int STAGES, int TRIGGER> struct Product {
  static constexpr int GROUPS = (MOST + 7) / 8;  // of 8 rows of x, each the mma's small operand
  static constexpr int PITCH = GEMV_TILE + 4;    // of part: the rows that a lane's neighbours write lie in other banks
  static constexpr int W_BYTES = F::PACKED ? (2 * F::RECORD + LINE - 1) / LINE * LINE : GEMV_TILE * LINE;  // of a stage
  static constexpr int CHUNKS = 2 * F::RECORD / 16, TURNS = F::PACKED ? (CHUNKS + 31) / 32 : 1;  // of two records
  static constexpr int LEFT = (TRIGGER * STAGES + GEMV_DEEP_STAGES - 1) / GEMV_DEEP_STAGES;

  // A stage in shared memory: 16 rows of w (or two records of it), with NORM the gain, the rows of x; a row is 8 chunks of
  // 16 bytes, swizzled.
  uint32_t ring, bytes;       // address of the first one, bytes of each
  int rows, k, stages;        // stages: of this warp
  int asked = 0, left;        // stages that begin asked for; columns from this lane's chunk of the next to the end
  const bf16 *lo, *hi;        // this lane's chunk of it, in row lane / 8 of each group of w
  const typename F::Element* of_chunk[TURNS];  // instead, of packed weights: its chunks of the stage's records
  float sum[GROUPS][4] = {};  // w's row g times x's rows 2c and 2c + 1, then w's row g + 8 (g = lane / 4, c = lane % 4)
  float square[GROUPS] = {};  // NORM: of row min(g, rows - 1) of x, over this lane's columns

  DEV static int lane() { return threadIdx.x & 31; }
  DEV static int warp() { return threadIdx.x >> 5; }

  // Asks for the weights of the next stage, 4 rows an instruction, each a whole line.
  DEV void load_w(uint32_t place) {
    if constexpr (F::PACKED) {
#pragma unroll
      for (int t = 0; t < TURNS; t++) {
        int chunk = t * 32 + lane();
        if (chunk < CHUNKS) cp_async16(place + chunk * 16, of_chunk[t], true);
        of_chunk[t] += GEMV_WARPS * F::RECORD;
      }
    } else {
      load_w_bf16(place);
    }
  }

  DEV void load_w_bf16(uint32_t place) {
    int64_t four = 4 * (int64_t)k;
    uint32_t to = place + tile_at<STAGE>(lane() >> 3, lane() & 7) * 2, to4 = (to ^ 64) + 4 * LINE;
    cp_async16(to, lo, left > 0);
    cp_async16(to4, lo + four, left > 0);
    cp_async16(to + 8 * LINE, hi, left > 0);
    cp_async16(to4 + 8 * LINE, hi + four, left > 0);
    lo += STEP, hi += STEP;
  }

  // Asks for gain and x of a stage, 4 rows an instruction: `from` is this lane's chunk of the first 4, `more` of the next.
  DEV void load_x(uint32_t place, const bf16* from, const bf16* more) {
    int r = lane() >> 3, n = NORM + rows;
    uint32_t to = place + W_BYTES + tile_at<STAGE>(r, lane() & 7) * 2;
    if (r < n) cp_async16_l1(to, from, left > 0);
    if constexpr (MOST > 1) {
#pragma unroll
      for (int i = 4; i < NORM + MOST; i += 4)
        if (r + i < n) cp_async16_l1((i & 4 ? to ^ 64 : to) + i * LINE, more + (i - 4) * (int64_t)k, left > 0);
    }
  }

  // Asks for the first stages of weights: 8 rows of n_columns columns from row row_lo of w on, 8 from row_hi on.
  DEV void begin(const typename F::Element* w, int row_lo, int row_hi, int n_rows, int n_columns) {
    DYN_SHARED(char, shared);
    rows = MOST == 1 ? 1 : n_rows, k = n_columns;
    bytes = W_BYTES + (NORM + rows) * LINE;
    ring = smem_u32(shared) + warp() * STAGES * bytes;
    stages = ((k + STAGE - 1) / STAGE - warp() + GEMV_WARPS - 1) / GEMV_WARPS;
    int column = warp() * STAGE + (lane() & 7) * 8;
    if constexpr (F::PACKED) {
      int of_rows = (k + STAGE - 1) / STAGE;
#pragma unroll
      for (int t = 0; t < TURNS; t++) {
        int chunk = t * 32 + lane(), is_hi = chunk >= CHUNKS / 2;
        int64_t record = (int64_t)((is_hi ? row_hi : row_lo) / 8) * of_rows + warp();
        of_chunk[t] = w + record * F::RECORD + (chunk - is_hi * (CHUNKS / 2)) * 16;
      }
    } else {
      int64_t first = (int64_t)(lane() >> 3) * k + column;
      lo = w + (int64_t)row_lo * k + first, hi = w + (int64_t)row_hi * k + first;
    }
    left = k - column;
    uint32_t place = ring;
#pragma unroll 1
    for (; asked < min(stages, STAGES - 1); asked++, left -= STEP, place += bytes) load_w(place);
  }

  DEV void multiply(uint32_t place) {
    int l = lane() & 7, m = lane() >> 3;  // the row and the 8x8 matrix whose address this lane gives
    uint32_t w = place + tile_at<STAGE>((m & 1) * 8 + l, m >> 1) * 2, v = place + W_BYTES;
    F of_lo, of_hi;             // of packed weights this lane's in rows g and g + 8
    float part[GROUPS][4];      // of their sum, the columns of a scale
    if constexpr (F::PACKED) {
      DYN_SHARED(char, shared);
      const char* record = shared + (place - smem_u32(shared));
      of_lo.load(record), of_hi.load(record + F::RECORD);
    }
    uint32_t x[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; g++) x[g] = v + tile_at<STAGE>(NORM + min(g * 8 + l, rows - 1), m) * 2;
#pragma unroll
    for (int half = 0; half < 8; half += 4) {  // chunks of the stage
      uint32_t gain[4], b[GROUPS][4];          // chunks half to half + 3, of x's row g + 8 * group
      if constexpr (NORM) ldmatrix_x4(gain, v + (half + m) * 16);
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        ldmatrix_x4(b[g], MOST == 1 ? x[g] + half * 16 : x[g] ^ half * 16);  // what is added is part of the instruction
        if constexpr (NORM) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            square[g] = fmaf(bf_lo(b[g][i]), bf_lo(b[g][i]), square[g]);
            square[g] = fmaf(bf_hi(b[g][i]), bf_hi(b[g][i]), square[g]);
            b[g][i] = mul_bf16x2(b[g][i], gain[i]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        uint32_t a[4];
        if constexpr (F::PACKED) {
          int sixteen = (half + i) / 2;
          a[0] = of_lo.pair(sixteen, 0), a[1] = of_hi.pair(sixteen, 0);
          a[2] = of_lo.pair(sixteen, 1), a[3] = of_hi.pair(sixteen, 1);
          if (sixteen * 16 % F::GROUP == 0) {
#pragma unroll
            for (int g = 0; g < GROUPS; g++) part[g][0] = part[g][1] = part[g][2] = part[g][3] = 0.f;
          }
        } else {
          ldmatrix_x4(a, w ^ (half + i) * 16);
        }
#pragma unroll
        for (int g = 0; g < GROUPS; g++) mma_m16n8k16(F::PACKED ? part[g] : sum[g], a, {b[g][i], b[g][i + 1]});
      }
      if constexpr (F::PACKED) {
        if ((half + 4) * 8 % F::GROUP == 0) {
          int s = half * 8 / F::GROUP;
#pragma unroll
          for (int g = 0; g < GROUPS; g++) {
            sum[g][0] = fmaf(of_lo.scale[s], part[g][0], sum[g][0]), sum[g][1] = fmaf(of_lo.scale[s], part[g][1], sum[g][1]);
            sum[g][2] = fmaf(of_hi.scale[s], part[g][2], sum[g][2]), sum[g][3] = fmaf(of_hi.scale[s], part[g][3], sum[g][3]);
          }
        }
      }
    }
  }

  // Multiplies all columns, and lets the next kernel start on the way. x: [rows, k]; gain: the norm's [k], with NORM.
  DEV void run(const bf16* x, const bf16* gain) {
    int column = warp() * STAGE + (lane() & 7) * 8, r = (lane() >> 3) - NORM;
    const bf16 *from = (r < 0 ? gain : x + (int64_t)r * k) + column, *more = x + (int64_t)(r + 4) * k + column;
    uint32_t place = ring;
    left = k - column;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
      if (s < asked) load_x(place, from, more), from += STEP, more += STEP, left -= STEP, place += bytes;
      cp_commit();  // the first one has all the weights of begin, which are waited for with it
    }
    uint32_t last = ring + (STAGES - 1) * bytes, free = last;
    int trigger = LEFT ? max(stages - LEFT, 0) : 0;
    place = ring;
#pragma unroll 1
    for (int s = 0; s < stages; s++) {
      cp_wait<STAGES - 2>();
      __syncwarp();  // the stage is there for all lanes, and all are done with the one before, whose place is free
      if (s + STAGES - 1 < stages) load_x(free, from, more), load_w(free), from += STEP, more += STEP, left -= STEP;
      cp_commit();
      if (s == trigger) grid_launch_dependents();
      multiply(place);
      free = place, place = place == last ? ring : place + bytes;
    }
  }

  // Outputs (r, i) and (r, i + 8) of thread 8r + i: row r of x times rows i and i + 8 of the tile, one of each group, times
  // 1 / rms of x's row with NORM. All threads call it, once; for r >= rows there is nothing.
  DEV float2 total(float eps) {
    DYN_SHARED(char, shared);
    int g = lane() >> 2, c = lane() & 3, ring_bytes = STAGES * bytes;
    float* part = reinterpret_cast<float*>(shared + warp() * ring_bytes);  // [x's row][w's row], then the squares
    __syncwarp();  // all lanes are done with the ring, where their part goes
#pragma unroll
    for (int h = 0; h < GROUPS; h++) {
#pragma unroll
      for (int i = 0; i < 4; i++) part[(h * 8 + 2 * c + i % 2) * PITCH + g + i / 2 * 8] = sum[h][i];
      if constexpr (NORM) {
        square[h] += __shfl_xor_sync(0xffffffffu, square[h], 1);
        square[h] += __shfl_xor_sync(0xffffffffu, square[h], 2);
        if (c == 0) part[GROUPS * 8 * PITCH + h * 8 + g] = square[h];
      }
    }
    __syncthreads();  // the parts of all warps are there
    int r = threadIdx.x / 8;
    float2 y = make_float2(0.f, 0.f);
    if (r >= rows) return y;
    float s = 0.f;
#pragma unroll
    for (int v = 0; v < GEMV_WARPS; v++) {
      const float* of = reinterpret_cast<const float*>(shared + v * ring_bytes);
      const float* at = of + r * PITCH + threadIdx.x % 8;
      y.x += at[0], y.y += at[8];
      if constexpr (NORM) s += of[GROUPS * 8 * PITCH + r];
    }
    if constexpr (NORM) {
      float scale = rsqrtf(s / k + eps);
      y.x *= scale, y.y *= scale;
    }
    return y;
  }
};
