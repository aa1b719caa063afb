// trace.cuh - when and where each block of a kernel ran, for `aoji bench --timeline`.
//
// A kernel of a decode step has `Span* trace` as its last parameter and `Traced traced(trace);` as its first statement;
// each grid_dependency_wait() is followed by `traced.ready();`. When trace is null, as it is but in a traced run, all that
// is left are branches that every thread takes alike: no barrier, no memory access, no register that stays alive.
#pragma once
#include "device.cuh"

// One block's run, in nanoseconds of the device's clock. All multiprocessors share it, and it may advance in steps
// (`aoji bench --timeline` says in which).
struct Span {
  unsigned long long begin;  // thread 0 starts
  unsigned long long ready;  // thread 0 knows that what the kernel depends on is done; `begin` where it does not wait
  unsigned long long end;    // thread 0 is done; see Traced
  unsigned sm, pad;          // the multiprocessor
};

// Notes the span of this block at trace[block_id()]; an early return is an end like any other.
//
// Only thread 0 looks at the clock: a barrier to find the last thread would change what is measured. So `end` is a lower
// bound: other warps may still work, and stores, its own too, may be on their way. It is close where thread 0 takes
// part in the last step, behind a barrier, and early by the lag of the slowest warp elsewhere. So the spans show an
// idle gap between two kernels at its longest, and a multiprocessor's busy time at its shortest.
class Traced {
  Span* trace;
  DEV bool notes() const { return trace && threadIdx.x == 0; }

 public:
  DEV explicit Traced(Span* trace) : trace(trace) {
    if (!notes()) return;
    Span& s = trace[block_id()];
    s.begin = s.ready = global_timer_ns();
  }
  DEV void ready() const {
    if (notes()) trace[block_id()].ready = global_timer_ns();
  }
  DEV ~Traced() {
    if (!notes()) return;
    Span& s = trace[block_id()];
    s.end = global_timer_ns(), s.sm = sm_id();
  }
  Traced(const Traced&) = delete;
};
