//! Plain cudarc: except for `install`, nothing here knows of the emulator.
#![allow(dead_code)]
use cudarc::{
    driver::{
        CudaContext, CudaFunction, CudaGraph, CudaModule, CudaSlice, CudaStream, DeviceRepr, DriverError, LaunchConfig,
        sys,
    },
    nvrtc::Ptx,
};
pub use half::bf16;
use std::{ffi::c_void, sync::Arc};

/// Runs `test` with the kernels as nvcc compiled them; skipped, with the reason, where there was no nvcc.
pub fn with_ptx(test: impl FnOnce()) {
    match cuda_emulator::own_ptx() {
        Some(_) => cuda_emulator::with_code(cuda_emulator::Code::Ptx, None, test),
        None => println!("skipped: built without nvcc"),
    }
}

pub struct Gpu {
    pub ctx: Arc<CudaContext>,
    pub stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
}
pub const fn grid(x: u32, y: u32, threads: u32, smem: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (x, y, 1), block_dim: (threads, 1, 1), shared_mem_bytes: smem }
}
#[macro_export]
macro_rules! launch {
    ($g:expr, $f:expr, $cfg:expr, $($a:expr),*) => {{
        use cudarc::driver::PushKernelArg;
        let f = $g.func($f);
        let mut b = $g.stream.launch_builder(&f);
        // SAFETY: the arguments are those of the kernel. One expression, so that temporaries live long enough.
        #[allow(clippy::macro_metavars_in_unsafe)]
        unsafe { b$(.arg($a))*.launch($cfg) }.map(drop)
    }};
}
impl Gpu {
    pub fn new() -> Gpu {
        cuda_emulator::install();
        Gpu::open()
    }
    pub fn open() -> Gpu {
        let ctx = CudaContext::new(0).unwrap();
        // SAFETY: nothing here is shared between streams without an event or a synchronisation.
        unsafe { ctx.disable_event_tracking() };
        let stream = ctx.new_stream().unwrap();
        let module = ctx.load_module(Ptx::from_binary(vec![0])).unwrap();
        Gpu { ctx, stream, module }
    }
    /// A copy of `x` on the device.
    pub fn upload<T: DeviceRepr>(&self, x: &[T]) -> CudaSlice<T> {
        self.stream.clone_htod(x).unwrap()
    }
    /// `n` elements on the device that were never written.
    pub fn uninit<T: DeviceRepr>(&self, n: usize) -> CudaSlice<T> {
        // SAFETY: the emulator reports a read of what was not written.
        unsafe { self.stream.alloc(n) }.unwrap()
    }
    pub fn func(&self, name: &str) -> CudaFunction {
        self.module.load_function(name).unwrap()
    }
    pub fn big_smem(&self, name: &str, bytes: u32) -> CudaFunction {
        let f = self.func(name);
        f.set_attribute(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes as i32)
            .unwrap();
        f
    }
    pub fn capture(&self, f: impl FnOnce()) -> Result<Option<CudaGraph>, DriverError> {
        self.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        f();
        self.stream.end_capture(sys::CUgraphInstantiate_flags(0))
    }
    /// cuLaunchKernelEx with programmatic stream serialization.
    pub fn launch_pdl(&self, name: &str, blocks: u32, threads: u32, args: &mut [*mut c_void]) {
        let f = self.func(name);
        // SAFETY: plain data.
        let mut a: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        a.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        a.value.programmaticStreamSerializationAllowed = 1;
        let c = sys::CUlaunchConfig {
            gridDimX: blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: self.stream.cu_stream(),
            attrs: &mut a,
            numAttrs: 1,
        };
        // SAFETY: the caller's arguments are those of the kernel, in its order; c and a outlive the call.
        unsafe { sys::cuLaunchKernelEx(&c, f.cu_function(), args.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .unwrap();
    }
}
pub fn arg<T>(x: &T) -> *mut c_void {
    x as *const T as *mut c_void
}
/// Deterministic values in [-1, 1).
pub fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}
pub fn halves(v: &[f32]) -> Vec<bf16> {
    v.iter().map(|&x| bf16::from_f32(x)).collect()
}
/// Largest |got - want| / (1 + |want|).
pub fn error(got: &[bf16], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter()
        .zip(want)
        .map(|(g, w)| {
            let e = (g.to_f64() - w).abs() / (1.0 + w.abs());
            if e.is_nan() { f64::INFINITY } else { e }
        })
        .fold(0.0, f64::max)
}
/// f64 attention of one query over `keys` rows of a [t, stride] cache at head offset `at`.
pub fn attend(q: &[bf16], k: &[bf16], v: &[bf16], keys: usize, stride: usize, at: usize, scale: f64) -> Vec<f64> {
    let d = q.len();
    let s: Vec<f64> = (0..keys)
        .map(|t| (0..d).map(|e| q[e].to_f64() * k[t * stride + at + e].to_f64()).sum::<f64>() * scale)
        .collect();
    let m = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let p: Vec<f64> = s.iter().map(|x| (x - m).exp()).collect();
    let l: f64 = p.iter().sum();
    (0..d).map(|e| (0..keys).map(|t| p[t] * v[t * stride + at + e].to_f64()).sum::<f64>() / l).collect()
}
