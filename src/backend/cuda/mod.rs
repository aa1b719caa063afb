//! The GPU backend: context, one stream, kernels, memory, captured graphs.
//!
//! Everything goes to one stream, so no events are needed to keep the order of ops. Nothing here is linked: the driver
//! is opened at run time, and its absence is an error, not a panic.

mod backend;
mod background;
mod blas;
mod buffer;
mod device;
mod geometry;
mod graph;
pub mod kernels;
pub mod lab;
mod launch;
mod modules;
pub mod occupancy;
mod outbox;
mod packed;
mod trace;
mod train;
mod upload;
mod weight;
mod workspace;

pub use blas::{GemmBy, MANY_ROWS, cublas_version};
pub use buffer::Buffer;
pub use device::{Info, devices};
pub use graph::{Edges, Graphs};
pub use launch::{Arg, Launched};
pub use outbox::Outbox;
pub use trace::{Launch, Span};
pub use weight::{Kind, Weight};

use crate::{
    error::{Error, Result},
    files::Startup,
    ops::Ring,
};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};
use std::{
    collections::BTreeMap,
    ffi::c_void,
    sync::{Arc, Mutex, PoisonError},
};

/// CUDA version that the kernels need of the driver, as the driver counts: 13.0 is 13000.
const NEEDED: i32 = 13000;

/// One GPU.
pub struct Cuda {
    /// Opened when first needed. Declared before stream and context, so that it is dropped while they are alive.
    blas: background::Background<Result<blas::Blas, String>>,
    gemm_by: GemmBy,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    kernels: modules::Modules,
    info: Info,
    startup: Startup,
    /// Whether kernels of a step may start before the one before them has ended: programmatic dependent launch, which
    /// GPUs have from Hopper on. `AOJI_PDL=0` switches it off, to measure what it is worth.
    pdl: bool,
    /// Depth of the ring of weights in products of one row. `AOJI_RING=short` or `deep` sets it, to measure what it is
    /// worth.
    ring: Ring,
    /// `AOJI_SYNC=1`: whether each launch is waited for.
    sync: bool,
    /// The launches so far, while they are being recorded.
    launches: Mutex<Option<Vec<Launched>>>,
    /// Calls and milliseconds of each kernel, while they are being measured.
    times: Mutex<Option<BTreeMap<String, (u64, f64)>>>,
    trace: trace::Tracer,
    /// Scratch memory of matrix products for many rows.
    workspace: Mutex<workspace::Workspace>,
    /// Memory in which such a product converts a packed (quantized) matrix to bf16.
    widened: Mutex<Option<Weight>>,
    /// Memory of some labels' logits, in training.
    logits: Mutex<Option<train::Logits>>,
}

/// For `map_err`: a driver error with what was being done.
pub(crate) fn failed(what: impl FnOnce() -> String) -> impl FnOnce(DriverError) -> Error {
    |e| Error::Cuda { what: what(), cause: e.to_string() }
}

/// CUDA version that the driver supports (13000 is 13.0), or why there is none.
pub fn driver_version() -> Result<i32> {
    // SAFETY: opens the library and closes it. Without this check cudarc's first call would panic where there is no driver.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoGpu(
            "no NVIDIA driver: libcuda.so.1 cannot be loaded (in a container: start it with --gpus all)".into(),
        ));
    }
    let mut version = 0;
    // SAFETY: writes one int; allowed before cuInit.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(failed(|| "cuDriverGetVersion".into()))?;
    Ok(version)
}

impl Cuda {
    /// Opens GPU `ordinal` and loads the kernels; variants that `AOJI_LAB` names replace shipped ones.
    pub fn open(ordinal: usize) -> Result<Cuda> {
        let cuda = Cuda::begin(ordinal, Startup::begin())?;
        cuda.kernels.get()?;
        Ok(cuda)
    }

