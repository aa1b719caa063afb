// ptx.h - executes kernels as nvcc compiled them. The text of a module is parsed once into instructions, each of which
// has a function (text.cpp, table.cpp); a warp executes one of them for all its lanes that are at it (run.cpp).
// Accesses, barriers, copies and tensor cores are those of the host mode, with the same checks.
#pragma once
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "emulated_engine.h"

namespace emu {
struct Block;
struct Spec;
}  // namespace emu

namespace ptx {
struct Warp;
struct Instr;
using Run = void (*)(Warp&, const Instr&, uint32_t lanes);  // lanes: those that carry it out, never none

// --- instructions
enum Kind : uint8_t {
  PLAIN,
  POLL,     // a read that somebody may repeat until another thread has written: others get their turn after it
  BRANCH,   // operand 0 is the target
  SWITCH,   // brx.idx: operand 0 the index, the others the targets
  EXIT,     // ret and exit
  SUSPEND,  // may leave lanes waiting, in the instruction that follows
  ALIGNED,  // the whole warp meets here
  MASKED,   // the lanes that the last operand names meet here
};
struct Operand {
  uint32_t at = 0;    // where the register file has it
  uint8_t width = 0;  // bytes of a lane; 0: a predicate, which is one bit of a lane
  bool negated = false;
  int64_t number = 0;  // of an address what is added to the register, of a label its instruction, else an immediate
};
struct Instr {
  Run run;
  const Operand* op;
  uint16_t n;
  Kind kind;
  bool guarded = false, unless = false;  // @%p, @!%p
  uint32_t guard = 0;                    // where that is
  uint32_t x;                            // the form's own
  uint32_t line;                         // of the text
  const struct Entry* entry;
  std::string text;
  mutable bool ran = false;
  bool inlined = false;  // of inline PTX
  int source = 0;  // line of the .cu, where the text was compiled with -lineinfo
};

// How an instruction is written: what carries it out, and its operands, results before the colon. Each is one letter:
// 2 4 8  a register of so many bytes, or an immediate            b h w d  one of at least 1, 2, 4, 8 bytes
// p      a predicate        a  an address        l  a label      i        an immediate
// m      an address of a parameter
struct Form {
  Run run;
  std::string operands;
  Kind kind = PLAIN;
  uint32_t x = 0;
  Run then = nullptr;  // a second instruction with the same operands, carried out after lanes have waited in the first
};
void define(const std::string& name, Form);
using Parts = std::vector<std::string>;                                       // of a name, at its points
void define_family(const std::string& first, bool (*)(const Parts&, Form&));  // names with too many modifiers to list
std::vector<Form> forms(const std::string& name);                             // none: unknown
void integer_forms();
void float_forms();
void convert_forms();
void memory_forms();
void atomic_forms();
void warp_forms();
void async_forms();

// --- a kernel
struct Error {  // of the text: the driver's CUDA_ERROR_INVALID_PTX
  std::string text;
};
struct Param {
  unsigned offset, size;
};
struct Constant {
  uint32_t at;
  uint8_t width;
  uint64_t value;
};
enum SpecialKind { TID, NTID, CTAID, NCTAID, LANE, WARP, WARPS, MASK_EQ, MASK_LT, MASK_LE, MASK_GT, MASK_GE, PARAM };
struct Special {  // a register that is the same throughout: %tid.x, the address of a parameter
  uint32_t at;
  SpecialKind kind;
  unsigned which;  // x, y or z; the parameter's offset
};
struct SharedArray {
  unsigned offset, size;
};
struct Entry {
  std::string name, file, source;  // source: the .cu, if the text tells
  std::vector<Param> params;
  unsigned param_bytes = 0;
  std::vector<Instr> code;
  std::vector<std::unique_ptr<Operand[]>> operands;
  uint32_t file_bytes = 0;  // of the registers of a warp
  std::vector<Constant> constants;
  std::vector<Special> specials;
  std::vector<SharedArray> shared;
  unsigned shared_top = 64, local_bytes = 0;
  std::vector<unsigned> sizes;  // of the parameters, as Kernel has them
  emu::Kernel kernel{};
};

// --- modules
struct Module;
std::shared_ptr<Module> parse(std::string text, std::string file);  // throws Error
const Entry* entry(Module&, const std::string& name);  // compiles it when first asked for; nullptr: none. Throws Error
std::vector<std::string> entries(const Module&);
std::string architecture(const Module&);  // of .target: sm_90a
// The kernel as compiled for the compute capability, out of the directories that add_directory has named.
const Entry* find(const std::string& name, int capability);  // throws Error
void add_directory(const std::string& path);
std::string where(const Instr&);      // " at gemv.ptx:123: ..."
extern uint64_t lane_instructions;  // carried out in this process
// Those that were, of kernels that find() gave: file, kernel, whether it is inline PTX, and its text, each line once.
std::set<std::string> carried_out();

// --- a warp
struct Warp {
  emu::Block* block = nullptr;
  unsigned index = 0;
  const Entry* entry = nullptr;
  const char* params = nullptr;
  std::vector<uint64_t> storage;
  uint8_t* registers = nullptr;
  uint32_t exists = 0;
  uint64_t steps = 0;  // carried out so far
  uint32_t pc[32];

