// launch.cpp - the driver API: modules, functions, occupancy, launches.
#include <algorithm>

#include "driver.h"

using namespace drv;

// --- modules: PTX is loaded; of any other image the kernels are those that are linked into this library, or that the
// build compiled to PTX
struct Module {
  std::map<std::string, std::unique_ptr<Func>> funcs;
  std::shared_ptr<ptx::Module> text = nullptr;
};
static bool is_ptx(const char* image) {
  while (isspace((unsigned char)*image)) image++;
  return !strncmp(image, "//", 2) || !strncmp(image, ".version", 8);
}
API cuModuleLoadData(void** m, const void* image) {
  LOCK;
  if (!current_context()) return INVALID_CONTEXT;
  if (!image) return INVALID_VALUE;
  auto module = std::make_unique<Module>();
  try {
    if (is_ptx((const char*)image)) {
      module->text = ptx::parse((const char*)image, "image");
      for (auto& name : ptx::entries(*module->text)) ptx::entry(*module->text, name);
    }
  } catch (const ptx::Error& e) {
    return refuse(INVALID_PTX, e.text);
  } catch (const std::bad_alloc&) {
    return refuse(OUT_OF_MEMORY, "PTX that needs more memory than there is");
  }
  *m = module.release();
  return OK;
}
API cuModuleLoadDataEx(void** m, const void* image, u32, int*, void**) { return cuModuleLoadData(m, image); }
API cuModuleUnload(void* m) {
  LOCK;
  int e = run_all();
  delete (Module*)m;
  return e;
}
// CUDA_EMULATOR_PLANT=A=B: kernel B in the place of A, for tests of what is said of a wrong kernel.
static std::string planted(const char* name) {
  const char* plant = getenv("CUDA_EMULATOR_PLANT");
  const char* by = plant ? strchr(plant, '=') : nullptr;
  return by && std::string(plant, by) == name ? by + 1 : name;
}
API cuModuleGetFunction(Func** f, Module* m, const char* name) {
  LOCK;
  if (!m || !name) return INVALID_VALUE;
  auto host = emu::find_kernel(planted(name).c_str());
  auto entry = m->text ? ptx::entry(*m->text, name) : nullptr;
  if (!(m->text ? (bool)entry : (bool)host)) {
    const char* text =
        m->text ? " is in the PTX of the module" : " is linked into the emulator (EXPORT_KERNEL missing?)";
    return refuse(NOT_FOUND, std::string("no kernel named ") + name + text);
  }
  auto& slot = m->funcs[name];
  if (!slot) slot.reset(new Func{name, m->text ? nullptr : host, entry ? &entry->kernel : nullptr, {}});
  *f = slot.get();
  return OK;
}
static bool same_parameters(const emu::Kernel& a, const emu::Kernel& b) {
  return a.nparams == b.nparams && std::equal(a.sizes, a.sizes + a.nparams, b.sizes);
}
const emu::Kernel* drv::kernel_of(Func& f, int& error) {
  if (f.own) return f.own;
  if (!code().ptx) return f.host;
  auto& k = f.ptx[code().capability];
  if (k) return k;
  try {
    auto found = &ptx::find(f.name, code().capability)->kernel;
    if (!same_parameters(*found, *f.host)) {
      throw ptx::Error{found->entry->file + ": kernel " + f.name + " has other parameters than its source"};
    }
    return k = found;
  } catch (const ptx::Error& e) {
    error = refuse(INVALID_PTX, e.text);
    return nullptr;
  }
}
API cuModuleGetGlobal_v2(Ptr*, size_t*, void*, const char*) { return NOT_FOUND; }

// --- functions
API cuFuncLoad(Func* f) { return f ? OK : INVALID_HANDLE; }  // all of them are there from the start
enum FuncAttribute { MAX_THREADS = 0, PTX_VERSION = 5, BINARY_VERSION = 6, MAX_DYNAMIC_SHARED = 8, CARVEOUT = 9 };
API cuFuncSetAttribute(Func* f, int a, int v) {
  LOCK;
  if (!f) return INVALID_HANDLE;
  if (a == MAX_DYNAMIC_SHARED) {
    if (v < 0 || v > (int)multiprocessor().shared_of_block()) return INVALID_VALUE;
    f->max_dyn = v;
  } else if (a == CARVEOUT) {
    if (v < -1 || v > 100) return INVALID_VALUE;
    f->carveout = v;
  }
  return OK;
}
API cuFuncGetAttribute(int* v, int a, Func* f) {  // registers, local and static shared memory are not known: 0
  LOCK;
  if (!f) return INVALID_HANDLE;
  switch (a) {
    case MAX_THREADS: *v = 1024; break;
    case PTX_VERSION:
    case BINARY_VERSION: *v = code().capability; break;
    case MAX_DYNAMIC_SHARED: *v = f->max_dyn; break;
    case CARVEOUT: *v = f->carveout; break;
    default: *v = 0;
  }
  return OK;
}
API cuFuncSetCacheConfig(Func*, int) { return OK; }
API cuFuncGetName(const char** n, Func* f) {
  *n = f->name.c_str();
  return OK;
}

