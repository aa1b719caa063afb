// sample: token[r] drawn from logits[r] as params of sequence s = pos[r] / max_seq say; pos[r] += 1, params.draws += 1,
//         history[s,token] += 1; the token to the host too
// The definition is the text of src/ops/sample.rs; this is the same choice, bit for bit: each f32 operation is rounded
// by itself, everything after the weights is integers, and sums of integers do not depend on their order.
// shapes:   token, pos [rows] u32, pos places, all of different sequences; params [sequences, SAMPLE_PARAMS] u32; history
//           [sequences, vocab] u32; y [rows, vocab] f32, scratch for the adjusted logits, whose first 4 words are 0
//           afterwards (argmax and norm_head_argmax count there); serial, ring: common/outbox.cuh; bias [sequences, vocab]
//           f32; mask [sequences, ceil(vocab / 32)] u32, a bit for each token that MASKED allows; logits [rows, vocab] f32.
// mapping:  block r draws the token of row r; each warp owns a contiguous range of ids, so the order of ids is that of warps, steps and lanes.
// traffic:  reads 12*vocab bytes a row, writes 4*vocab. = Sample::cost. Then it passes over y (L2 cache): once for the final
//           sum, 3 times more for top_k, 4 for top_p, once for each of these whose threshold has ties; part of a pass
//           for the pick.
//           All that is the work of one SM a row; spreading the passes over the GPU is what there is to gain.
// method:   radix select of the threshold key of top_k (by count) and top_p (by weight), 11 bits a pass.
// requires: blockDim.x a power of two from 32 to SAMPLE_THREADS; vocab <= SAMPLE_MAX_VOCAB, so that sums of weights fit
//           64 bits                                                          (Sample::launch in src/ops/sample.rs)
// source:   ours. Not yet measured.
#include "common/order.cuh"
#include "common/outbox.cuh"
#include "common/tiles.h"
#include "common/trace.cuh"

constexpr uint32_t ALL = 0xffffffffu;
constexpr int DIGIT = 11, BINS = 1 << DIGIT;
static_assert(SAMPLE_THREADS <= BINS, "each thread adds up the same number of bins");

// params, in the order of Params::words.
enum {
  TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, FREQUENCY, PRESENCE, SEED_LO, SEED_HI, DRAWS, MIN_TOKENS, STOP_IDS,
  MASKED = STOP_IDS + 8
};
constexpr int MAX_STOP_IDS = 8;

// Step 1 for one token.
DEV float adjust(const uint32_t* params, const uint32_t* mask, int id, float logit, float bias, uint32_t history) {
  if (params[MASKED] && !(mask[id >> 5] >> (id & 31) & 1)) return -INFINITY;
  if (params[DRAWS] < params[MIN_TOKENS]) {
    for (int s = 0; s < MAX_STOP_IDS; s++) {
      if (params[STOP_IDS + s] == (uint32_t)id) return -INFINITY;
    }
  }
  float y = __fadd_rn(logit, bias);
  if (history) {
    float penalty = __uint_as_float(params[REPETITION]);
    y = y > 0.f ? __fdiv_rn(y, penalty) : __fmul_rn(y, penalty);
    uint32_t count = history & 0x7fffffffu;  // the top bit says that the token is in the prompt
    if (count) {
      y = __fsub_rn(y, __fmul_rn(__uint_as_float(params[FREQUENCY]), __uint2float_rn(count)));
      y = __fsub_rn(y, __uint_as_float(params[PRESENCE]));
    }
  }
  return y != y ? -INFINITY : y;
}

// floor(2^40 exp(x)) for x <= 0.
DEV u64 exp_weight(float x) {
  float e = __fmul_rn(x, 1.44269504f);
  if (!(e > -41.f)) return 0;
  float n = floorf(e), f = __fsub_rn(e, n), p = 0.00186713f;
  const float c[5] = {0.00901703f, 0.055799913f, 0.24016444f, 0.6931513f, 1.f};
#pragma unroll
  for (int i = 0; i < 5; i++) p = __fadd_rn(__fmul_rn(p, f), c[i]);
  uint32_t mantissa = (uint32_t)__fmul_rn(p, 8388608.f);
  int shift = (int)n + 17;
  return shift >= 0 ? (u64)mantissa << shift : mantissa >> -shift;
}

// floor(share * total), the share cut to 24 bits.
DEV u64 share_of(float share, u64 total) {
  u64 s = (uint32_t)__fmul_rn(fminf(fmaxf(share, 0.f), 1.f), 16777216.f);
  return (total >> 24) * s + (((total & 0xffffff) * s) >> 24);
}

