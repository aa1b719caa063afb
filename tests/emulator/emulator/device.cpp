// device.cpp - the driver API: library, device, contexts, error texts.
#include <algorithm>
#include <cstdlib>

#include "driver.h"

using namespace drv;

namespace drv {
Device device;
static struct Context {
  int refs = 0;
} primary;

long env(const char* name, long otherwise) {
  const char* s = getenv(name);
  return s && *s ? strtol(s, nullptr, 10) : otherwise;
}
void init() {
  static bool once = [] {
    emu::init_engine();
    device.sms = std::max(1, (int)env("CUDA_EMULATOR_SM_COUNT", 4));
    emu::settings.early_blocks = device.sms;
    device.memory = (size_t)env("CUDA_EMULATOR_MEMORY", 1l << 30);
    device.here = env("CUDA_EMULATOR_DEVICES", 1) > 0;
    return true;
  }();
  (void)once;
}
Code initial_code() {
  const char* mode = getenv("CUDA_EMULATOR_CODE");
  return {mode && !strcmp(mode, "ptx"), (int)env("CUDA_EMULATOR_CC", 90)};
}
Code& code() {
  static thread_local Code c = initial_code();
  return c;
}
Multiprocessor multiprocessor() {
  int c = code().capability;
  size_t small = 100 << 10, ampere = 164 << 10, large = 228 << 10;
  if (c == 80) return {ampere, 2048, 32};
  if (c == 87) return {ampere, 1536, 16};
  if (c == 89) return {small, 1536, 24};
  if (c < 90) return {small, 1536, 16};
  if (c < 110) return {large, 2048, 32};
  return {c < 120 ? large : small, 1536, 24};
}
void*& current_context() {
  static thread_local void* context = nullptr;
  return context;
}
}  // namespace drv

API cuInit(u32) {
  LOCK;
  init();
  return device.here ? OK : NO_DEVICE;
}
API cuDriverGetVersion(int* v) {
  *v = (int)env("CUDA_EMULATOR_DRIVER", 13000);
  return OK;
}

// --- device
API cuDeviceGetCount(int* n) {
  LOCK;
  init();
  *n = device.here;
  return OK;
}
API cuDeviceGet(int* d, int i) {
  *d = i;
  return i == 0 ? OK : INVALID_DEVICE;
}
API cuDeviceGetName(char* s, int n, int) {
  snprintf(s, n, "CUDA emulator");
  return OK;
}
API cuDeviceGetUuid_v2(char* u, int) {
  memcpy(u, "cuda-emulator-00", 16);
  return OK;
}
API cuDeviceGetUuid(char* u, int d) { return cuDeviceGetUuid_v2(u, d); }
API cuDeviceTotalMem_v2(size_t* n, int) {
  LOCK;
  init();
  *n = device.memory;
  return OK;
}
API cuDeviceGetAttribute(int* v, int attribute, int) {
  LOCK;
  init();
  // CU_DEVICE_ATTRIBUTE_..., a Hopper's values but for what a multiprocessor holds; what is not listed is 0
  static const std::map<int, int> fixed = {
      {1, 1024},                       // MAX_THREADS_PER_BLOCK
      {2, 1024},                       // MAX_BLOCK_DIM_X
      {3, 1024},                       // MAX_BLOCK_DIM_Y
      {4, 64},                         // MAX_BLOCK_DIM_Z
      {5, 2147483647},                 // MAX_GRID_DIM_X
      {6, 65535},                      // MAX_GRID_DIM_Y
      {7, 65535},                      // MAX_GRID_DIM_Z
      {8, (int)SMEM_DEFAULT},          // MAX_SHARED_MEMORY_PER_BLOCK
      {9, 64 << 10},                   // TOTAL_CONSTANT_MEMORY
      {10, 32},                        // WARP_SIZE
      {12, 65536},                     // MAX_REGISTERS_PER_BLOCK
      {13, 1980000},                   // CLOCK_RATE, kHz
      {15, 1},                         // GPU_OVERLAP
      {19, 1},                         // CAN_MAP_HOST_MEMORY
      {31, 1},                         // CONCURRENT_KERNELS
      {36, 2619000},                   // MEMORY_CLOCK_RATE, kHz
      {37, 5120},                      // GLOBAL_MEMORY_BUS_WIDTH, bits
      {38, 50 << 20},                  // L2_CACHE_SIZE
      {40, 3},                         // ASYNC_ENGINE_COUNT
      {41, 1},                         // UNIFIED_ADDRESSING
      {78, 1},                         // STREAM_PRIORITIES_SUPPORTED
      {79, 1},                         // GLOBAL_L1_CACHE_SUPPORTED
      {80, 1},                         // LOCAL_L1_CACHE_SUPPORTED
      {82, 65536},                     // MAX_REGISTERS_PER_MULTIPROCESSOR
      {87, 2},                         // SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO
      {90, 1},                         // COMPUTE_PREEMPTION_SUPPORTED
      {91, 1},                         // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
      {95, 1},                         // COOPERATIVE_LAUNCH
      {99, 1},                         // HOST_REGISTER_SUPPORTED
      {111, (int)SMEM_RESERVED},       // RESERVED_SHARED_MEMORY_PER_BLOCK
      {115, 1},                        // MEMORY_POOLS_SUPPORTED
      {120, 1},                        // CLUSTER_LAUNCH
  };
  enum {
    MULTIPROCESSOR_COUNT = 16,
    THREADS_PER_MULTIPROCESSOR = 39,
    CAPABILITY_MAJOR = 75,
    CAPABILITY_MINOR = 76,
    SHARED_MEMORY_PER_MULTIPROCESSOR = 81,
    SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
    BLOCKS_PER_MULTIPROCESSOR = 106
  };
  Multiprocessor sm = multiprocessor();
  auto it = fixed.find(attribute);
  switch (attribute) {
    case MULTIPROCESSOR_COUNT: *v = device.sms; break;
    case THREADS_PER_MULTIPROCESSOR: *v = sm.threads; break;
    case CAPABILITY_MAJOR: *v = code().capability / 10; break;
    case CAPABILITY_MINOR: *v = code().capability % 10; break;
    case SHARED_MEMORY_PER_MULTIPROCESSOR: *v = (int)sm.shared; break;
    case SHARED_MEMORY_PER_BLOCK_OPTIN: *v = (int)sm.shared_of_block(); break;
    case BLOCKS_PER_MULTIPROCESSOR: *v = sm.blocks; break;
    default: *v = it == fixed.end() ? 0 : it->second;
  }
  return OK;
}