// Bytes; of the host's code it is not known.
static size_t static_shared(const emu::Kernel& k) {
  size_t n = 0;
  for (size_t i = 0; k.entry && i < k.entry->shared.size(); i++) n += k.entry->shared[i].size;
  return n;
}

// --- occupancy, by threads and dynamic shared memory only
static int occupancy(size_t threads, size_t smem) {
  Multiprocessor sm = multiprocessor();
  if (!threads || threads > emu::MAX_THREADS || smem > sm.shared_of_block()) return 0;
  int whole_warps = (int)(threads + 31) / 32 * 32, by_smem = (int)(sm.shared / (smem + SMEM_RESERVED));
  return std::min({sm.blocks, sm.threads / whole_warps, by_smem});
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, Func*, int threads, size_t smem) {
  *n = threads < 0 ? 0 : occupancy(threads, smem);
  return OK;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, Func* f, int threads, size_t smem, u32) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessor(n, f, threads, smem);
}
API cuOccupancyMaxPotentialBlockSize(int* grid, int* block, Func*, size_t (*smem_of)(int), size_t smem, int limit) {
  int best = 0;
  *grid = *block = 0;
  for (int threads = 32; threads <= (limit > 0 ? std::min(limit, 1024) : 1024); threads += 32) {
    int blocks = occupancy(threads, smem_of ? smem_of(threads) : smem);
    if (blocks * threads >= best && blocks) best = blocks * threads, *block = threads, *grid = blocks * device.sms;
  }
  return OK;
}
API cuOccupancyMaxPotentialBlockSizeWithFlags(int* g, int* b, Func* f, size_t (*of)(int), size_t s, int limit, u32) {
  return cuOccupancyMaxPotentialBlockSize(g, b, f, of, s, limit);
}
API cuOccupancyAvailableDynamicSMemPerBlock(size_t* n, Func*, int blocks, int) {
  Multiprocessor sm = multiprocessor();
  size_t share = sm.shared / std::max(1, blocks);
  *n = std::min(sm.shared_of_block(), share > SMEM_RESERVED ? share - SMEM_RESERVED : 0);
  return OK;
}

// --- the clock and the multiprocessors that kernels see
uint64_t emu::timer() {
  static __thread uint64_t ns;
  return ns += 32;
}
unsigned emu::block_id() { return now.block.x + now.grid_dim.x * (now.block.y + now.grid_dim.y * now.block.z); }
unsigned emu::sm_id() { return block_id() % device.sms; }

// --- launches
struct Attribute {  // CUlaunchAttribute
  u32 id;
  char pad[4];
  union {
    char bytes[64];
    int i;
    struct {
      u32 x, y, z;
    } d;
  };
};
struct Config {  // CUlaunchConfig
  u32 gx, gy, gz, bx, by, bz, smem;
  void* stream;
  Attribute* attrs;
  u32 n;
};
enum LaunchAttribute { COOPERATIVE = 2, CLUSTER_DIMENSION = 4, PROGRAMMATIC_STREAM_SERIALIZATION = 6 };

