// engine.h - what the emulator's own files share. Kernels never see it.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulated_engine.h"
#include "ptx/ptx.h"

namespace emu {
// A block's shared memory: static arrays first, the dynamic part from 64 KiB.
constexpr size_t SHARED_SLOT = 512 << 10, SHARED_DYN = 64 << 10;
// Not a power of two: the stacks' tops spread over the cache's sets.
constexpr size_t STACK = (128 << 10) + 1088;
constexpr size_t RED_ZONE = 512;
constexpr unsigned MAX_THREADS = 1024;

// --- shadow memory. An access is packed as seq:32 | clock:19 | atomic:1 | bytes:2 | thread:10. seq names a block's
// run, clock counts its warp's sync points, bytes says which of a cell's two, or 0 for both by an atomic access whose
// scope is no more than its block. Most memory is only ever accessed in pieces of 16 bytes: one cell stands
// for them until a smaller access comes.
enum : uint8_t { ALLOC = 1, INIT = 2, ASYNC = 4 };
enum Grain : uint8_t { G16 = 0, G4 = 1, G2 = 2 };  // what one cell stands for, of the 16 bytes it belongs to
struct Cell {
  uint64_t w, r0, r1;  // the last write, and the last reads by two different threads since
};
struct Shadow {
  uint8_t* state = nullptr;  // per 2 bytes
  Grain* grain = nullptr;    // per 16 bytes
  Cell* coarse = nullptr;    // per 16 bytes
  Cell* fine = nullptr;      // per 2 bytes; with G4 every other one is used

  bool reserve(size_t bytes);  // address space, zero until it is touched; false: there is none
  void release(size_t bytes);
  void clear(size_t offset, size_t n);
  Shadow at(size_t offset) const {
    return {state + offset / 2, grain + offset / 16, coarse + offset / 16, fine + offset / 2};
  }
};
void* reserve_pages(size_t n);  // nullptr: no address space
extern char* dev;
extern size_t dev_size;
extern Shadow dev_shadow;

// --- happens-before knowledge about other blocks of the same launch, passed on by release and acquire
struct Know {
  uint32_t clk[32] = {};
  std::map<uint16_t, uint32_t> thread;
};
using KnownSet = std::map<uint32_t, Know>;  // by seq
using Known = std::shared_ptr<const KnownSet>;
Known join(const Known&, const Known&);
using Released = std::unordered_map<const void*, Known>;  // what was released at an address

// --- a CUDA thread
enum State : uint8_t { READY, WARP, BAR, GRID, MBAR, PDL, DONE };
struct Async {  // a cp.async
  void* dst;
  const void* src;
  unsigned n, valid;
};
struct Asyncs {  // those of a thread, in the order of their issue
  std::vector<Async> copies;
  std::vector<size_t> ends;     // of its groups: where the next one begins in copies
  size_t waited = 0, done = 0;  // groups and copies that have landed
  bool open() const { return copies.size() > (ends.empty() ? 0 : ends.back()); }  // is there a copy of no group yet?
  void clear() {
    copies.clear();
    ends.clear();
    waited = done = 0;
  }
};
struct Wgmma {
  float* d;
  uint64_t a, b;
  int n;
};
struct Block;
struct Fiber {
  Thread* th;
  void* sp;
  State st;
  Block* b;
  Site site;  // where it waits, and for what
  const char* op;
  unsigned mask;
  int bar;
  uint64_t* mb;
  uint32_t fence_clk;                 // own clock at the last fence
  Known known, pending, fence_known;  // of other blocks: known; seen by relaxed reads; known at the last fence
  Asyncs async;
  std::vector<Wgmma> wopen;
  std::vector<std::vector<Wgmma>> wgroups;
};

// --- a block
struct Bar {
  int arrived = 0, want = 0, acc = 0;
  Site site{};
  uint32_t warps = 0;
  uint32_t given[32] = {};  // clocks of those that arrive without waiting
};
struct Pend {  // a warp operation some lanes have arrived at
  const char* op;
  Site site;
  unsigned mask, got;
  void* args[32];
};
struct Warp {
  uint32_t ready, done;
  uint32_t used;  // slots of p in use
  Pend p[16];     // sixteen disjoint masks of two lanes at most
};
struct MBar {
  int count = 0, pending = 0;
  long tx = 0;
  unsigned phase = 0;
  uint32_t next[32] = {}, vc[32] = {};  // clocks of the arrivals so far; of the last complete phase
};
struct Bulk {  // a TMA or bulk copy in flight
  char* dst;
  unsigned bytes;
  bool tensor;
  TensorMap m;
  const char* src;
  uint64_t* mb;
  int x, y;
  uint64_t stamp;
};
struct Static {
  const void* key;
  size_t off;
};
struct Block {
  uint3 idx;
  std::vector<Fiber> f;
  int nwarps;
  Warp warp[32];
  // shared memory and its shadow
  char* sh;
  Shadow shadow;
  size_t dyn_n = 0, st_top = 0;
  std::vector<Static> st;
  // clocks
  uint32_t sseq, gseq;   // this run's name for shared and for global accesses (the latter renewed by grid.sync)
  uint32_t vc[32][32];   // vc[w][o]: what warp w knows of warp o; vc[w][w] is its own clock
  uint32_t wsync[32];    // own clock at the last __syncwarp or barrier: lanes of w are ordered up to here
  uint32_t fvc[32][32];  // what warp w has fenced (__threadfence), so that an atomic may publish it
  std::vector<const void*> observed;  // global addresses this block used atomically
  // barriers and copies
  Bar bar[16];
  int bar_result[16];
  std::vector<ptx::Warp> compiled;  // the warps of a kernel that is compiled code
  std::map<uint64_t*, MBar> mbar;
  std::vector<Bulk> bulk;
};
inline uint32_t& clock_of(Block* b, unsigned w) { return b->vc[w][w]; }

// --- a launch
struct Spec {
  const Kernel* k;
  dim3 grid, block;
  unsigned smem;
  bool cooperative, pdl;
  std::vector<uint64_t> args;  // the parameters, each at a multiple of 16 bytes
};
struct Arena {  // memory for the blocks that are live at once
  char* sh = nullptr;
  Shadow shadow;
  char* stacks = nullptr;
  size_t slots = 0, nstacks = 0;
  std::vector<std::unique_ptr<Block>> blocks;
};
struct Pinned {  // page-locked host memory
  char* p;
  size_t n;
  bool registered;  // by cuMemHostRegister, so not ours to free
};
using PinnedList = std::shared_ptr<const std::vector<Pinned>>;  // never changed, only replaced: launches keep theirs
extern PinnedList pinned;
// A kernel being run; it may be suspended at griddepcontrol.wait while its predecessor runs. It is made and ends under
// the driver's lock, and runs without it, all of it on one thread of the host.
struct Launch {
  Spec s;
  std::vector<void*> params;
  Arena* arena = nullptr;
  PinnedList host = pinned;
  std::shared_ptr<Released> released;  // one for all launches that overlap
  size_t total, next = 0, live = 0;
  uint32_t first_seq;  // accesses with an older seq are ordered before this launch
  bool waiting_allowed = false;
  size_t grid_wait = 0;
  // the fault
  int code = 0;
  std::string err;

