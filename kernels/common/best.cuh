// best.cuh - the largest logit of a row that many blocks look at.
#pragma once
#include "order.cuh"
#include "tiles.h"

// In scratch, one for each row. All of it is 0 between ops.
struct Best {
  uint32_t arrived;  // blocks; of argmax and norm_head_argmax those of all rows, in the first row's
  uint32_t rows;     // that are chosen, in the first row's
  u64 best;          // of all that was offered; see candidate()

  // For one thread of a block.
  DEV void offer(u64 c) { atomicMax(&best, c); }

  // For one thread of each of `all` blocks, which has everything behind it that its block is to do: whether the others have
  // too. What they did is visible to the one that is the last.
  static DEV bool is_last(uint32_t& arrived, uint32_t all) {
    if (atomic_add_acq_rel(&arrived, 1u) + 1 != all) return false;
    arrived = 0;
    return true;
  }

  // The same for a full warp of each block, whose first lane has everything behind it.
  static DEV bool is_last_warp(uint32_t& arrived, uint32_t all) {
    uint32_t last = (threadIdx.x & 31) == 0 && is_last(arrived, all);
    last = __shfl_sync(0xffffffffu, last, 0);
    __syncwarp();  // what the first lane sees, all see
    return last;
  }

  // The best, for the last block.
  DEV u64 take() { return atomicExch(&best, (u64)0); }
};
static_assert(sizeof(Best) == 4 * BEST_WORDS, "words of scratch a row");