struct Geometry {
  dim3 grid, block;
  u32 smem;
  bool cooperative = false, pdl = false;
};
// The parameters out of a buffer in the kernel's own layout: `extra` of a launch.
static bool unpack_extra(const emu::Kernel& k, void** extra, std::vector<void*>& params, std::string& why) {
  enum { END = 0, BUFFER = 1, SIZE = 2 };
  char* buffer = nullptr;
  size_t size = 0;
  for (; (size_t)*extra != END; extra += 2) {
    if ((size_t)*extra == BUFFER) buffer = (char*)extra[1];
    if ((size_t)*extra == SIZE) size = *(size_t*)extra[1];
  }
  if (!k.entry) return why = "`extra` is emulated for PTX only", false;
  if (!buffer || size != k.entry->param_bytes) {
    why = "a parameter buffer of " + std::to_string(size) + " bytes where the kernel (" + k.entry->file + ") has " +
          std::to_string(k.entry->param_bytes);
    return false;
  }
  for (auto& p : k.entry->params) params.push_back(buffer + p.offset);
  return true;
}
static int launch(void* stream, Func* f, const Geometry& g, void** params, void** extra) {
  if (!current_context()) return INVALID_CONTEXT;
  auto s = stream_of(stream);
  if (!s || !f) return INVALID_HANDLE;
  auto bad = [&](int code, const std::string& text) { return refuse(code, text + " launching " + f->name); };
  int error = OK;
  const emu::Kernel* k = kernel_of(*f, error);
  if (!k) return error;
  size_t threads = (size_t)g.block.x * g.block.y * g.block.z, blocks = (size_t)g.grid.x * g.grid.y * g.grid.z;
  std::vector<void*> unpacked;
  std::string why;
  if (extra && !params) {
    if (!unpack_extra(*k, extra, unpacked, why)) return bad(INVALID_VALUE, why);
    params = unpacked.data();
  }
  for (u32 i = 0; i < k->nparams; i++) {
    if (!params || !params[i])
      return bad(INVALID_VALUE, "parameter " + std::to_string(i) + " of " + std::to_string(k->nparams) + " missing");
  }
  if (!blocks || g.grid.x > 0x7fffffff || g.grid.y > 65535 || g.grid.z > 65535)
    return bad(INVALID_VALUE, "invalid grid");
  if (!threads || threads > emu::MAX_THREADS || g.block.z > 64) {
    return bad(INVALID_VALUE, "invalid block of " + std::to_string(threads) + " threads");
  }
  size_t fixed = static_shared(*k), shared = fixed + g.smem;
  if (shared > SMEM_DEFAULT && (int)g.smem > f->max_dyn - (f->max_dyn == (int)SMEM_DEFAULT ? (int)fixed : 0)) {
    const char* text = " bytes of dynamic shared memory need CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES";
    return bad(INVALID_VALUE, std::to_string(g.smem) + text);
  }
  if (shared > multiprocessor().shared_of_block()) {
    return bad(INVALID_VALUE, std::to_string(shared) +
                                  " bytes of shared memory, static and dynamic, where a block has " +
                                  std::to_string(multiprocessor().shared_of_block()));
  }
  if (g.cooperative && blocks > (size_t)occupancy(threads, g.smem) * device.sms) {
    return bad(COOPERATIVE_TOO_LARGE, "cooperative grid of " + std::to_string(blocks) + " blocks does not fit");
  }
  emu::Spec spec{k, g.grid, g.block, g.smem, g.cooperative, g.pdl, emu::pack_args(k, params)};
  return enqueue_op(*s, std::make_shared<Op>(Op{KERNEL, std::move(spec), f}));
}
API cuLaunchKernel(Func* f, u32 gx, u32 gy, u32 gz, u32 bx, u32 by, u32 bz, u32 smem, void* stream, void** params,
                   void** extra) {
  LOCK;
  return launch(stream, f, {{gx, gy, gz}, {bx, by, bz}, smem}, params, extra);
}
API cuLaunchCooperativeKernel(Func* f, u32 gx, u32 gy, u32 gz, u32 bx, u32 by, u32 bz, u32 smem, void* stream,
                              void** params) {
  LOCK;
  return launch(stream, f, {{gx, gy, gz}, {bx, by, bz}, smem, true}, params, nullptr);
}
API cuLaunchKernelEx(const Config* c, Func* f, void** params, void** extra) {
  LOCK;
  Geometry g{{c->gx, c->gy, c->gz}, {c->bx, c->by, c->bz}, c->smem};
  for (u32 i = 0; i < c->n; i++) {
    auto& a = c->attrs[i];
    if (a.id == COOPERATIVE) g.cooperative = a.i;
    if (a.id == PROGRAMMATIC_STREAM_SERIALIZATION) g.pdl = a.i;
    if (a.id != CLUSTER_DIMENSION) continue;
    bool divides = a.d.x && a.d.y && a.d.z && !(c->gx % a.d.x || c->gy % a.d.y || c->gz % a.d.z);
    if (!divides) return refuse(INVALID_VALUE, "grid is not a multiple of the cluster launching " + f->name);
  }
  return launch(c->stream, f, g, params, extra);
}
API cuLaunchHostFunc(void* stream, void (*fn)(void*), void* data) {
  LOCK;
  return enqueue(stream, HOST, [=] {
    fn(data);
    return 0;
  });
}
API cuOccupancyMaxActiveClusters(int* n, Func*, const Config* c) {
  *n = device.sms * occupancy((size_t)c->bx * c->by * c->bz, c->smem);
  for (u32 i = 0; i < c->n; i++) {
    auto& a = c->attrs[i];
    if (a.id == CLUSTER_DIMENSION) *n /= std::max(1u, a.d.x * a.d.y * a.d.z);
  }
  return OK;
}
