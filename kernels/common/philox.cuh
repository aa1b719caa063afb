// philox.cuh - the random numbers of sampling and of dropout: functions of a counter and a key.
#pragma once
#include "device.cuh"

// Philox4x32-10 (Salmon et al. 2011) of the counter c, in place.
DEV void philox(uint32_t (&c)[4], uint32_t key0, uint32_t key1) {
  for (int i = 0; i < 10; i++) {
    uint32_t hi0 = __umulhi(c[0], 0xD2511F53u), lo0 = c[0] * 0xD2511F53u;
    uint32_t hi1 = __umulhi(c[2], 0xCD9E8D57u), lo1 = c[2] * 0xCD9E8D57u;
    c[0] = hi1 ^ c[1] ^ key0, c[1] = lo1, c[2] = hi0 ^ c[3] ^ key1, c[3] = lo0;
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
}
