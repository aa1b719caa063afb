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
//           Before packed weights, each lane does this for two columns of a stage and puts x * gain where x was: once, where
//           the operand's layout has every column in eight lanes.
// order:    columns of a stage by mma, stages of a warp in order, warps in order; squares likewise. k alone decides it.
// issue:    instructions a stage and warp in SASS of sm_90, of the 430 that an SM of an H200 can issue while 2 KB arrive
//           at 4.37 TB/s: 65 to 66 (gemv) and 106 to 110 (NORM) with one row, 74 and 125 with 2 to 8, 96 and 182 with 9 to
//           16. They were 137 and 192 before addresses in shared memory were 32-bit integers and one row a constant.
// packed:   weights of 4 and 8 bits come in records (packed.cuh), through the same ring; the rows of w that a block takes are
//           whole groups of 8. One row: 8 stages of 1.1 KB (8 bits) or 12 of 0.6 KB (4 bits), of which five blocks fit 228 KB
//           of shared memory. 4 bits are taken two stages at a time, so that a wait and its addresses serve two; stages are
//           added in the same order. 2 to 16 rows: single stages, and with NORM registers for 4 blocks an SM.
//           Instructions a stage and warp in SASS of sm_90, one row, gemv and norm_gate_up, of those that an SM of an H200 can
//           issue while the stage arrives: 430 * 576 / 2048 = 121 (4 bits) or 228 (8 bits). Time from slots over time from
//           bytes, at 75% of the slots:
//             i4 75, 83: 0.82, 0.92      q4 78, 88: 0.85, 0.96
//             i8 92, 108: 0.54, 0.63     q8 94, 111: 0.55, 0.65     f8 128, 145: 0.75, 0.85
//           The other products with a norm have at most 86 (i4: 0.94) and 88 (q4). sm_80: i4 77, 89. So the
//           bytes decide: predicted, not measured, 2.05 ms (8 bits) and 1.2 ms (4 bits) for a step of Llama-3-8B on an H200, from
//           8.0 and 4.2 GB at 4.37 TB/s and the 0.2 ms that a step with bf16 loses.
//           Before, i4 took 122 and 166, q4 128 and 171 (1.34 to 1.89, by bytes 1.7 in all). What saved most: codes that need
//           one mask and one fma a pair (packed.cuh), squares and x * gain once (norm), two stages a wait, and x by four
//           lanes. Of the 75, 36 make the operands, 4 multiply, 12 load codes, scales and x and decode scales; 23 are the
//           ring.
//           Wavefronts of shared memory a stage, of 30 that it can serve meanwhile: 15 and 19 (4 bits), were 21 and 30: x came
//           by ldmatrix, which reads the row eight times.
//           2 to 16 rows, i4: 132 (was 156); with NORM 170 for 4 rows, 36 more for each 4 (was 245 for any number).
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
#define PACKED_PRODUCT(KERNEL, name, F, BLOCKS)
#else
// Of a packed kind: one row, and 2 to 16, with registers for so many BLOCKS an SM.
#define PACKED_PRODUCT(KERNEL, name, F, BLOCKS)                                             \
  KERNEL(name##_r1, F, 1, (F::NARROW ? GEMV_NARROW_STAGES : GEMV_DEEP_STAGES), GEMV_BLOCKS + 1) \
  KERNEL(name##_r16, F, 16, GEMV_STAGES, BLOCKS)
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
  static constexpr int ROUND = F::NARROW && MOST == 1 ? 2 : 1;  // stages between two waits
  static constexpr int PLACES = STAGES / ROUND;                 // of the ring, for a round each
  static constexpr int W_BYTES = F::PACKED ? (2 * F::RECORD + LINE - 1) / LINE * LINE : GEMV_TILE * LINE;  // of a stage
  static constexpr int LEFT = (TRIGGER * STAGES + GEMV_DEEP_STAGES - 1) / GEMV_DEEP_STAGES;  // of them, at the trigger
  static_assert(STAGES % ROUND == 0, "places hold whole rounds");

  // A stage in shared memory: 16 rows of w (or two records of it), with NORM the gain, the rows of x; a row is 8 chunks of
  // 16 bytes, swizzled.
  uint32_t ring, bytes;       // address of the first one, bytes of each
  int rows, k, stages;        // stages: of this warp
  int asked = 0, left;        // rounds that begin asked for; columns from this lane's chunk of the next to the end
  int unasked;                // stages that nobody asked for yet
  const bf16 *lo, *hi;        // this lane's chunk of the next, in row lane / 8 of each group of w
  const typename F::Element* of_record;  // instead, of packed weights: its first chunk, of either record
  uint4 one_row[ROUND][2] = {};        // packed, MOST == 1: x of the stages' halves, in the lanes with g = 0
  float sum[GROUPS][4] = {};  // w's row g times x's rows 2c and 2c + 1, then w's row g + 8 (g = lane / 4, c = lane % 4)
  float square[F::PACKED ? MOST : GROUPS] = {};  // NORM: this lane's columns, of row min(g, rows - 1) of x; packed: each row

  DEV static int lane() { return threadIdx.x & 31; }
  DEV static int warp() { return threadIdx.x >> 5; }

  // Asks for the weights of the next round: bf16 4 rows an instruction, each a whole line; of packed weights, half a warp
  // takes one record, 16 chunks an instruction. A stage beyond the last one is zeroes.
  DEV void load_w(uint32_t place) {
    if constexpr (F::PACKED) {
      constexpr int CHUNKS = F::RECORD / 16;
      int chunk = lane() & 15;
      uint32_t to = place + (lane() >> 4) * F::RECORD + chunk * 16;
#pragma unroll
      for (int i = 0; i < ROUND; i++)
#pragma unroll
        for (int t = 0; t < CHUNKS; t += 16)
          if (t + 16 <= CHUNKS || t + chunk < CHUNKS)
            cp_async16(to + i * bytes + t * 16, of_record + i * GEMV_WARPS * F::RECORD + t * 16, unasked > i);
      of_record += ROUND * GEMV_WARPS * F::RECORD;
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

  // The place of a chunk of a row of gain or x in a stage: ldmatrix reads eight rows at one chunk, and what packed weights
  // read at a time is two rows at four chunks.
  DEV static int x_at(int row, int chunk) {
    if constexpr (!F::PACKED) return tile_at<STAGE>(row, chunk) * 2;
    return row * LINE + (MOST == 1 ? chunk : chunk ^ (row & 1) * 4) * 16;
  }

  // Asks for gain and x of a round, 4 rows an instruction: `from` is this lane's chunk of the first 4, `more` of the next.
  DEV void load_x(uint32_t place, const bf16* from, const bf16* more) {
    constexpr int AWAY = F::PACKED ? 0 : 64;  // of rows that differ by 4
    int r = lane() >> 3, n = NORM + rows, of_stage = ROUND > 1 ? r / (NORM + 1) : 0;
    r -= of_stage * (NORM + 1);
    uint32_t to = place + of_stage * bytes + W_BYTES + x_at(r, lane() & 7);
    if (r < n && of_stage < ROUND) cp_async16_l1(to, from, left > 0);
    if constexpr (MOST > 1) {
#pragma unroll
      for (int i = 4; i < NORM + MOST; i += 4)
        if (r + i < n) cp_async16_l1((i & 4 ? to ^ AWAY : to) + i * LINE, more + (i - 4) * (int64_t)k, left > 0);
    }
  }

  // Asks for the first stages of weights: 8 rows of n_columns columns from row row_lo of w on, 8 from row_hi on.
  DEV void begin(const typename F::Element* w, int row_lo, int row_hi, int n_rows, int n_columns) {
    DYN_SHARED(char, shared);
    rows = MOST == 1 ? 1 : n_rows, k = n_columns;
    bytes = W_BYTES + (NORM + rows) * LINE;
    ring = smem_u32(shared) + warp() * STAGES * bytes;
    stages = unasked = ((k + STAGE - 1) / STAGE - warp() + GEMV_WARPS - 1) / GEMV_WARPS;
    int column = warp() * STAGE + (lane() & 7) * 8;
    if constexpr (F::PACKED) {
      int64_t record = (int64_t)((lane() < 16 ? row_lo : row_hi) / 8) * ((k + STAGE - 1) / STAGE) + warp();
      of_record = w + record * F::RECORD + (lane() & 15) * 16;
    } else {
      int64_t first = (int64_t)(lane() >> 3) * k + column;
      lo = w + (int64_t)row_lo * k + first, hi = w + (int64_t)row_hi * k + first;
    }
    left = k - column;
    uint32_t place = ring;
#pragma unroll 1
    for (; asked < PLACES - 1 && unasked > 0; asked++, unasked -= ROUND, left -= STEP, place += ROUND * bytes) load_w(place);
  }

  DEV void multiply_bf16(uint32_t place) {
    int l = lane() & 7, m = lane() >> 3;  // the row and the 8x8 matrix whose address this lane gives
    uint32_t w = place + tile_at<STAGE>((m & 1) * 8 + l, m >> 1) * 2, v = place + W_BYTES;
    uint32_t x[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; g++) x[g] = v + x_at(NORM + min(g * 8 + l, rows - 1), m);
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
            add_squares(square[g], b[g][i]);
            b[g][i] = mul_bf16x2(b[g][i], gain[i]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        uint32_t a[4];
        ldmatrix_x4(a, w ^ (half + i) * 16);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) mma_m16n8k16(sum[g], a, {b[g][i], b[g][i + 1]});
      }
    }
  }

  DEV static void add_squares(float& sum, uint32_t pair) {
    sum = fmaf(bf_lo(pair), bf_lo(pair), sum);
    sum = fmaf(bf_hi(pair), bf_hi(pair), sum);
  }

  // NORM of packed weights: x becomes x * gain where it is, two columns a lane.
  DEV void norm_rows(uint32_t place) {
    DYN_SHARED(char, shared);
    char* v = shared + (place - smem_u32(shared)) + W_BYTES;
    int chunk = lane() >> 2, in_chunk = (lane() & 3) * 4;
    uint32_t gain = *reinterpret_cast<uint32_t*>(v + x_at(0, chunk) + in_chunk);
    constexpr int FEW = MOST < 4 ? MOST : 4;  // rows whose loads do not wait for each other
#pragma unroll
    for (int first = 0; first < MOST; first += FEW) {
      if (MOST > 1 && first >= rows) break;
      uint32_t x[FEW] = {};
#pragma unroll
      for (int i = 0; i < FEW; i++)
        if (MOST == 1 || first + i < rows) x[i] = *reinterpret_cast<uint32_t*>(v + x_at(NORM + first + i, chunk) + in_chunk);
#pragma unroll
      for (int i = 0; i < FEW; i++) {
        add_squares(square[first + i], x[i]);
        uint32_t* to = reinterpret_cast<uint32_t*>(v + x_at(NORM + first + i, chunk) + in_chunk);
        if (MOST == 1 || first + i < rows) *to = mul_bf16x2(x[i], gain);
      }
    }
  }

  // Multiplies by two records: of_stage is the stage's number in its round.
  DEV void multiply_packed(uint32_t place, int of_stage) {
    DYN_SHARED(char, shared);
    const char* records = shared + (place - smem_u32(shared));
    int g = lane() >> 2, c = lane() & 3;
    F of_lo, of_hi;         // what this lane has of them: rows g and g + 8 of the tile
    float part[GROUPS][4];  // of their sum, the columns of a scale
    of_lo.load(records), of_hi.load(records + F::RECORD);
    uint32_t v = place + W_BYTES;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t b[GROUPS][4];  // 8 columns of x's row g + 8 * group: those of chunk c of the half
#pragma unroll
      for (int h = 0; h < GROUPS; h++) {
        uint4 four = MOST == 1 ? one_row[of_stage][half]
                               : ld128_shared(v + x_at(NORM + min(h * 8 + g, rows - 1), half * 4 + c));
        b[h][0] = four.x, b[h][1] = four.y, b[h][2] = four.z, b[h][3] = four.w;
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        int pair = half * 4 + i;
        uint32_t a[4] = {of_lo.pair(pair), of_hi.pair(pair), of_lo.pair(pair + 1), of_hi.pair(pair + 1)};
        if (pair * 8 % F::GROUP == 0) {
#pragma unroll
          for (int h = 0; h < GROUPS; h++) part[h][0] = part[h][1] = part[h][2] = part[h][3] = 0.f;
        }
#pragma unroll
        for (int h = 0; h < GROUPS; h++) mma_m16n8k16(part[h], a, {b[h][i], b[h][i + 1]});
      }
      if ((half + 1) * 32 % F::GROUP == 0) {
        float lo = of_lo.scale[half * 32 / F::GROUP], hi = of_hi.scale[half * 32 / F::GROUP];
#pragma unroll
        for (int h = 0; h < GROUPS; h++) {
          sum[h][0] = fmaf(lo, part[h][0], sum[h][0]), sum[h][2] = fmaf(hi, part[h][2], sum[h][2]);
          if constexpr (MOST > 1)
            sum[h][1] = fmaf(lo, part[h][1], sum[h][1]), sum[h][3] = fmaf(hi, part[h][3], sum[h][3]);
        }
      }
    }
  }

  // Multiplies a round.
  DEV void multiply(uint32_t place) {
    if constexpr (F::PACKED) {
      if constexpr (NORM) {
#pragma unroll
        for (int i = 0; i < ROUND; i++) norm_rows(place + i * bytes);
        __syncwarp();  // each lane has written its columns, which others read
      }
      if (MOST == 1 && lane() < 4) {  // the other columns of the operand, which would be other rows of x, belong to nobody
#pragma unroll
        for (int i = 0; i < 2 * ROUND; i++)
          one_row[i / 2][i % 2] = ld128_shared(place + lane() * 16 + i / 2 * bytes + W_BYTES + NORM * LINE + i % 2 * 64);
      }
#pragma unroll
      for (int i = 0; i < ROUND; i++) multiply_packed(place + i * bytes, i);
    } else {
      multiply_bf16(place);
    }
  }

  // Multiplies all columns, and lets the next kernel start on the way. x: [rows, k]; gain: the norm's [k], with NORM.
  DEV void run(const bf16* x, const bf16* gain) {
    int r = lane() >> 3, of_stage = ROUND > 1 ? r / (NORM + 1) : 0;
    int column = (warp() + of_stage * GEMV_WARPS) * STAGE + (lane() & 7) * 8;
    r -= of_stage * (NORM + 1) + NORM;
    const bf16 *from = (r < 0 ? gain : x + (int64_t)r * k) + column, *more = x + (int64_t)(r + 4) * k + column;
    uint32_t place = ring;
    left = k - column;
#pragma unroll
    for (int s = 0; s < PLACES - 1; s++) {
      if (s < asked) load_x(place, from, more), skip(from, more), place += ROUND * bytes;
      cp_commit();  // the first one has all the weights of begin, which are waited for with it
    }
    uint32_t last = ring + (PLACES - 1) * ROUND * bytes, free = last;
    constexpr int AHEAD = (PLACES - 1) * ROUND;       // stages on their way
    constexpr bool ZEROES = F::PACKED && MOST == 1;  // beyond the last stage: they cost less than a branch each time
    unasked = stages - AHEAD;                    // or less than nothing
    place = ring;
#pragma unroll 1
    for (; unasked + AHEAD > 0; unasked -= ROUND) {
      cp_wait<PLACES - 2>();
      __syncwarp();  // the round is there for all lanes, and all are done with the one before, whose place is free
      if (ZEROES || unasked > 0) load_x(free, from, more), load_w(free), skip(from, more);
      cp_commit();
      if (!LEFT || unasked + AHEAD <= LEFT) grid_launch_dependents();  // all times but the first mean nothing
      multiply(place);
      free = place, place = place == last ? ring : place + ROUND * bytes;
    }
    if (ZEROES) cp_wait<0>();  // the last ones, before others use the ring
  }

  // To the next round's x.
  DEV void skip(const bf16*& from, const bf16*& more) { from += ROUND * STEP, more += ROUND * STEP, left -= ROUND * STEP; }

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
      if constexpr (NORM && !F::PACKED) {
        square[h] += __shfl_xor_sync(0xffffffffu, square[h], 1);
        square[h] += __shfl_xor_sync(0xffffffffu, square[h], 2);
        if (c == 0) part[GROUPS * 8 * PITCH + h * 8 + g] = square[h];
      }
    }
    if constexpr (NORM && F::PACKED) {
#pragma unroll
      for (int r = 0; r < MOST; r++) {
        float all = warp_sum(square[r]);
        if (lane() == 0) part[GROUPS * 8 * PITCH + r] = all;
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
    if constexpr (F::PACKED) y.x *= F::UNIT, y.y *= F::UNIT;
    return y;
  }
};
