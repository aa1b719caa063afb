// emulated_device.h - the CUDA device language in host C++. Included by kernels/common/device.cuh when the compiler is
// not nvcc, and before each kernel's source by build.rs.
#pragma once
#include "emulated_engine.h"
#include "emulated_math.h"
#include "emulated_types.h"
#include "emulated_warp.h"
#include "emulated_wrappers.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::emu::now.thread->tid)
#define blockIdx (::emu::now.block)
#define blockDim (::emu::now.block_dim)
#define gridDim (::emu::now.grid_dim)
#define warpSize 32

#define DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(::emu::dyn_shared())
#define SHARED(T, name, n)              \
  static const char emu_key_##name = 0; \
  T(&name)[n] = *reinterpret_cast<T(*)[n]>(::emu::static_shared(&emu_key_##name, sizeof(T) * (n), 128, #name))

// in two steps, so that a macro can rename a kernel
#define EXPORT_KERNEL(k) EMU_EXPORT_KERNEL(k)
#define EMU_EXPORT_KERNEL(k)                                                                                  \
  static const ::emu::Kernel emu_k_##k{#k, ::emu::Bind<&k>::run, ::emu::Bind<&k>::n, ::emu::Bind<&k>::sizes}; \
  static ::emu::Registrar emu_r_##k(&emu_k_##k);
