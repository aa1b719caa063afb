// emulated_warp.h - barriers, shuffles, votes, reductions and atomics.
#pragma once
#include "emulated_engine.h"

inline void __syncthreads(EMU_SITE) { emu::bar_sync(0, -1, EMU_AT); }
inline int __syncthreads_count(int p, EMU_SITE) { return emu::bar_reduce(p != 0, emu::COUNT, EMU_AT); }
inline int __syncthreads_or(int p, EMU_SITE) { return emu::bar_reduce(p != 0, emu::OR, EMU_AT); }
inline int __syncthreads_and(int p, EMU_SITE) { return emu::bar_reduce(p != 0, emu::AND, EMU_AT); }
inline void __syncwarp(unsigned m = 0xffffffffu, EMU_SITE) {
  emu::warp_op("syncwarp", m, EMU_AT, nullptr, nullptr, true);
}
inline unsigned __activemask() { emu::fail("__activemask depends on the schedule: pass explicit masks"); }
inline void __threadfence() { emu::fence(); }
inline void __threadfence_block() {}  // block scope: order between warps of a block comes from barriers only
inline void __nanosleep(unsigned) { emu::spin(); }
inline void __trap() {
  emu::here();
  emu::fail("trap");
}

// --- shuffles: any type of 4 or 8 bytes, as in CUDA
namespace emu {
template <class T> struct Shuffle {
  T in, out;
  int src;
};
template <class T> EMU_PLAIN inline T shuffle(const char* op, unsigned mask, T v, int src, Site s) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles take 32 or 64 bits");
  Shuffle<T> a{v, v, src};
  auto all = [](unsigned m, void* const* p) EMU_PLAIN {
    for (int i = 0; i < 32; i++) {
      if (!(m >> i & 1)) continue;
      auto* t = (Shuffle<T>*)p[i];
      if (!(m >> t->src & 1)) fail("shuffle reads lane %d which is not in mask %08x (lane %d)", t->src, m, i);
      t->out = ((Shuffle<T>*)p[t->src])->in;
    }
  };
  warp_op(op, mask, s, all, &a);
  return a.out;
}
}  // namespace emu
template <class T> inline T __shfl_sync(unsigned m, T v, int src, int width = 32, EMU_SITE) {
  int first = emu::now.thread->lane & ~(width - 1);
  return emu::shuffle("shfl", m, v, first | (src & (width - 1)), EMU_AT);
}
template <class T> inline T __shfl_xor_sync(unsigned m, T v, int x, int width = 32, EMU_SITE) {
  int lane = emu::now.thread->lane, src = lane ^ x;
  return emu::shuffle("shfl.xor", m, v, (src & ~(width - 1)) > lane ? lane : src & 31, EMU_AT);
}
template <class T> inline T __shfl_down_sync(unsigned m, T v, int d, int width = 32, EMU_SITE) {
  int lane = emu::now.thread->lane, src = lane + d;
  return emu::shuffle("shfl.down", m, v, (src ^ lane) & ~(width - 1) ? lane : src, EMU_AT);
}
template <class T> inline T __shfl_up_sync(unsigned m, T v, int d, int width = 32, EMU_SITE) {
  int lane = emu::now.thread->lane, src = lane - d;
  return emu::shuffle("shfl.up", m, v, src < 0 || (src ^ lane) & ~(width - 1) ? lane : src, EMU_AT);
}

// --- votes and reductions
namespace emu {
template <class T> struct Reduce {
  T in, out;
};
template <class T, class F> EMU_PLAIN inline T reduce(const char* op, unsigned mask, T v, Site s) {  // F: stateless
  Reduce<T> a{v, v};
  auto all = [](unsigned m, void* const* p) EMU_PLAIN {
    T r = ((Reduce<T>*)p[__builtin_ctz(m)])->in;
    for (unsigned rest = m & (m - 1); rest; rest &= rest - 1) r = F()(r, ((Reduce<T>*)p[__builtin_ctz(rest)])->in);
    for (unsigned rest = m; rest; rest &= rest - 1) ((Reduce<T>*)p[__builtin_ctz(rest)])->out = r;
  };
  warp_op(op, mask, s, all, &a);
  return a.out;
}
struct Add {
  template <class T> T operator()(T a, T b) { return a + b; }
};
struct Min {
  template <class T> T operator()(T a, T b) { return b < a ? b : a; }
};
struct Max {
  template <class T> T operator()(T a, T b) { return a < b ? b : a; }
};
struct Or {
  template <class T> T operator()(T a, T b) { return a | b; }
};
struct Xor {
  template <class T> T operator()(T a, T b) { return a ^ b; }
};
struct And {
  template <class T> T operator()(T a, T b) { return a & b; }
};
template <class T> struct Match {
  T in;
  unsigned out;
};
}  // namespace emu
inline unsigned __ballot_sync(unsigned m, int p, EMU_SITE) {
  return emu::reduce<unsigned, emu::Or>("ballot", m, p ? 1u << emu::now.thread->lane : 0, EMU_AT);
}
inline int __any_sync(unsigned m, int p, EMU_SITE) { return emu::reduce<int, emu::Or>("any", m, p != 0, EMU_AT); }
inline int __all_sync(unsigned m, int p, EMU_SITE) { return emu::reduce<int, emu::And>("all", m, p != 0, EMU_AT); }

