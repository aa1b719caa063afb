// engine.h - what the emulation's own files share. Never seen by kernels.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>
#include "emulated_engine.h"
namespace emu {
constexpr size_t SHARED_SLOT = 512 << 10, SHARED_DYN = 64 << 10;  // a block's shared memory: statics first, dynamic part from 64 KiB
constexpr size_t STACK = (128 << 10) + 1088, RED_ZONE = 512;  // not a power of two: the stacks' tops spread over the cache's sets
constexpr unsigned MAX_THREADS = 1024, EARLY_BLOCKS = 64;

// --- shadow memory, per 2 bytes: one state byte, and one cell that only kernels' accesses touch.
// An access is packed as seq:32 | clock:19 | atomic:1 | bytes:2 | thread:10. seq names a block's run, clock counts its warp's sync points.
enum : uint8_t { ALLOC = 1, INIT = 2, ASYNC = 4 };
struct Cell { uint64_t w, r0, r1; };
extern char* dev; extern uint8_t* dev_state; extern Cell* dev_cell; extern size_t dev_size;

// --- happens-before knowledge about other blocks of the same launch, passed on by release/acquire
struct Know { uint32_t clk[32] = {}; std::map<uint16_t, uint32_t> thread; };
using KnownSet = std::map<uint32_t, Know>;  // by seq
using Known = std::shared_ptr<const KnownSet>;
Known join(const Known&, const Known&);

enum State : uint8_t { READY, WARP, BAR, GRID, MBAR, PDL, DONE };
struct Async { void* dst; const void* src; unsigned n, valid; };
struct Block;
struct Fiber {
  Thread* th; void* sp; State st; Block* b; Site site; const char* op; unsigned mask; int bar;
  uint64_t* mb; uint32_t fence_clk; Known known, pending, fence_known;
  std::vector<std::vector<Async>> groups; std::vector<Async> open;
  struct Wg { float* d; uint64_t a, b; int n; }; std::vector<std::vector<Wg>> wgroups; std::vector<Wg> wopen;
};
struct Bar { int arrived = 0, want = 0, acc = 0; Site site{}; uint32_t warps = 0; uint32_t given[32] = {}; };
struct Pend { const char* op; Site site; unsigned mask, got; void* args[32]; };
struct Warp { uint32_t ready, done, used; Pend p[16]; };  // used: slots of p in use; 16 disjoint masks of two lanes at most
struct MBar { int count = 0, pending = 0; long tx = 0; unsigned phase = 0; uint32_t next[32] = {}, vc[32] = {}; };
struct Bulk { char* dst; unsigned bytes; bool tensor; TensorMap m; const char* src; uint64_t* mb; int x, y; uint64_t stamp; };
struct Static { const void* key; size_t off; };
struct Block {
  uint3 idx; std::vector<Fiber> f; char* sh; uint8_t* sstate; Cell* scell; size_t dyn_n = 0, st_top = 0; std::vector<Static> st;
  uint32_t sseq, gseq;       // names of this run for shared and for global accesses (the latter renewed by grid.sync)
  uint32_t vc[32][32];       // vc[w][o]: what warp w knows of warp o; vc[w][w] is its own clock
  uint32_t wsync[32];        // own clock at the last __syncwarp or barrier: lanes of w are ordered up to here
  uint32_t fvc[32][32];      // what warp w has fenced (__threadfence), so that an atomic may publish it
  Bar bar[16]; int bar_result[16]; int nwarps; Warp warp[32]; std::map<uint64_t*, MBar> mbar; std::vector<Bulk> bulk;
  std::vector<const void*> observed;  // global addresses this block used atomically
};
struct Arena { char* sh = nullptr; uint8_t* sstate = nullptr; Cell* scell = nullptr; char* stacks = nullptr; size_t slots = 0, nstacks = 0; std::vector<std::unique_ptr<Block>> blocks; };

struct Spec { const Kernel* k; dim3 grid, block; unsigned smem; bool cooperative, pdl; std::vector<uint64_t> args; };  // args: parameters, 16-byte aligned each
struct Launch {  // a kernel being run; it may be suspended at griddepcontrol.wait while its predecessor runs
  Spec s; std::vector<void*> params; Arena* arena = nullptr; size_t total, next = 0, live = 0; uint32_t first_seq, lo, hi = 0; bool waiting_allowed = false; size_t grid_wait = 0;
  explicit Launch(const Spec&); ~Launch();
  bool begin();   // the part before griddepcontrol.wait, with the predecessor not yet run; false: fault
  bool finish();  // everything else
  void step_seq();  // everything so far in this launch becomes ordered before what follows
 private:
  bool run_live(); void fill(size_t n);
};
struct Engine {
  void* sp = nullptr; Fiber* f = nullptr; Launch* l = nullptr; Launch* other = nullptr;  // other: a launch that overlaps with l
  const char* stacks = nullptr; size_t stack_bytes = 0;  // of l
  bool failed = false; int code = 0; std::string err; const void* pc = nullptr;
  int policy = 0; uint64_t rng = 88172645463325252ull; uint32_t seq = 1; bool spun = false; unsigned long spins = 0;
  bool check = true; std::unordered_map<const void*, Known> sync; std::vector<std::pair<const char*, size_t>> pinned; std::vector<Arena*> pool;
  uint64_t switches = 0, accesses = 0;
};
extern Engine E;
const Kernel* find_kernel(const char* name);
void init_engine();
// fibers
void wait(State s, Site site, const char* op);
void to_sched();
inline uint32_t& clock_of(Block* b, unsigned w) { return b->vc[w][w]; }
// checker
void check(const void* p, unsigned n, bool write, bool atomic = false, bool async_issue = false);
uint64_t stamp(Block* b, bool shared, unsigned bytes, bool atomic);
void set_state(const void* shared_p, size_t n, uint8_t set, uint8_t clear);
void land_write(Block* b, const void* shared_p, size_t n, uint64_t stamp);
bool land(Block* b);  // one bulk copy arrives
std::string fault_at_pc();
// device heap
void* dev_alloc(size_t n); bool dev_free(void* p); size_t dev_block(const void* p, size_t n, const char** why);  // size of the live allocation that holds [p, p+n), else 0
void dev_mark_init(void* p, size_t n); bool dev_is_init(const void* p, size_t n);
}  // namespace emu
