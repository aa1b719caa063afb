//! The one function that launches kernels.

use super::{Buffer, Cuda, failed};
use crate::{
    error::{Error, Result},
    ops::{Element, Grid},
};
use cudarc::driver::{CudaFunction, result, sys};
use std::{
    ffi::c_void,
    fmt::Debug,
    sync::atomic::{AtomicU32, Ordering},
};

/// More dynamic shared memory has to be asked for, once per function.
const DEFAULT_SHARED: u32 = 48 << 10;

/// A loaded kernel.
pub(super) struct Kernel {
    pub function: CudaFunction,
    /// Dynamic shared memory that the function may use.
    pub shared: AtomicU32,
}

impl Kernel {
    pub fn new(function: CudaFunction) -> Kernel {
        Kernel { function, shared: AtomicU32::new(DEFAULT_SHARED) }
    }

    fn allow_shared(&self, bytes: u32) -> Result<(), cudarc::driver::DriverError> {
        if bytes > self.shared.load(Ordering::Relaxed) {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            self.function.set_attribute(attribute, bytes as i32)?;
            self.shared.store(bytes, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// A kernel argument: the bytes of a pointer, an int or a float, low end first.
#[derive(Clone, Copy)]
pub struct Arg(u64);

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
/// An `int` of the kernel; `check` of the op proved that it fits.
impl From<usize> for Arg {
    fn from(n: usize) -> Arg {
        debug_assert!(i32::try_from(n).is_ok(), "{n} does not fit an int");
        Arg(n as u64)
    }
}
impl From<f32> for Arg {
    fn from(x: f32) -> Arg {
        Arg(x.to_bits().into())
    }
}

impl Cuda {
    /// Enqueues a kernel; `op` is for error messages. With `AOJI_SYNC=1` it is waited for, so that an error names its op.
    ///
    /// # Safety
    /// `args` must be the kernel's parameters in order and of their types, and what the kernel reads and writes through them
    /// must be allocated.
    pub unsafe fn launch(&self, kernel: &str, op: &dyn Debug, grid: Grid, args: &[Arg]) -> Result<()> {
        let k = self.kernels.get()?.get(kernel).ok_or_else(|| Error::Cuda {
            what: format!("{op:?}"),
            cause: format!("kernel {kernel} is not in this binary"),
        })?;
        let mut pointers = [std::ptr::null_mut::<c_void>(); 24];
        for (p, a) in pointers.iter_mut().zip(args) {
            *p = std::ptr::from_ref(&a.0).cast_mut().cast();
        }
        assert!(args.len() <= pointers.len(), "{kernel} has too many parameters");
        let [x, y, z] = grid.blocks;
        let run = || {
            self.context.bind_to_thread()?;
            k.allow_shared(grid.shared)?;
            // SAFETY: the pointers are to values that live until the call returns, and the driver copies them; that they are
            // what the kernel takes is the caller's promise.
            unsafe {
                result::launch_kernel(
                    k.function.cu_function(),
                    (x, y, z),
                    (grid.threads, 1, 1),
                    grid.shared,
                    self.stream.cu_stream(),
                    &mut pointers[..args.len()],
                )?;
            }
            if self.sync { self.stream.synchronize() } else { Ok(()) }
        };
        let mut run = run;
        run().map_err(failed(|| format!("{kernel} for {op:?} with {grid:?}")))
    }
}