// The lanes of m that hold the same value (sm_70 and later).
template <class T> EMU_PLAIN inline unsigned __match_any_sync(unsigned m, T v, EMU_SITE) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "match takes 32 or 64 bits");
  emu::Match<T> a{v, 0};
  auto all = [](unsigned m, void* const* p) EMU_PLAIN {
    for (unsigned i = m; i; i &= i - 1) {
      auto* mine = (emu::Match<T>*)p[__builtin_ctz(i)];
      for (unsigned j = m; j; j &= j - 1) {
        unsigned lane = __builtin_ctz(j);
        if (!memcmp(&((emu::Match<T>*)p[lane])->in, &mine->in, sizeof(T))) mine->out |= 1u << lane;
      }
    }
  };
  emu::warp_op("match.any", m, EMU_AT, all, &a);
  return a.out;
}

#define EMU_REDUX(T, name, F)                                    \
  inline T __reduce_##name##_sync(unsigned m, T v, EMU_SITE) {   \
    return emu::reduce<T, emu::F>("redux." #name, m, v, EMU_AT); \
  }
EMU_REDUX(int, add, Add)
EMU_REDUX(unsigned, add, Add)
EMU_REDUX(int, min, Min)
EMU_REDUX(unsigned, min, Min)
EMU_REDUX(int, max, Max)
EMU_REDUX(unsigned, max, Max)
EMU_REDUX(unsigned, or, Or)
EMU_REDUX(unsigned, xor, Xor)
EMU_REDUX(unsigned, and, And)
#undef EMU_REDUX

// --- atomics: CUDA's overloads and no others; relaxed, as there
namespace emu {
template <class T, class F> EMU_INLINE T atomic(T* p, F f, Order o) {
  atomic_begin(p, sizeof(T), o, true, true);
  T old, now;
  copy(&old, p, sizeof(T));
  now = f(old);
  copy(p, &now, sizeof(T));
  yield();
  return old;
}
}  // namespace emu
#define EMU_ATOMIC(name, T, expression)                                        \
  EMU_INLINE T name(T* p, T v) {                                               \
    return emu::atomic(p, [v](T o) -> T { return expression; }, emu::RELAXED); \
  }
EMU_ATOMIC(atomicAdd, int, (int)((unsigned)o + (unsigned)v))
EMU_ATOMIC(atomicAdd, unsigned, o + v)
EMU_ATOMIC(atomicAdd, unsigned long long, o + v)
EMU_ATOMIC(atomicAdd, float, o + v)
EMU_ATOMIC(atomicAdd, double, o + v)
EMU_ATOMIC(atomicSub, int, (int)((unsigned)o - (unsigned)v))
EMU_ATOMIC(atomicSub, unsigned, o - v)
EMU_ATOMIC(atomicInc, unsigned, o >= v ? 0 : o + 1)
#define EMU_ATOMIC_INTEGER(T)                                                    \
  EMU_ATOMIC(atomicMax, T, o < v ? v : o)                                        \
  EMU_ATOMIC(atomicMin, T, v < o ? v : o)                                        \
  EMU_ATOMIC(atomicAnd, T, o& v)                                                 \
  EMU_ATOMIC(atomicOr, T, o | v)                                                 \
  EMU_ATOMIC(atomicXor, T, o ^ v)                                                \
  EMU_ATOMIC(atomicExch, T, (void(o), v))                                        \
  EMU_INLINE T atomicCAS(T* p, T c, T v) {                                       \
    return emu::atomic(p, [c, v](T o) { return o == c ? v : o; }, emu::RELAXED); \
  }
EMU_ATOMIC_INTEGER(int)
EMU_ATOMIC_INTEGER(unsigned)
EMU_ATOMIC_INTEGER(unsigned long long)
EMU_ATOMIC(atomicMax, long long, o < v ? v : o)
EMU_ATOMIC(atomicMin, long long, v < o ? v : o)
EMU_ATOMIC(atomicExch, float, (void(o), v))
#undef EMU_ATOMIC_INTEGER
#undef EMU_ATOMIC