    /// As [`Cuda::open`], with these variants; `AOJI_LAB` is ignored.
    pub fn open_with(ordinal: usize, variants: &[&'static lab::Variant]) -> Result<Cuda> {
        let cuda = Cuda::begin_with(ordinal, variants, Startup::begin())?;
        cuda.kernels.get()?;
        Ok(cuda)
    }

    /// As [`Cuda::open`], but it returns while a thread still loads the kernels: the first launch, or `synchronize`,
    /// waits for them.
    pub(crate) fn begin(ordinal: usize, startup: Startup) -> Result<Cuda> {
        let variants = lab::from_env()?;
        for v in &variants {
            tracing::warn!("AOJI_LAB: kernels/lab/{}.cu replaces shipped kernels", v.module.stem);
        }
        Self::begin_with(ordinal, &variants, startup)
    }

    fn begin_with(ordinal: usize, variants: &[&'static lab::Variant], startup: Startup) -> Result<Cuda> {
        let driver = startup.time("driver", 0, || usable(ordinal))?;
        let (gemm_by, ring) = (GemmBy::from_env()?, ring_from_env()?);
        Self::start(ordinal, driver, gemm_by, ring, variants, startup)
            .map_err(|e| Error::Cuda { what: format!("opening GPU {ordinal}"), cause: e.to_string() })
    }

    /// The same GPU again, with a variant that replaces shipped kernels.
    pub fn with_variant(&self, variant: &'static lab::Variant) -> Result<Cuda> {
        let (gpu, driver) = (self.context.ordinal(), self.info.driver);
        let cuda = Self::start(gpu, driver, self.gemm_by, Some(self.ring), &[variant], Startup::begin());
        let what = || format!("loading a variant of {}", variant.op);
        let cuda = cuda.map_err(|e| Error::Cuda { what: what(), cause: e.to_string() })?;
        cuda.kernels.get()?;
        Ok(cuda)
    }

    fn start(
        ordinal: usize,
        driver: i32,
        gemm_by: GemmBy,
        ring: Option<Ring>,
        variants: &[&'static lab::Variant],
        startup: Startup,
    ) -> Result<Cuda, DriverError> {
        let (context, stream) = startup.time("context", 0, || {
            let context = CudaContext::new(ordinal)?;
            // SAFETY: all work goes to one stream, so no slice needs events to order its uses. Must come before the
            // stream and every allocation: events recorded before a capture would break it.
            unsafe { context.disable_event_tracking() };
            let stream = context.new_stream()?;
            keep_freed_memory(&context)?;
            Ok::<_, DriverError>((context, stream))
        })?;
        let info = Info::of(ordinal, driver)?;
        let kernels = modules::Modules::load(&context, &info, variants, &startup);
        let sync = std::env::var_os("AOJI_SYNC").is_some_and(|v| v == "1");
        // Kernels overlap only if their code can wait: code compiled for 9.0 and newer can, PTX of 8.0 cannot.
        let pdl =
            kernels::waits_for_predecessor(info.capability) && std::env::var_os("AOJI_PDL").is_none_or(|v| v != "0");
        let ring = ring.unwrap_or_else(|| occupancy::ring(info.shared_per_sm));
        let (blas, launches, trace) = (background::Background::default(), Mutex::default(), trace::Tracer::default());
        let (workspace, widened, logits) = (Mutex::default(), Mutex::default(), Mutex::default());
        Ok(Cuda {
            blas,
            gemm_by,
            context,
            stream,
            kernels,
            info,
            startup,
            pdl,
            ring,
            sync,
            launches,
            times: Mutex::default(),
            trace,
            workspace,
            widened,
            logits,
        })
    }

    /// What the driver says of the GPU.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// The ring of products of one row.
    pub fn ring(&self) -> Ring {
        self.ring
    }

    /// Sets another ring; steps that are recorded already keep theirs.
    pub fn set_ring(&mut self, ring: Ring) {
        self.ring = ring;
    }

    /// Names of the loaded kernels.
    pub fn kernel_names(&self) -> Result<impl Iterator<Item = &str>> {
        Ok(self.kernels.get()?.keys().map(String::as_str))
    }

    /// The device's memory bandwidth in GB/s: the median of ten copies of `bytes` from one buffer to another, counting
    /// both what is read and what is written.
    pub fn copy_bandwidth(&self, bytes: usize) -> Result<f64> {
        use crate::backend::Backend;
        let what = || failed(move || format!("copying {bytes} bytes on the device"));
        let words = bytes.div_ceil(4);
        let (mut src, mut dst) = (self.alloc::<u32>(words)?, self.alloc::<u32>(words)?);
        // not zeros, which memory may handle faster
        let block: Vec<u32> = (0..words.min(1 << 24) as u32).map(|i| i.wrapping_mul(0x9E37_79B9)).collect();
        for at in (0..words).step_by(block.len()) {
            self.write(&mut src, at, &block[..block.len().min(words - at)])?;
        }
        let mut ms = Vec::new();
        for _ in 0..12 {
            ms.push(self.time(|| self.stream.memcpy_dtod(&src.bytes, &mut dst.bytes).map_err(what()))?);
        }
        let mut ms = ms.split_off(2); // the first copies touch the memory for the first time
        ms.sort_by(f32::total_cmp);
        Ok(2.0 * bytes as f64 / (f64::from(ms[ms.len() / 2]) * 1e6))
    }

    /// Milliseconds that the device takes for what `ops` enqueues.
    pub fn time(&self, ops: impl FnOnce() -> Result<()>) -> Result<f32> {
        let begin = self.event()?;
        ops()?;
        begin.elapsed_ms(&self.event()?).map_err(failed(|| "timing".into()))
    }

    fn event(&self) -> Result<CudaEvent> {
        let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        self.stream.record_event(timed).map_err(failed(|| "recording an event".into()))
    }

    /// Enqueues a call of a kernel; while kernels are being measured, waits for it and notes its time.
    pub(crate) fn timed(&self, kernel: &str, call: impl FnOnce() -> Result<()>) -> Result<()> {
        let times = || self.times.lock().unwrap_or_else(PoisonError::into_inner);
        if times().is_none() {
            return call();
        }
        let ms = f64::from(self.time(call)?);
        if let Some(times) = &mut *times() {
            let (calls, sum) = times.entry(kernel.into()).or_default();
            (*calls, *sum) = (*calls + 1, *sum + ms);
        }
        Ok(())
    }
}

/// What `AOJI_RING` asks for, if anything.
fn ring_from_env() -> Result<Option<Ring>> {
    match std::env::var("AOJI_RING").unwrap_or_default().as_str() {
        "" => Ok(None),
        "short" => Ok(Some(Ring::Short)),
        "deep" => Ok(Some(Ring::Deep)),
        other => Err(Error::Input(format!("AOJI_RING is {other:?}, expected short or deep"))),
    }
}

/// The driver's version, if it can be used together with GPU `ordinal` and the kernels of this binary.
fn usable(ordinal: usize) -> Result<i32> {
    let driver = driver_version()?;
    if driver < NEEDED {
        return Err(Error::NoGpu(format!(
            "the NVIDIA driver supports CUDA {}.{}, the kernels need {}.0: update the driver to 580 or newer",
            driver / 1000,
            driver % 1000 / 10,
            NEEDED / 1000
        )));
    }
    let gpus = devices()?;
    let Some(gpu) = gpus.get(ordinal) else {
        return Err(Error::NoGpu(format!(
            "GPU {ordinal} was asked for, but the driver shows {} (see nvidia-smi and CUDA_VISIBLE_DEVICES)",
            gpus.len()
        )));
    };
    if kernels::MODULES.is_empty() {
        return Err(Error::NoGpu("this binary was built without GPU kernels (AOJI_SKIP_KERNELS)".into()));
    }
    if kernels::image_for(kernels::IMAGES, gpu.capability).is_none() {
        let ((a, b), images) = (gpu.capability, kernels::IMAGES);
        return Err(Error::NoGpu(format!(
            "{} has compute capability {a}.{b}, which the kernels of this binary ({images}) do not run on: aoji needs \
             Ampere (8.0) or newer",
            gpu.name
        )));
    }
    Ok(driver)
}

/// The default memory pool gives freed memory back to the system at every synchronisation unless told to keep it.
fn keep_freed_memory(context: &CudaContext) -> Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut keep = u64::MAX;
    let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device of a live context has a default pool; the attribute is a u64 that is read during the call.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        result::mem_pool::set_attribute(pool, threshold, std::ptr::from_mut(&mut keep).cast::<c_void>())
    }
}
