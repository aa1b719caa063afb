// sample: token[r] drawn from logits[r] as params of sequence s = pos[r] / max_seq say; pos[r] += 1, params.draws += 1,
//         history[s,token] += 1; the token also goes to the host
// Rows of one sequence are side by side; each but the first has computed a guess, token[r], of the token that the row before it
// draws. It draws as if that were right: with the guesses up to its own in history, and as many more draws. Only rows up to the
// first wrong guess count, and the others change nothing.
// The definition is the text of src/ops/sample.rs. The choice here is the same, bit for bit: each f32 operation is rounded
// by itself, everything after the weights is integers, and sums of integers do not depend on their order.
// shapes:   token, pos [rows] u32, where pos are places (sequence * max_seq + position); params [sequences, SAMPLE_PARAMS]
//           u32; history [sequences, vocab] u32; scratch: DECODE_ROWS of Best (common/best.cuh), then a Row's arrays for each
//           row; serial, ring: common/outbox.cuh; bias [sequences, vocab] f32; mask [sequences, ceil(vocab / 32)] u32, a bit
//           for each token that MASKED allows; logits [rows, vocab] f32.
// mapping:  four kernels in a row, each with a block for SAMPLE_TILE ids of a row; work that needs the whole row is done by
//           the block that arrives last.
//           adjust:    computes the adjusted logits y, and the largest of them.
//           histogram: counts and weights of the logits by their distance from the largest, with atomics. The last block
//                      finds the bins in which top_k and top_p end.
//           select:    lists the ids in these bins, some hundred of them. The last block finds the last candidate that is
//                      kept, by radix select, 8 bits a pass.
//           draw:      adds up the weight that is kept in each block. The last block draws the token, and that of the last row
//                      finds the rows that count, a lane of its first warp for each row.
//           histogram and select return at once for rows without top_k and top_p.
// traffic:  reads 12*vocab bytes a row, writes 4*vocab (= Sample::cost), both in adjust; then 4*vocab from L2 in each of
//           the others, 24*SAMPLE_BINS read and written for the bins, and 12 a weight for its atomics.
//           Predicted, not measured, for a row of 128,256 logits on an H100 (126 blocks), with 1 us for the seam before each:
//           adjust 1 + 2.5 us (2.1 MB, two loads that depend on each other); histogram 1 + 5 (257,000 atomics, the bins);
//           select 1 + 2 and 3.5 for each filter (8 passes of three barriers); draw 1 + 4.
//           Temperature alone 11 us, top_k or top_p 21, both 24; 16 rows, 2016 blocks, about 80. One block a row took 170 to 370.
//           If thousands of logits are within 1.4% of a temperature, a single SM works on a list of thousands: slow, but right.
// requires: vocab <= SAMPLE_MAX_VOCAB, so that sums of weights fit 64 bits; rows <= DECODE_ROWS
//                                                                         (Sample::launch in src/ops/sample.rs)
// why not:  a cluster of blocks with the histogram in distributed shared memory would be one kernel instead of four and save
//           some 6 us, but only from Hopper on: other GPUs would still need these.
// source:   ours; radix select and histograms by atomics are common practice (e.g. Dr.Top-k 2021). Not yet measured.
#include "common/best.cuh"
#include "common/outbox.cuh"
#include "common/philox.cuh"
#include "common/trace.cuh"

constexpr uint32_t ALL = 0xffffffffu;
constexpr int BINS = SAMPLE_BINS, EACH = SAMPLE_TILE / SAMPLE_THREADS;  // ids of a thread
static_assert(SAMPLE_THREADS == 256, "one thread for each value of a digit");

// params, in the order of Params::words.
enum {
  TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, FREQUENCY, PRESENCE, SEED_LO, SEED_HI, DRAWS, MIN_TOKENS, STOP_IDS,
  MASKED = STOP_IDS + 8
};
constexpr int MAX_STOP_IDS = 8;

// floor(2^40 2^e) for e <= 0; 0 where e is NONE or less, or NaN.
constexpr float NONE = -41.f;
DEV u64 exp2_weight(float e) {
  if (!(e > NONE)) return 0;
  float n = floorf(e), f = __fsub_rn(e, n), p = 0.00186713f;
  const float c[5] = {0.00901703f, 0.055799913f, 0.24016444f, 0.6931513f, 1.f};
#pragma unroll
  for (int i = 0; i < 5; i++) p = __fadd_rn(__fmul_rn(p, f), c[i]);
  uint32_t mantissa = (uint32_t)__fmul_rn(p, 8388608.f);
  int shift = (int)n + 17;
  return shift >= 0 ? (u64)mantissa << shift : mantissa >> -shift;
}

