//! The one function that launches kernels.

use super::{Buffer, Cuda, failed, geometry::Geometry};
use crate::{
    error::{Error, Result},
    ops::{Element, Grid},
};
use cudarc::driver::{CudaFunction, CudaModule, DriverError, sys};
use std::{
    ffi::c_void,
    fmt::Debug,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

/// A kernel that needs more dynamic shared memory than this must ask for it, once per function.
const DEFAULT_SHARED: u32 = 48 << 10;
/// How many percent of a multiprocessor's memory are to be shared memory rather than L1 cache.
const CARVEOUT: i32 = 100;

/// A loaded kernel.
pub(super) struct Kernel {
    pub function: CudaFunction,
    /// Name of the function: for a variant of the lab it differs from the name that the op calls.
    pub name: String,
    /// A variant's changes of the launch.
    pub geometry: Geometry,
    /// Dynamic shared memory that the function may use.
    pub shared: AtomicU32,
}

/// One launch, as it was.
#[derive(Debug, Clone, PartialEq)]
pub struct Launched {
    /// Name of the function.
    pub kernel: String,
    /// Its geometry.
    pub grid: Grid,
}

impl Kernel {
    /// Takes a kernel of a module and puts it on the device; the text of an error names it.
    pub fn load(module: &Arc<CudaModule>, name: &str) -> Result<Kernel, String> {
        let load = || -> Result<CudaFunction, DriverError> {
            let function = module.load_function(name)?;
            // All kernels ask for the same division. Before a multiprocessor can change the division between L1 and
            // shared memory, all of its blocks must have ended, so kernels that differ could not overlap.
            let carveout = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            function.set_attribute(carveout, CARVEOUT)?;
            // SAFETY: a function of a loaded module, in the context that load_module made this thread's. Left to itself the
            // driver puts a kernel on the device when it is launched first, and the first token would wait for that.
            unsafe { sys::cuFuncLoad(function.cu_function()) }.result()?;
            Ok(function)
        };
        let function = load().map_err(|e| format!("{name}: {e}"))?;
        let (geometry, shared) = (Geometry::default(), AtomicU32::new(DEFAULT_SHARED));
        Ok(Kernel { function, name: name.into(), geometry, shared })
    }

    fn allow_shared(&self, bytes: u32) -> Result<(), DriverError> {
        if bytes > self.shared.load(Ordering::Relaxed) {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            self.function.set_attribute(attribute, bytes as i32)?;
            self.shared.store(bytes, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// A kernel argument: the bytes of a pointer, a whole number or a float, low end first.
#[derive(Clone, Copy)]
pub struct Arg(pub(super) u64);

impl<T: Element> From<&Buffer<T>> for Arg {
    fn from(b: &Buffer<T>) -> Arg {
        Arg(b.address)
    }
}
impl<T: Element> From<&mut Buffer<T>> for Arg {
    fn from(b: &mut Buffer<T>) -> Arg {
        Arg(b.address)
    }
}
impl<T: Element> From<&mut &mut Buffer<T>> for Arg {
    fn from(b: &mut &mut Buffer<T>) -> Arg {
        Arg(b.address)
    }
}
/// Null for none.
impl<T: Element> From<Option<&Buffer<T>>> for Arg {
    fn from(b: Option<&Buffer<T>>) -> Arg {
        Arg(b.map_or(0, |b| b.address))
    }
}
impl Arg {
    /// A pointer `bytes` further.
    pub(crate) fn after(self, bytes: usize) -> Arg {
        Arg(self.0 + bytes as u64)
    }
}
/// An `int` of the kernel; `check` of the op proved that it fits.
impl Arg {
    /// A pointer to nothing.
    pub const NULL: Arg = Arg(0);
}
impl From<usize> for Arg {
    fn from(n: usize) -> Arg {
        debug_assert!(i32::try_from(n).is_ok(), "{n} does not fit an int");
        Arg(n as u64)
    }
}
impl From<u32> for Arg {
    fn from(n: u32) -> Arg {
        Arg(n.into())
    }
}
impl From<u64> for Arg {
    fn from(n: u64) -> Arg {
        Arg(n)
    }
}
impl From<f32> for Arg {
    fn from(x: f32) -> Arg {
        Arg(x.to_bits().into())
    }
}

impl Cuda {
    /// Enqueues a kernel; `op` is for error messages. With `AOJI_SYNC=1` it also waits for it, so that an error names
    /// its op.
    ///
    /// # Safety
    /// `args` must be the kernel's parameters in order and of their types, and what the kernel reads and writes through them
    /// must be allocated.
    pub unsafe fn launch(&self, kernel: &str, op: &dyn Debug, grid: Grid, args: &[Arg]) -> Result<()> {
        // SAFETY: the caller's promise; without the attribute the kernel starts when all before it is done.
        unsafe { self.enqueue(kernel, op, grid, args, &mut []) }
    }

    /// As [`Cuda::launch`], for a kernel of a decode step. If the GPU can, the kernel starts when every block of the
    /// kernel before has waited for *its* predecessor (all kernels of the chain call `grid_dependency_wait`, and then
    /// `grid_launch_dependents`). So two kernels overlap and never three, and before it waits, a kernel may read what
    /// the one before it does not write.
    ///
    /// # Safety
    /// That of [`Cuda::launch`]; and the kernel must call `grid_dependency_wait` before it reads what the kernel before it
    /// writes and before it writes anything.
    pub unsafe fn launch_dependent(&self, kernel: &str, op: &dyn Debug, grid: Grid, args: &[Arg]) -> Result<()> {
        // SAFETY: plain bytes, of which each attribute uses some.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let attributes = &mut [attribute][..usize::from(self.pdl)];
        // SAFETY: the caller's promise.
        unsafe { self.enqueue(kernel, op, grid, args, attributes) }
    }

    /// # Safety
    /// That of [`Cuda::launch`], and what the attributes ask of the kernel.
    unsafe fn enqueue(
        &self,
        kernel: &str,
        op: &dyn Debug,
        grid: Grid,
        args: &[Arg],
        attributes: &mut [sys::CUlaunchAttribute],
    ) -> Result<()> {
        let k = self.kernels.get()?.get(kernel).ok_or_else(|| Error::Cuda {
            what: format!("{op:?}"),
            cause: format!("kernel {kernel} is not in this binary"),
        })?;
        let refused = |cause| Error::Cuda { what: format!("{} for {op:?}", k.name), cause };
        let grid = k.geometry.apply(grid, self.info.sm_count).map_err(refused)?;
        self.trace.launching(&k.name, op, grid).map_err(refused)?;
        if let Some(launches) = &mut *self.launches.lock().unwrap_or_else(PoisonError::into_inner) {
            launches.push(Launched { kernel: k.name.clone(), grid });
        }
        let mut pointers = [std::ptr::null_mut::<c_void>(); 24];
        for (p, a) in pointers.iter_mut().zip(args) {
            *p = std::ptr::from_ref(&a.0).cast_mut().cast();
        }
        assert!(args.len() <= pointers.len(), "{kernel} has too many parameters");
        let [x, y, z] = grid.blocks;
        let recording = Cuda::recording();
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared,
            hStream: recording.unwrap_or(self.stream.cu_stream()),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        let run = || {
            self.context.bind_to_thread()?;
            k.allow_shared(grid.shared)?;
            // SAFETY: configuration, attributes and the values behind the pointers live until the call returns, and the driver
            // copies them; that the values are what the kernel takes is the caller's promise.
            unsafe {
                sys::cuLaunchKernelEx(&config, k.function.cu_function(), pointers.as_mut_ptr(), std::ptr::null_mut())
            }
            .result()?;
            if self.sync && recording.is_none() { self.stream.synchronize() } else { Ok(()) }
        };
        let mut run = run;
        self.timed(&k.name, || run().map_err(failed(|| format!("{} for {op:?} with {grid:?}", k.name))))
    }

    /// How many percent of a multiprocessor's memory each kernel asks to be shared memory, by name.
    pub fn carveouts(&self) -> Result<Vec<(String, i32)>> {
        let carveout = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        let of = |k: &Kernel| k.function.get_attribute(carveout).map(|percent| (k.name.clone(), percent));
        let all: Result<Vec<_>, _> = self.kernels.get()?.values().map(of).collect();
        all.map_err(failed(|| "asking for the division of shared memory".into()))
    }

    /// What `ops` launches, in order. Not for two threads at once.
    pub fn launches(&self, ops: impl FnOnce() -> Result<()>) -> Result<Vec<Launched>> {
        let record = |to| std::mem::replace(&mut *self.launches.lock().unwrap_or_else(PoisonError::into_inner), to);
        record(Some(Vec::new()));
        let result = ops();
        let launches = record(None).unwrap_or_default();
        result.map(|()| launches)
    }
}
