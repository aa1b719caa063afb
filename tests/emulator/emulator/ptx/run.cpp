// run.cpp - a warp executes a kernel. When lanes are at different instructions, those at the lowest one go first, so
// that lanes meet again where their paths join.
#include <algorithm>
#include <atomic>

#include "engine.h"
#include "ptx.h"

namespace ptx {
uint64_t lane_instructions;

emu::Site site(const Instr& in) { return {in.entry->file.c_str(), (int)in.line}; }
std::string where(const Instr& in) {
  const Entry& e = *in.entry;
  std::string r = " at " + e.file + ":" + std::to_string(in.line);
  if (in.source) r += " (" + e.source + ":" + std::to_string(in.source) + ")";
  return r + ": " + in.text;
}

// --- the registers
static void fill(uint8_t* at, uint8_t width, uint64_t value) {
  if (!width) {
    uint32_t bits = (uint32_t)value;
    memcpy(at, &bits, sizeof bits);
  }
  for (int lane = 0; lane < 32 && width; lane++) memcpy(at + lane * width, &value, width);
}
static uint32_t value_of(SpecialKind kind, unsigned which, const emu::Spec& s, const emu::Block& b, unsigned warp,
                         unsigned lane) {
  unsigned thread = warp * 32 + lane;
  auto part = [&](auto v) { return which == 0 ? v.x : which == 1 ? v.y : v.z; };
  switch (kind) {
    case TID: {
      unsigned x = thread % s.block.x, y = thread / s.block.x % s.block.y, z = thread / s.block.x / s.block.y;
      return which == 0 ? x : which == 1 ? y : z;
    }
    case NTID: return part(s.block);
    case CTAID: return part(b.idx);
    case NCTAID: return part(s.grid);
    case LANE: return lane;
    case WARP: return warp;
    case WARPS: return (unsigned)b.nwarps;
    case MASK_EQ: return 1u << lane;
    case MASK_LT: return (1u << lane) - 1;
    case MASK_LE: return (2u << lane) - 1;
    case MASK_GT: return ~((2u << lane) - 1);
    case MASK_GE: return ~((1u << lane) - 1);
    case PARAM: break;
  }
  return 0;
}
void Warp::begin(const emu::Spec& s, emu::Block* b, unsigned w) {
  block = b;
  index = w;
  entry = s.k->entry;
  params = (const char*)s.args.data();
  storage.resize(entry->file_bytes / 8 + 8);
  memset(storage.data(), 0xff, storage.size() * 8);  // what was never written is NaN
  registers = (uint8_t*)(((uintptr_t)storage.data() + 63) & ~(uintptr_t)63);
  for (auto& c : entry->constants) fill(registers + c.at, c.width, c.value);
  for (auto& x : entry->specials) {
    if (x.kind == PARAM) {
      fill(registers + x.at, 8, (uint64_t)(params + x.which));
      continue;
    }
    uint32_t* lanes = (uint32_t*)(registers + x.at);
    for (unsigned lane = 0; lane < 32; lane++) lanes[lane] = value_of(x.kind, x.which, s, *b, w, lane);
  }
  exists = (uint32_t)((1ull << std::min<size_t>(32, b->f.size() - w * 32)) - 1);
  memset(pc, 0, sizeof pc);
  steps = 0;
}
void Warp::as(int lane) {
  emu::E.f = &block->f[index * 32 + lane];
  emu::now.thread = emu::E.f->th;
}

// --- lanes that meet
// The lanes in `on` have come to an instruction that all lanes of a mask carry out together. Carries it out for each
// mask whose lanes are all there; the others wait. False: somebody waits.
bool Warp::meet(const Instr& in, uint32_t at, uint32_t on) {
  emu::Warp& state = block->warp[index];
  auto mask_of = [&](int lane) { return in.kind == ALIGNED ? exists : reg<uint32_t>(in.op[in.n - 1])[lane]; };
  bool all = true;
  for (uint32_t rest = on; rest;) {
    int lane = __builtin_ctz(rest);
    uint32_t mask = mask_of(lane), mine = 0, here = 0;
    as(lane);
    if (mask & ~exists) emu::fail("mask %08x names lanes beyond the block", mask);
    if (!(mask >> lane & 1)) emu::fail("mask %08x does not name the calling lane %d", mask, lane);
    if (mask & state.done) emu::fail("mask %08x names lanes that have exited (%08x)", mask, mask & state.done);
    for (uint32_t m = mask; m; m &= m - 1) {
      int other = __builtin_ctz(m);
      emu::Fiber& f = block->f[index * 32 + other];
      bool arrives = on >> other & 1, waits = f.st == emu::WARP && pc[other] == at;
      if (!arrives && !waits) continue;
      if (mask_of(other) != mask)
        emu::fail("lanes %d and %d have different masks: %08x, %08x", lane, other, mask, mask_of(other));
      here |= 1u << other;
      mine |= (uint32_t)arrives << other;
    }
    rest &= ~mine;
    if (here == mask) {
      for (uint32_t m = mask; m; m &= m - 1) {
        block->f[index * 32 + __builtin_ctz(m)].st = emu::READY;
        pc[__builtin_ctz(m)] = at + 1;
      }
      state.ready |= mask;
      emu::E.spins = 0;
      in.run(*this, in, mask);
      all &= mask == on;
      continue;
    }
    all = false;
    for (uint32_t m = mine; m; m &= m - 1) {
      emu::Fiber& f = block->f[index * 32 + __builtin_ctz(m)];
      f.st = emu::WARP;
      pc[__builtin_ctz(m)] = at;
      f.site = site(in);
      f.op = in.text.c_str();
      f.mask = mask;
    }
    state.ready &= ~mine;
  }
  return all;
}
void Warp::leave(uint32_t lanes) {
  emu::Warp& state = block->warp[index];
  for (uint32_t m = lanes; m; m &= m - 1) {
    int lane = __builtin_ctz(m);
    emu::Fiber& f = block->f[index * 32 + lane];
    if (f.async.open()) {
      as(lane);
      emu::fail("thread exits with an asynchronous copy not waited for");
    }
    f.st = emu::DONE;
  }
  state.ready &= ~lanes;
  state.done |= lanes;
  emu::E.spins = 0;
}

// --- the loop
void Warp::go() {
  emu::Warp& state = block->warp[index];
  const Instr* code = entry->code.data();
  while (state.ready) {
    // the lanes that are at the lowest place; while somebody polls, those at any place
    uint32_t at = ~0u, limit = ~0u, lanes = 0;
    for (uint32_t m = state.ready; m; m &= m - 1) at = std::min(at, pc[__builtin_ctz(m)]);
    if (emu::E.spins) at = pc[emu::pick(state.ready)];
    for (uint32_t m = state.ready; m; m &= m - 1) {
      int lane = __builtin_ctz(m);
      if (pc[lane] == at) {
        lanes |= 1u << lane;
      } else {
        limit = std::min(limit, pc[lane]);
      }
    }
    as(__builtin_ctz(lanes));  // for a fault of an instruction that is nobody's in particular
    auto stop = [&](uint32_t which, uint32_t place) {
      for (; which; which &= which - 1) pc[__builtin_ctz(which)] = place;
    };
    for (bool together = true; together;) {
      const Instr& in = code[at];
      emu::E.at = &in;
      uint32_t on = lanes;
      if (in.guarded) on &= *(uint32_t*)(registers + in.guard) ^ -(uint32_t)in.unless;
      if (on) std::atomic_ref(in.ran).store(true, std::memory_order_relaxed);  // other threads run it too
      emu::E.lane_instructions += (uint64_t)__builtin_popcount(on);
      if (++steps > emu::settings.most_steps) {
        as(__builtin_ctz(lanes));
        emu::fail("spin-wait without progress, or a loop without an end: %lu instructions", (unsigned long)steps);
      }
      switch (in.kind) {
        case PLAIN:
          if (on) in.run(*this, in, on);
          at++;
          break;
        case BRANCH: {
          uint32_t target = (uint32_t)in.op[0].number;
          if (on == lanes) {
            at = target;
          } else if (!on) {
            at++;
          } else {
            stop(on, target), stop(lanes & ~on, at + 1);
            together = false;
          }
          break;
        }
        case SWITCH:
          stop(lanes & ~on, at + 1);
          for (uint32_t m = on; m; m &= m - 1) {
            int lane = __builtin_ctz(m);
            uint32_t i = reg<uint32_t>(in.op[0])[lane];
            as(lane);
            if (i >= in.n - 1u) emu::fail("brx.idx %u of %d targets", i, in.n - 1);
            pc[lane] = (uint32_t)in.op[1 + i].number;
          }
          together = false;
          break;
        case EXIT:
          leave(on);
          lanes &= ~on;
          at++;
          if (!lanes) together = false;
          break;
        case SUSPEND:
        case POLL:
          stop(lanes, ++at);
          if (on) in.run(*this, in, on);
          together = (state.ready & lanes) == lanes && !emu::E.spun;
          break;
        case ALIGNED:
        case MASKED:
          stop(lanes & ~on, at + 1);
          if (on && (!meet(in, at, on) || on != lanes)) together = false;
          at++;
          together = together && (state.ready & lanes) == lanes;
          break;
      }
      if (together && at >= limit) {
        stop(lanes, at);
        together = false;
      }
      if (emu::E.spun) return;
    }
  }
}
void run(emu::Block* b, int warp) {
  emu::now.block = b->idx;
  try {
    b->compiled[warp].go();
  } catch (const emu::Fault&) {
  }
  emu::E.at = nullptr;
}
}  // namespace ptx