// The bin of an e above NONE: larger ones are in the same bin or an earlier one.
DEV int bin_of(float e) { return (int)__fmul_rn(-e, 49.f); }
static_assert(49 * 41 < BINS, "the bin of the least e");

// floor(share * total), the share cut to 24 bits.
DEV u64 share_of(float share, u64 total) {
  u64 s = (uint32_t)__fmul_rn(fminf(fmaxf(share, 0.f), 1.f), 16777216.f);
  return (total >> 24) * s + (((total & 0xffffff) * s) >> 24);
}

// The first 64 bits of Philox4x32-10.
DEV u64 philox64(uint32_t key0, uint32_t key1, uint32_t counter) {
  uint32_t c[4] = {counter, 0, 0, 0};
  philox(c, key0, key1);
  return (u64)c[1] << 32 | c[0];
}

// Of f(0), ..., f(n - 1) the first at which their running sum reaches `target`, which is positive; `before` becomes the sum
// before it. Where the whole sum is less, n and that sum. All threads of the block call it.
template <class F> DEV int reach(int n, F f, u64 target, u64& before) {
  SHARED(u64, warps, 32);
  SHARED(u64, found, 2);
  int each = (n + SAMPLE_THREADS - 1) / SAMPLE_THREADS, i = threadIdx.x * each, end = min(i + each, n);
  u64 mine = 0;
#pragma unroll 4
  for (int j = i; j < end; j++) mine += f(j);
  u64 upto = warp_scan(mine), of_warp = __shfl_sync(ALL, upto, 31);
  u64 warps_upto = warp_scan(exchange(of_warp, warps)), all = __shfl_sync(ALL, warps_upto, 31);
  u64 sum = __shfl_sync(ALL, warps_upto, threadIdx.x >> 5) - of_warp + upto - mine;
  before = all;
  if (all < target) return n;
  if (sum < target && target <= sum + mine) {
    for (u64 v; sum + (v = f(i)) < target; i++) sum += v;
    found[0] = i, found[1] = sum;
  }
  __syncthreads();  // found
  before = found[1];
  return (int)found[0];
}

// The sum of f(0), ..., f(n - 1).
template <class F> DEV u64 sum_of(int n, F f) {
  u64 sum;
  reach(n, f, ~0ull, sum);
  return sum;
}

// A row of logits and what its kernels leave for each other.
struct Row {
  struct Ends {             // of the filters, by bins; BINS is behind all of them
    u64 kept;               // weight in the bins before top_k's, of which all is kept
    u64 before;             // weight in the bins before `first`
    uint32_t top_k, left;   // the bin in which top_k ends, and how many of it are kept
    uint32_t first, last;   // top_p ends in one of these bins, depending on what top_k keeps
    DEV bool holds(uint32_t bin) const { return bin == top_k || in_top_p(bin); }
    DEV bool in_top_p(uint32_t bin) const { return first <= bin && bin <= last; }
  };
  struct State {
    Ends ends;
    u64 threshold;    // the last candidate that is kept
    uint32_t listed;  // ids in list
    uint32_t chosen;  // the token
  };
  static_assert(sizeof(State) <= 4 * SAMPLE_STATE, "words of scratch");

  int r, vocab;
  uint32_t sequence;
  const uint32_t* params;
  Best* best;
  State* state;     // SAMPLE_STATE words
  u64* weights;     // [BINS]
  u64* parts;       // [blocks], weight that may be drawn
  uint32_t* counts;  // [BINS]
  float* y;         // [vocab], adjusted logits
  uint32_t* list;   // [vocab], ids in the bins of `ends`
  float temperature, largest;

  DEV Row(float* scratch, const uint32_t* pos, const uint32_t* all_params, int vocab, int max_seq) : r(blockIdx.y), vocab(vocab) {
    sequence = pos[r] / (uint32_t)max_seq;
    params = all_params + sequence * SAMPLE_PARAMS;
    best = (Best*)scratch + r;
    state = state_of(scratch, r, vocab);
    weights = (u64*)state + SAMPLE_STATE / 2, parts = weights + BINS;
    counts = (uint32_t*)(parts + gridDim.x), y = (float*)(counts + BINS), list = (uint32_t*)y + vocab;
    temperature = param(TEMPERATURE);
  }

