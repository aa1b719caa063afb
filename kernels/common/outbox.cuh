// outbox.cuh - chosen tokens on their way to the host, which polls page-locked memory: no copy and no event in the stream.
#pragma once
#include "device.cuh"
#include "tiles.h"

// Each sequence has a serial number and a ring of its own. Its token n (from 0 on, as serial[sequence] says) goes to word
// n % OUTBOX of the ring, with n + 1 in its high half: a host that knows how many it has taken can tell a new word from an
// old one, and from none. Called by one thread a sequence.
DEV void post(unsigned long long* rings, uint32_t* serial, uint32_t sequence, uint32_t token) {
  uint32_t n = serial[sequence];
  serial[sequence] = n + 1;
  st_host(rings + sequence * OUTBOX + n % OUTBOX, (unsigned long long)(n + 1) << 32 | token);
}
