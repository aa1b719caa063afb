// space.h - addresses: where in memory the operand of a lane is.
#pragma once
#include "engine.h"
#include "ptx.h"

namespace ptx {
enum Space : uint32_t { GENERIC, GLOBAL, SHARED, LOCAL };

inline uint64_t address(Warp& w, const Operand& a, int lane) {
  if (a.width == 8) return w.reg<uint64_t>(a)[lane] + a.number;
  return (uint32_t)(w.reg<uint32_t>(a)[lane] + a.number);  // of shared memory; it wraps
}
inline char* local_memory(Warp& w, int lane) { return (char*)w.block->f[w.index * 32 + lane].th - (64 << 10); }
// Where the n bytes at an operand are, for the lane that Warp::as has made the current one. Faults on an address that
// is not of the space, or not a multiple of n.
inline char* place(Warp& w, const Operand& a, int lane, Space space, unsigned n) {
  uint64_t at = address(w, a, lane);
  if (at & (n - 1)) emu::fail("misaligned %u-byte access at %#lx", n, at);
  if (space == SHARED) {
    if (at < emu::SHARED_SLOT) return w.block->sh + at;
    emu::fail("%#lx is no address of the shared window (a generic address needs cvta.to.shared)", at);
  }
  if (space == LOCAL) {
    if (at < w.entry->local_bytes && n <= w.entry->local_bytes - at) return local_memory(w, lane) + at;
    emu::fail("out-of-bounds local access of %u bytes at %#lx (of %u bytes)", n, at, w.entry->local_bytes);
  }
  if (space == GLOBAL && at - (uint64_t)w.block->sh < emu::SHARED_SLOT) {
    emu::fail("%#lx is shared memory, accessed as global", at);
  }
  uint64_t own = at - (uint64_t)local_memory(w, lane);
  if (at - (uint64_t)emu::E.stacks < emu::E.stack_bytes &&
      (space == GLOBAL || own >= w.entry->local_bytes || n > w.entry->local_bytes - own)) {
    emu::fail("out-of-bounds access of %u bytes at %#lx: no memory of this thread", n, at);
  }
  return (char*)at;
}
inline bool remove(Parts& parts, const char* part) {  // the first, if it is that
  if (parts.empty() || parts[0] != part) return false;
  parts.erase(parts.begin());
  return true;
}
inline bool remove_space(Parts& parts, Space& space) {
  space = GENERIC;
  if (remove(parts, "global"))
    space = GLOBAL;
  else if (remove(parts, "shared") || remove(parts, "shared::cta"))
    space = SHARED;
  else if (remove(parts, "local"))
    space = LOCAL;
  else
    return false;
  return true;
}
enum Scope { CTA, DEVICE };  // whom an access is ordered for: its block; at least other blocks too
inline bool remove_scope(Parts& p, Scope& scope) {
  scope = DEVICE;
  if (remove(p, "cta")) return scope = CTA, true;
  return remove(p, "gpu") || remove(p, "sys") || remove(p, "cluster");
}
}  // namespace ptx