  static DEV State* state_of(float* scratch, int r, int vocab) {
    int words = SAMPLE_STATE + 3 * BINS + 2 * gridDim.x + 2 * vocab;  // an even number
    return (State*)(scratch + DECODE_ROWS * BEST_WORDS + (int64_t)r * words);
  }

  DEV float param(int which) const { return __uint_as_float(params[which]); }
  DEV uint32_t top_k() const { return params[TOP_K] < (uint32_t)vocab ? params[TOP_K] : 0; }
  DEV bool has_top_p() const { return param(TOP_P) < 1.f; }
  DEV bool filters() const { return temperature > 0.f && (top_k() || has_top_p()); }
  DEV u64 top_p_of(u64 total) const { return max(share_of(param(TOP_P), total), 1ull); }

  // From the second kernel on: reads the largest logit; false if the token is sure.
  DEV bool draws() {
    largest = candidate_value(best->best);
    return temperature > 0.f && fabsf(largest) < INFINITY;
  }

  // Of a logit's weight the logarithm, of base 2.
  DEV float exponent(float v) const {
    return __fmul_rn(__fdiv_rn(__fsub_rn(v, largest), temperature), 1.44269504f);
  }

  // f(id, y) for this thread's ids.
  template <class F> DEV void each(F f) const {
    int first = blockIdx.x * SAMPLE_TILE + threadIdx.x;
    float v[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) v[j] = first + j * SAMPLE_THREADS < vocab ? y[first + j * SAMPLE_THREADS] : -INFINITY;
#pragma unroll
    for (int j = 0; j < EACH; j++) f(first + j * SAMPLE_THREADS, v[j]);
  }

  // Whether this is the last of the row's blocks to come here. What all threads of the others did is visible then.
  DEV bool is_last() const {
    SHARED(uint32_t, last, 1);
    __syncthreads();  // this block's part is done
    if (threadIdx.x == 0) last[0] = Best::is_last(best->arrived, gridDim.x);
    __syncthreads();
    return last[0];
  }

  // What is in the list, as candidate().
  DEV u64 listed(int i) const { return candidate(y[list[i]], list[i]); }

  // The largest candidates of the list's n are kept until the sum of f over them reaches target, which it does: the last.
  template <class F> DEV u64 select(int n, F f, u64 target) const {
    SHARED(uint32_t, lo, 256);  // sums of 64 bits, in halves: shared memory has fast 32-bit atomics only
    SHARED(uint32_t, hi, 256);
    u64 prefix = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
      lo[threadIdx.x] = hi[threadIdx.x] = 0;
      __syncthreads();  // all are 0
#pragma unroll 4
      for (int i = threadIdx.x; i < n; i += SAMPLE_THREADS) {
        u64 c = listed(i);
        if ((c ^ prefix) >> shift >> 8) continue;
        u64 w = f(c);
        uint32_t digit = 255 - (uint32_t)(c >> shift & 255), low = (uint32_t)w;
        uint32_t old = low ? atomicAdd(lo + digit, low) : 0;
        uint32_t high = (uint32_t)(w >> 32) + (old + low < low);  // the carry
        if (high) atomicAdd(hi + digit, high);
      }
      __syncthreads();  // all are counted
      u64 before;
      int digit = reach(256, [&](int d) { return (u64)hi[d] << 32 | lo[d]; }, target, before);
      target -= before, prefix |= (u64)(255 - digit) << shift;
    }
    return prefix;
  }
};

// Step 1 for one token.
struct Adjust {
  const uint32_t *params, *mask;
  bool masked, held;
  float repetition, frequency, presence;

  DEV Adjust(const uint32_t* params, const uint32_t* mask, int guesses)
      : params(params), mask(mask), masked(params[MASKED]), held(params[DRAWS] + guesses < params[MIN_TOKENS]),
        repetition(__uint_as_float(params[REPETITION])), frequency(__uint_as_float(params[FREQUENCY])),
        presence(__uint_as_float(params[PRESENCE])) {}