  void begin(const emu::Spec&, emu::Block*, unsigned index);
  void go();  // until all of its lanes wait or are done, or one polls
  template <class T> T* reg(const Operand& o) { return (T*)(registers + o.at); }
  uint32_t pred(const Operand& o) { return *(uint32_t*)(registers + o.at) ^ -(uint32_t)o.negated; }
  void set_pred(const Operand& o, uint32_t lanes, uint32_t bits) {
    uint32_t& p = *(uint32_t*)(registers + o.at);
    p = (p & ~lanes) | (bits & lanes);
  }
  uint64_t get(const Operand& o, int lane) {  // zero-extended
    uint64_t v = 0;
    memcpy(&v, registers + o.at + lane * o.width, o.width);
    return v;
  }
  void put(const Operand& o, int lane, uint64_t v) { memcpy(registers + o.at + lane * o.width, &v, o.width); }
  void as(int lane);  // what follows is that lane's doing

 private:
  bool meet(const Instr&, uint32_t pc, uint32_t on);
  void leave(uint32_t lanes);
};
void run(emu::Block*, int warp);  // Warp::go, with its fault caught
emu::Site site(const Instr&);

// --- for the instructions
template <class F> inline __attribute__((always_inline)) void each(uint32_t lanes, F f) {
  if (lanes == ~0u) {
#pragma GCC ivdep
    for (int i = 0; i < 32; i++) f(i);
  } else {
    for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
  }
}
// d = f(a, ...) in each lane.
template <auto f, class D, class A> void map1(Warp& w, const Instr& in, uint32_t lanes) {
  D* d = w.reg<D>(in.op[0]);
  const A* a = w.reg<A>(in.op[1]);
  each(lanes, [&](int i) { d[i] = f(a[i]); });
}
template <auto f, class D, class A, class B> void map2(Warp& w, const Instr& in, uint32_t lanes) {
  D* d = w.reg<D>(in.op[0]);
  const A* a = w.reg<A>(in.op[1]);
  const B* b = w.reg<B>(in.op[2]);
  each(lanes, [&](int i) { d[i] = f(a[i], b[i]); });
}
template <auto f, class D, class A, class B, class C> void map3(Warp& w, const Instr& in, uint32_t lanes) {
  D* d = w.reg<D>(in.op[0]);
  const A* a = w.reg<A>(in.op[1]);
  const B* b = w.reg<B>(in.op[2]);
  const C* c = w.reg<C>(in.op[3]);
  each(lanes, [&](int i) { d[i] = f(a[i], b[i], c[i]); });
}
template <class D, class... S> std::string operands() {  // of a Form
  std::string r = std::to_string(sizeof(D)) + ":";
  ((r += std::to_string(sizeof(S))), ...);
  return r;
}
template <auto f, class D, class A> void define1(const std::string& name) {
  define(name, {map1<f, D, A>, operands<D, A>()});
}
template <auto f, class D, class A, class B> void define2(const std::string& name) {
  define(name, {map2<f, D, A, B>, operands<D, A, B>()});
}
template <auto f, class D, class A, class B, class C> void define3(const std::string& name) {
  define(name, {map3<f, D, A, B, C>, operands<D, A, B, C>()});
}
template <class T> inline T bits_of(auto v) {
  static_assert(sizeof(T) == sizeof v);
  T r;
  memcpy(&r, &v, sizeof r);
  return r;
}
}  // namespace ptx