  Launch(const Spec&, const Launch* overlapping);
  ~Launch();
  bool begin();                  // the part before griddepcontrol.wait, with the predecessor not yet run; false: fault
  bool finish();                 // everything else
  void step_seq();               // everything so far in this launch becomes ordered before what follows
  uint32_t fresh_seq();          // for a block
  bool has(uint32_t seq) const;  // is it one of its blocks'?

 private:
  struct Seqs {  // [begin, end), of which those from next on are not used yet
    uint32_t begin, next, end;
  };
  std::vector<Seqs> seqs;
  void order();  // everything so far becomes ordered before what follows
  uint32_t reserve_seqs();
  bool run_live();
  bool run_ready(std::vector<std::pair<Block*, int>>& order, bool& all_done);
  bool stuck();
  void fill(size_t n);
};
std::vector<uint64_t> pack_args(const Kernel* k, void** params);
std::vector<void*> unpack_args(const Kernel* k, const std::vector<uint64_t>& args);
const Kernel* find_kernel(const char* name);

// --- the engine
enum Policy { FORWARD, REVERSE, RANDOM };
struct Settings {  // of the environment
  Policy policy = FORWARD;
  uint64_t seed = 88172645463325252ull;  // of RANDOM
  // Blocks of a dependent kernel that run ahead of its predecessor, one for each multiprocessor. All are live at once, and
  // more than a few of them do not fit into a CPU's caches.
  size_t early_blocks;
  uint64_t most_steps = 1 << 22;  // instructions of a warp of compiled code, before it counts as in an endless loop
  bool check = true;
};
extern Settings settings;
struct Engine {  // what one thread of the host runs
  void* sp;      // of the scheduler
  Fiber* f;
  Launch* l;
  Launch* other;       // a launch that overlaps with l
  const char* stacks;  // of l
  size_t stack_bytes;
  bool failed;           // l has
  const void* pc;        // of the access being checked
  const ptx::Instr* at;  // what is being carried out, of compiled code
  uint64_t rng;          // of the schedule
  bool spun;
  unsigned long spins;         // polls since anything made progress
  uint64_t lane_instructions;  // of compiled code, since they were last added to all threads'
};
extern __thread Engine E;
struct Fault {};  // thrown by fail() in compiled code, which has no stack of its own to leave
void init_engine();

// --- fibers
void wait(State s, Site site, const char* op);
void wake(Fiber& f);
void to_sched();
void resume(void** save, Fiber* f);
void entry();  // where a fiber starts
uint64_t rnd();
int pick(uint32_t lanes);
void sync_warp(Block* b, unsigned warp, unsigned mask);  // __syncwarp, when all lanes of the mask are there
void bar_arrive_warp(int id, int n_threads, Site s, int lanes);

// --- tensor cores: what one lane gives and gets
struct Mma {
  float* d;
  const uint32_t *a, *b;
};
void mma_warp(unsigned mask, void* const* lanes);
struct Ldmatrix {
  uint32_t* r;
  const uint16_t* row;
  int n;
  bool trans;
};
void ldmatrix_warp(unsigned mask, void* const* lanes);

// --- checker
void check(const void* p, unsigned n, bool write, bool atomic = false, bool async_issue = false, bool in_block = false);
uint64_t stamp(Block* b, bool shared, unsigned bytes, bool atomic);
void set_state(const void* shared_p, size_t n, uint8_t set, uint8_t clear);
void land_write(Block* b, const void* shared_p, size_t n, uint64_t stamp);

// --- shared memory addresses
constexpr int SWIZZLE_128B = 3;  // of CUtensorMapSwizzle: 0 none, 1 32 bytes, 2 64, 3 128
uint32_t swizzled(uint32_t address, int mode);
bool in_shared(const void* p);
bool land(Block* b);  // one bulk copy arrives

// --- device heap
void* dev_alloc(size_t n);
bool dev_free(void* p);
size_t dev_block(const void* p, size_t n,
                 const char** why);                        // size of the live allocation that holds [p, p + n), else 0
void dev_near(size_t offset, long& distance, long& size);  // of the allocation before an offset into the heap
void dev_mark_init(void* p, size_t n);
bool dev_is_init(const void* p, size_t n);
}  // namespace emu
