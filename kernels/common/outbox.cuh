// outbox.cuh - chosen tokens on their way to the host, which polls page-locked memory: no copy and no event in the stream.
#pragma once
#include "device.cuh"
#include "tiles.h"

// Token n (from 0 on, as *serial says) goes to word n % OUTBOX of the ring, with n + 1 in its high half: a host that knows
// how many it has taken can tell a new word from an old one, and from none. Called by one thread.
DEV void post(unsigned long long* ring, uint32_t* serial, uint32_t token) {
  uint32_t n = *serial;
  *serial = n + 1;
  st_host(ring + n % OUTBOX, (unsigned long long)(n + 1) << 32 | token);
}
