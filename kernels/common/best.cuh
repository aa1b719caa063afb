// best.cuh - the largest logit of a row that many blocks look at.
#pragma once
#include "order.cuh"
#include "tiles.h"

// In scratch, one for each row. All of it is 0 between ops.
struct Best {
  uint32_t arrived, zero;
  u64 best;  // of all that was offered; see candidate()

  // For one thread of a block.
  DEV void offer(u64 c) { atomicMax(&best, c); }

  // For one thread of each of `blocks` blocks, which has everything behind it that its block is to do: whether the others have
  // too. What they did is visible to the one that is the last.
  DEV bool is_last(uint32_t blocks) {
    if (atomic_add_acq_rel(&arrived, 1u) + 1 != blocks) return false;
    arrived = 0;
    return true;
  }

  // The best, for the last block.
  DEV u64 take() { return atomicExch(&best, (u64)0); }
};
static_assert(sizeof(Best) == 4 * BEST_WORDS, "words of scratch a row");