// The first 64 bits of Philox4x32-10.
DEV u64 philox(uint32_t key0, uint32_t key1, uint32_t counter) {
  uint32_t c0 = counter, c1 = 0, c2 = 0, c3 = 0;
  for (int i = 0; i < 10; i++) {
    uint32_t hi0 = __umulhi(c0, 0xD2511F53u), lo0 = c0 * 0xD2511F53u;
    uint32_t hi1 = __umulhi(c2, 0xCD9E8D57u), lo1 = c2 * 0xCD9E8D57u;
    c0 = hi1 ^ c1 ^ key0, c1 = lo1, c2 = hi0 ^ c3 ^ key1, c3 = lo0;
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return (u64)c1 << 32 | c0;
}

// The adjusted logits, the ids of this thread's warp, and what the block shares.
struct Row {
  const float* y;
  int begin, end;
  uint32_t *bins_lo, *bins_hi;  // BINS sums of 64 bits, in halves: shared memory has fast 32-bit atomics only
  u64* warps;                   // scratch of exchange()
  u64* found;                   // three words for what one thread found

  // The sum of f(id, y) over all ids.
  template <class F> DEV u64 sum(F f) const {
    u64 s = 0;
#pragma unroll 4
    for (int i = begin + (threadIdx.x & 31); i < end; i += 32) s += f(i, y[i]);
    return warp_sum(exchange(warp_sum(s), warps));
  }

  // The first id at which the running sum of f(id, y) exceeds r. Directly after sum(f), which found more than r and
  // left each warp's share in warps.
  template <class F> DEV int first_above(F f, u64 r) const {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u64 share = lane < (int)(blockDim.x >> 5) ? warps[lane] : 0, upto = warp_scan(share);
    int owner = __ffs(__ballot_sync(ALL, upto > r)) - 1;
    r -= __shfl_sync(ALL, upto - share, owner);
    for (int base = begin; warp == owner && base < end; base += 32) {
      int i = base + lane;
      u64 running = warp_scan(i < end ? f(i, y[i]) : 0);
      uint32_t above = __ballot_sync(ALL, running > r);
      if (above) {
        if (lane == __ffs(above) - 1) found[0] = i;
        break;
      }
      r -= __shfl_sync(ALL, running, 31);
    }
    __syncthreads();  // found
    return (int)found[0];
  }

  DEV u64 bin(int b) const { return (u64)bins_hi[b] << 32 | bins_lo[b]; }

  // The key at which the sum of f(id, y) in the order of falling keys reaches target, which is at least 1 and at most
  // the whole sum; `above` becomes the sum over the larger keys, `at` that over the key itself.
  template <class F> DEV uint32_t select(F f, u64 target, u64& above, u64& at) const {
    uint32_t prefix = 0;
    above = 0;
    for (int left = 32; left > 0;) {  // bits that are not yet known
      int digit = min(left, DIGIT), shift = left - digit;
      for (int b = threadIdx.x; b < BINS; b += blockDim.x) bins_lo[b] = bins_hi[b] = 0;
      __syncthreads();  // bins are empty
#pragma unroll 4
      for (int i = begin + (threadIdx.x & 31); i < end; i += 32) {
        uint32_t key = order_key(y[i]);
        if ((u64)key >> left != prefix) continue;
        u64 w = f(i, y[i]);
        uint32_t lo = (uint32_t)w, b = key >> shift & ((1u << digit) - 1);
        uint32_t old = lo ? atomicAdd(&bins_lo[b], lo) : 0;
        uint32_t hi = (uint32_t)(w >> 32) + (old + lo < lo);  // the carry
        if (hi) atomicAdd(&bins_hi[b], hi);
      }
      __syncthreads();  // bins are full
      int each = BINS / blockDim.x, top = BINS - 1 - threadIdx.x * each;  // my bins, the highest first
      u64 mine = 0;
      for (int b = top; b > top - each; b--) mine += bin(b);
      u64 upto = warp_scan(mine), of_warp = __shfl_sync(ALL, upto, 31);
      u64 warps_upto = warp_scan(exchange(of_warp, warps));
      u64 before = above + __shfl_sync(ALL, warps_upto, threadIdx.x >> 5) - of_warp + upto - mine;
      if (before < target && target <= before + mine) {
        int b = top;
        for (; before + bin(b) < target; b--) before += bin(b);
        found[0] = b, found[1] = before, found[2] = bin(b);
      }
      __syncthreads();  // found; and bins may be emptied
      prefix = prefix << digit | (uint32_t)found[0], above = found[1], at = found[2];
      left = shift;
    }
    return prefix;
  }
};

extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)
sample_f32(uint32_t* token, uint32_t* pos, uint32_t* params, uint32_t* history, float* y, uint32_t* serial, u64* ring,
           const float* bias, const uint32_t* mask, const float* logits, int vocab, int max_seq, Span* trace) {
  Traced traced(trace);
  SHARED(uint32_t, bins_lo, BINS);
  SHARED(uint32_t, bins_hi, BINS);
  SHARED(u64, warps, 32);
  SHARED(u64, found, 3);
  int per_warp = (vocab + blockDim.x - 1) / blockDim.x * 32, begin = (threadIdx.x >> 5) * per_warp;
  grid_dependency_wait();
  traced.ready();
  grid_launch_dependents();
  uint32_t r = blockIdx.x, sequence = pos[r] / (uint32_t)max_seq;
  params += sequence * SAMPLE_PARAMS, mask += (int64_t)sequence * ((vocab + 31) / 32);
  history += (int64_t)sequence * vocab, bias += (int64_t)sequence * vocab;
  y += (int64_t)r * vocab, logits += (int64_t)r * vocab;
  Row row = {y, begin, min(begin + per_warp, vocab), bins_lo, bins_hi, warps, found};

  // Steps 1 and 2. A thread writes the y that it reads later, so no barrier is needed for y.
  u64 best = 0;
  for (int i = row.begin + (threadIdx.x & 31); i < row.end; i += 32) {
    float v = adjust(params, mask, i, logits[i], bias[i], history[i]);
    y[i] = v;
    best = max(best, candidate(v, i));
  }
  best = block_max(best, warps);
  int chosen = candidate_id(best);
  float largest = candidate_value(best), temperature = __uint_as_float(params[TEMPERATURE]);

  if (temperature > 0.f && fabsf(largest) < INFINITY) {
    // Step 3. Kept are the keys above `threshold`, and of those equal to it the ids below `tie_end`.
    uint32_t threshold = 0;
    int tie_end = 0;
    auto weight = [&](float v) { return exp_weight(__fdiv_rn(__fsub_rn(v, largest), temperature)); };
    auto kept = [&](int i, float v) {
      uint32_t key = order_key(v);
      return key > threshold || (key == threshold && i < tie_end);
    };
    // Keeps the lowest ids of the threshold's key: the first `n` where `n` is less than all `ties` of them.
    auto keep_ties = [&](uint32_t key, u64 n, u64 ties) {
      auto is_tie = [&](int, float v) -> u64 { return order_key(v) == key; };
      threshold = key, tie_end = vocab;
      if (n < ties) {
        row.sum(is_tie);
        tie_end = row.first_above(is_tie, n - 1) + 1;
      }
    };
    u64 above, at;
    uint32_t top_k = params[TOP_K];
    if (top_k > 0 && top_k < (uint32_t)vocab) {
      uint32_t key = row.select([&](int, float) -> u64 { return 1; }, top_k, above, at);
      keep_ties(key, top_k - above, at);
    }
    float top_p = __uint_as_float(params[TOP_P]);
    if (top_p < 1.f) {
      auto kept_weight = [&](int i, float v) -> u64 { return kept(i, v) ? weight(v) : 0; };
      u64 target = max(share_of(top_p, row.sum(kept_weight)), 1ull);
      uint32_t key = row.select(kept_weight, target, above, at);
      u64 w = weight(order_value(key));  // not 0: the sum reached the target at this key
      u64 n = (target - above + w - 1) / w, ties = at / w;
      // with top_k's threshold, `ties` counts those that top_k kept
      if (key != threshold || n < ties) keep_ties(key, n, ties);
    }
    // Step 4.
    u64 cut = share_of(__uint_as_float(params[MIN_P]), 1ull << 40);
    auto drawn = [&](int i, float v) -> u64 {
      u64 w = kept(i, v) ? weight(v) : 0;
      return w >= cut ? w : 0;
    };
    u64 random = philox(params[SEED_LO], params[SEED_HI], params[DRAWS]);
    u64 total = row.sum(drawn);
    chosen = row.first_above(drawn, __umul64hi(random, total));
  }
  if (r == 0 && threadIdx.x < 4) y[threadIdx.x] = 0.f;  // which this thread alone has read
  if (threadIdx.x == 0) {  // the barriers of block_max are behind all reads of params and history
    token[r] = chosen;
    pos[r] += 1;
    params[DRAWS] += 1;
    history[chosen] += 1;
    post(ring, serial, sequence, chosen);
  }
}
EXPORT_KERNEL(sample_f32)