// --- contexts
API cuDevicePrimaryCtxRetain(void** c, int) {
  LOCK;
  init();
  primary.refs++;
  *c = &primary;
  return OK;
}
API cuDevicePrimaryCtxRelease_v2(int) {
  LOCK;
  if (primary.refs) primary.refs--;
  return OK;
}
API cuCtxCreate_v4(void** c, void*, u32, int) {
  LOCK;
  init();
  *c = new Context;
  current_context() = *c;
  return OK;
}
API cuCtxDestroy_v2(void* c) {
  LOCK;
  int r = run_all();
  if (current_context() == c) current_context() = nullptr;
  if (c != &primary) delete (Context*)c;
  return r;
}
API cuCtxSetCurrent(void* c) {
  current_context() = c;
  return OK;
}
API cuCtxGetCurrent(void** c) {
  *c = current_context();
  return OK;
}
API cuCtxGetDevice(int* d) {
  *d = 0;
  return current_context() ? OK : INVALID_CONTEXT;
}
API cuCtxSynchronize() {
  LOCK;
  if (!current_context()) return INVALID_CONTEXT;
  if (int r = unsafe_call("cuCtxSynchronize")) return r;
  return run_all();
}
API cuCtxSetFlags(u32) { return OK; }
API cuCtxSetLimit(int, size_t) { return OK; }
API cuCtxGetLimit(size_t* v, int) {
  *v = 0;
  return OK;
}
API cuCtxSetCacheConfig(int) { return OK; }
API cuCtxGetCacheConfig(int* c) {
  *c = 0;
  return OK;
}
API cuCtxGetStreamPriorityRange(int* lo, int* hi) {
  if (lo) *lo = 0;
  if (hi) *hi = -5;
  return OK;
}
API cuProfilerStart() { return OK; }
API cuProfilerStop() { return OK; }

// --- error texts
static const struct {
  int code;
  const char *name, *text;
} ERRORS[] = {
    {OK, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_PTX, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "memory already registered"},
    {HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "memory not registered"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {COOPERATIVE_TOO_LARGE, "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE", "too many blocks in cooperative launch"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {CAPTURE_MERGE, "CUDA_ERROR_STREAM_CAPTURE_MERGE", "merge of captures"},
    {CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not initiated in this stream"},
    {CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
     "dependency created on uncaptured work in another stream"},
    {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT",
     "operation not permitted on an event last recorded in a capturing stream"},
    {CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "capture ended by another thread"},
    {UPDATE_FAILURE, "CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE", "the graph update was not performed"},
};
API cuGetErrorName(int e, const char** s) {
  *s = nullptr;
  for (auto& x : ERRORS) {
    if (x.code == e) *s = x.name;
  }
  return *s ? OK : INVALID_VALUE;
}
API cuGetErrorString(int e, const char** s) {
  *s = nullptr;
  for (auto& x : ERRORS) {
    if (x.code == e) *s = x.text;
  }
  return *s ? OK : INVALID_VALUE;
}
