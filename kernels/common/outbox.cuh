// outbox.cuh - the tokens that a step has chosen: which of them count, and how they get to the host and into the next step.
#pragma once
#include "device.cuh"
#include "tiles.h"

// Rows of one sequence that are side by side are guesses: each but the first has computed a guess of the token that the row before
// it chooses. This is the first of the rows of row r's sequence.
DEV int first_row(const uint32_t* pos, int r, int max_seq) {
  uint32_t sequence = pos[r] / (uint32_t)max_seq;
  while (r > 0 && pos[r - 1] / (uint32_t)max_seq == sequence) r--;
  return r;
}

// What becomes of a row's token.
struct Fed {
  uint32_t sequence;
  bool counts;  // every guess of its sequence up to its own is right
  int before;   // rows of its sequence that come before it
  bool is_last; // it is the last of its sequence that counts
};

// Called by a full warp when the tokens of all rows are chosen, where lane r has that of row r; there are at most 32 rows. Where row
// r counts, token[r] becomes the token and pos[r] goes on by one, and the host gets the token: it polls page-locked memory, so the
// stream has neither a copy nor an event. Each sequence has a serial number and a ring of its own. Its token n (from 0 on, as
// serial[sequence] says) goes to word n % OUTBOX of the ring, with n + 1 in its high half: a host that knows how many it has taken
// can tell a new word from an old one, and from none.
DEV Fed feed_back(uint32_t* token, uint32_t* pos, uint32_t* serial, unsigned long long* rings, int rows, int max_seq,
                  uint32_t chosen) {
  constexpr uint32_t ALL_LANES = 0xffffffffu;
  int r = threadIdx.x & 31;
  bool is_row = r < rows;
  uint32_t place = is_row ? pos[r] : 0, guess = is_row ? token[r] : 0;
  Fed fed;
  fed.sequence = place / (uint32_t)max_seq;
  uint32_t sequence_before = __shfl_up_sync(ALL_LANES, fed.sequence, 1), chosen_before = __shfl_up_sync(ALL_LANES, chosen, 1);
  bool follows = is_row && r > 0 && sequence_before == fed.sequence;
  uint32_t firsts = __ballot_sync(ALL_LANES, is_row && !follows);
  uint32_t wrong = __ballot_sync(ALL_LANES, follows && guess != chosen_before), upto = ALL_LANES >> (31 - r);
  int first = 31 - __clz(firsts & upto);
  fed.counts = is_row && !((wrong & upto) >> first);
  fed.before = r - first;
  uint32_t counting = __ballot_sync(ALL_LANES, fed.counts);
  fed.is_last = fed.counts && !((counting & ~firsts) >> r >> 1 & 1);
  uint32_t n = fed.counts ? serial[fed.sequence] + fed.before : 0;
  __syncwarp();  // all have read the serial numbers
  if (fed.counts) {
    st_host(rings + fed.sequence * OUTBOX + n % OUTBOX, (unsigned long long)(n + 1) << 32 | chosen);
    token[r] = chosen;
    pos[r] = place + 1;
  }
  if (fed.is_last) serial[fed.sequence] = n + 1;
  return fed;
}