  DEV float operator()(int id, float logit, float bias, uint32_t history) const {
    if (masked && !(mask[id >> 5] >> (id & 31) & 1)) return -INFINITY;
    for (int s = 0; held && s < MAX_STOP_IDS; s++) {
      if (params[STOP_IDS + s] == (uint32_t)id) return -INFINITY;
    }
    float y = __fadd_rn(logit, bias);
    if (history) {
      y = y > 0.f ? __fdiv_rn(y, repetition) : __fmul_rn(y, repetition);
      uint32_t count = history & 0x7fffffffu;  // the top bit says that the token is in the prompt
      if (count) y = __fsub_rn(__fsub_rn(y, __fmul_rn(frequency, __uint2float_rn(count))), presence);
    }
    return y != y ? -INFINITY : y;
  }
};

extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS, 4)
sample_adjust_f32(const uint32_t* token, float* scratch, const uint32_t* pos, const uint32_t* params, const uint32_t* history,
                  const float* bias, const uint32_t* mask, const float* logits, int vocab, int max_seq, Span* trace) {
  Traced traced(trace);
  SHARED(u64, warps, 32);
  grid_dependency_wait();
  traced.ready();
  grid_launch_dependents();
  Row row(scratch, pos, params, vocab, max_seq);
  history += (int64_t)row.sequence * vocab, bias += (int64_t)row.sequence * vocab;
  mask += (int64_t)row.sequence * ((vocab + 31) / 32), logits += (int64_t)row.r * vocab;
  int first = blockIdx.x * SAMPLE_TILE + threadIdx.x;
  float logit[EACH], add[EACH];
  uint32_t seen[EACH];
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    int id = min(first + j * SAMPLE_THREADS, vocab - 1);
    logit[j] = logits[id], add[j] = bias[id], seen[j] = history[id];
  }
  if (row.filters()) {
    for (int b = blockIdx.x * SAMPLE_THREADS + threadIdx.x; b < BINS; b += gridDim.x * SAMPLE_THREADS)
      row.weights[b] = 0, row.counts[b] = 0;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) row.state->threshold = 0, row.state->listed = 0;
  int sequence_begin = first_row(pos, row.r, max_seq);
  for (int guess = sequence_begin + 1; guess <= row.r; guess++) {
    uint32_t guessed = token[guess];
#pragma unroll
    for (int j = 0; j < EACH; j++) seen[j] += guessed == (uint32_t)(first + j * SAMPLE_THREADS);
  }
  Adjust adjust(row.params, mask, row.r - sequence_begin);
  u64 best = 0;
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    int id = first + j * SAMPLE_THREADS;
    if (id >= vocab) break;
    float y = adjust(id, logit[j], add[j], seen[j]);
    row.y[id] = y;
    best = max(best, candidate(y, id));
  }
  best = block_max(best, warps);
  if (threadIdx.x == 0) row.best->offer(best);
}
EXPORT_KERNEL(sample_adjust_f32)

extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS, 4)
sample_histogram_f32(float* scratch, const uint32_t* pos, const uint32_t* params, int vocab, int max_seq, Span* trace) {
  Traced traced(trace);
  grid_dependency_wait();
  traced.ready();
  grid_launch_dependents();
  Row row(scratch, pos, params, vocab, max_seq);
  if (!row.filters() || !row.draws()) return;
  uint32_t top_k = row.top_k();
  bool has_top_p = row.has_top_p();
  row.each([&](int, float y) {
    float e = row.exponent(y);
    if (!(e > NONE)) return;  // of weight 0, and so is everything behind it: of no matter
    if (top_k) atomicAdd(row.counts + bin_of(e), 1u);
    if (has_top_p) atomicAdd(row.weights + bin_of(e), exp2_weight(e));
  });
  if (!row.is_last()) return;

  Row::Ends ends = {0, 0, BINS, 0, BINS, BINS - 1};
  auto weight = [&](int b) { return row.weights[b]; };
  if (top_k) {
    u64 before;
    ends.top_k = reach(BINS, [&](int b) -> u64 { return row.counts[b]; }, top_k, before);
    ends.left = top_k - (uint32_t)before;
  }
  if (has_top_p) {
    ends.kept = sum_of(ends.top_k, weight);
    u64 most = ends.kept + (ends.top_k < BINS ? row.weights[ends.top_k] : 0), before;
    ends.first = reach(BINS, weight, row.top_p_of(ends.kept), ends.before);
    ends.last = reach(BINS, weight, row.top_p_of(most), before);
  }
  if (threadIdx.x == 0) row.state->ends = ends;
}
EXPORT_KERNEL(sample_histogram_f32)

extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS, 4)
sample_select_f32(float* scratch, const uint32_t* pos, const uint32_t* params, int vocab, int max_seq, Span* trace) {
  Traced traced(trace);
  grid_dependency_wait();
  traced.ready();
  grid_launch_dependents();
  Row row(scratch, pos, params, vocab, max_seq);
  if (!row.filters() || !row.draws()) return;
  Row::State* state = row.state;
  Row::Ends ends = state->ends;
  row.each([&](int id, float y) {
    float e = row.exponent(y);
    if (e > NONE && ends.holds(bin_of(e))) row.list[atomicAdd(&state->listed, 1u)] = id;
  });
  if (!row.is_last()) return;

  int n = state->listed;
  u64 threshold = 0, kept = ends.kept;
  auto exponent = [&](u64 c) { return row.exponent(candidate_value(c)); };
  if (ends.top_k < BINS) {
    auto is_last_bin = [&](u64 c) -> u64 { return bin_of(exponent(c)) == ends.top_k; };
    threshold = row.select(n, is_last_bin, ends.left);
    kept += sum_of(n, [&](int i) -> u64 {
      u64 c = row.listed(i);
      return is_last_bin(c) && c >= threshold ? exp2_weight(exponent(c)) : 0;
    });
  }
  if (row.has_top_p()) {
    auto weight = [&](u64 c) -> u64 {
      float e = exponent(c);
      return c >= threshold && ends.in_top_p(bin_of(e)) ? exp2_weight(e) : 0;
    };
    threshold = row.select(n, weight, row.top_p_of(kept) - ends.before);
  }
  if (threadIdx.x == 0) state->threshold = threshold;
}
EXPORT_KERNEL(sample_select_f32)

extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS, 4)
sample_draw_f32(uint32_t* token, uint32_t* pos, uint32_t* params, uint32_t* history, float* scratch, uint32_t* serial,
                u64* ring, int vocab, int max_seq, Span* trace) {
  Traced traced(trace);
  SHARED(u64, warps, 32);
  grid_dependency_wait();
  traced.ready();
  grid_launch_dependents();
  Row row(scratch, pos, params, vocab, max_seq);
  bool draws = row.draws();
  u64 threshold = row.state->threshold, cut = share_of(row.param(MIN_P), 1ull << 40);
  auto weight = [&](int id, float y) -> u64 {
    u64 w = candidate(y, id) >= threshold ? exp2_weight(row.exponent(y)) : 0;
    return w >= cut ? w : 0;
  };
  if (draws) {
    u64 mine = 0;
    row.each([&](int id, float y) { mine += weight(id, y); });
    mine = warp_sum(exchange(warp_sum(mine), warps));
    if (threadIdx.x == 0) row.parts[blockIdx.x] = mine;
  }
  if (!row.is_last()) return;

  int chosen = candidate_id(row.best->best);
  if (draws) {
    auto part = [&](int b) { return row.parts[b]; };
    uint32_t guesses = row.r - first_row(pos, row.r, max_seq);
    u64 random = philox64(row.params[SEED_LO], row.params[SEED_HI], row.params[DRAWS] + guesses);
    u64 upto = __umul64hi(random, sum_of(gridDim.x, part)) + 1, before, ignored;  // of the running sum of weights
    int first = reach(gridDim.x, part, upto, before) * SAMPLE_TILE;
    auto of_tile = [&](int i) { return weight(first + i, row.y[first + i]); };
    chosen = first + reach(min(SAMPLE_TILE, vocab - first), of_tile, upto - before, ignored);
  }
  __syncthreads();  // all have read what changes now
  if (threadIdx.x >= 32) return;
  if (threadIdx.x == 0) row.best->take(), row.state->chosen = chosen;
  int rows = gridDim.y;
  if (!Best::is_last_warp(((Best*)scratch)->rows, rows)) return;
  chosen = threadIdx.x < rows ? Row::state_of(scratch, threadIdx.x, vocab)->chosen : 0;
  Fed fed = feed_back(token, pos, serial, ring, rows, max_seq, chosen);
  if (fed.counts) atomicAdd(history + (int64_t)fed.sequence * vocab + chosen, 1u);
  if (fed.is_last) params[fed.sequence * SAMPLE_PARAMS + DRAWS] += fed.before + 1;
}
EXPORT_KERNEL(sample_draw_f32)
