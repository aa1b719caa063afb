//! cuBLAS, if it is installed: an alternative to our matrix product for many rows. It is opened at run time: if prompts
//! of that size can come, by a thread while weights are copied, else when first needed.
//!
//! It is looked for in `$AOJI_CUBLAS_DIR` (and then nowhere else), where the loader looks, in the Python wheels of
//! `$VIRTUAL_ENV` and `./.venv`, and in `/usr/local/cuda`.

use super::{Buffer, Cuda, Weight};
use crate::{
    backend::Out,
    error::{Error, Result},
    ops::{Gemm, train::LinearDx},
};
use cudarc::{
    cublas::{result, sys},
    driver::{CudaContext, CudaSlice, CudaStream, DevicePtr},
};
use half::bf16;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::{
    env,
    ffi::{OsString, c_void},
    fmt::Debug,
    fs,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, OnceLock},
};

/// Which code computes matrix products with more rows than the gemv takes: the variable `AOJI_GEMM`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GemmBy {
    /// cuBLAS for [`MANY_ROWS`] and more where it can be opened, else our kernel.
    #[default]
    Auto,
    /// Our kernel.
    Own,
    /// cuBLAS; an error where it cannot be opened.
    Cublas,
}

/// From this many rows on, `auto` uses cuBLAS. With fewer rows, reading the weights takes most of the time, and the
/// library's 200 MB of host memory cost more than it brings. This is an estimate: where cuBLAS begins to win has not
/// been measured yet.
pub const MANY_ROWS: usize = 512;

/// Bytes on the device; what NVIDIA advises for sm_90. With a workspace of its own a handle allocates nothing later.
const WORKSPACE_BYTES: usize = 32 << 20;

impl FromStr for GemmBy {
    type Err = Error;
    fn from_str(s: &str) -> Result<GemmBy> {
        match s {
            "auto" | "" => Ok(GemmBy::Auto),
            "own" => Ok(GemmBy::Own),
            "cublas" => Ok(GemmBy::Cublas),
            _ => Err(Error::Input(format!("AOJI_GEMM is {s:?}, expected auto, own or cublas"))),
        }
    }
}

impl GemmBy {
    pub(super) fn from_env() -> Result<GemmBy> {
        env::var("AOJI_GEMM").unwrap_or_default().parse()
    }
}

/// Version of the cuBLAS that would be used, and its path; needs no GPU.
///
/// # Errors
/// [`Error::Cuda`] with the places that were tried.
pub fn cublas_version() -> Result<String> {
    let found = load()?;
    let part = |which| {
        let mut n = 0;
        // SAFETY: the library is loaded; it writes one int.
        unsafe { sys::cublasGetProperty(which, &mut n) }.result().map_err(failed("cublasGetProperty"))?;
        Ok::<_, Error>(n)
    };
    use sys::libraryPropertyType_t::{MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL};
    let [a, b, c] = [part(MAJOR_VERSION)?, part(MINOR_VERSION)?, part(PATCH_LEVEL)?];
    Ok(format!("{a}.{b}.{c} ({found})"))
}

fn failed(what: &str) -> impl FnOnce(result::CublasError) -> Error {
    move |e| Error::Cuda { what: what.into(), cause: format!("cuBLAS says {e}") }
}

/// Loads the library into the process, once. Returns where it was found.
fn load() -> Result<&'static str> {
    static FOUND: OnceLock<Result<String, String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let own = env::var_os("AOJI_CUBLAS_DIR").filter(|d| !d.is_empty());
        // SAFETY: opens and closes libraries of NVIDIA's, whose constructors have no preconditions.
        if own.is_none() && unsafe { sys::is_culib_present() } {
            return Ok("found by the loader".into());
        }
        load_from(&directories(own, env::var_os("VIRTUAL_ENV")))
    });
    found.as_deref().map_err(|cause| Error::Cuda { what: "opening cuBLAS".into(), cause: cause.clone() })
}

fn directories(own: Option<OsString>, virtual_env: Option<OsString>) -> Vec<PathBuf> {
    if let Some(own) = own {
        return vec![own.into()];
    }
    let children = |d: PathBuf| fs::read_dir(d).into_iter().flatten().flatten().map(|e| e.path());
    let mut found = Vec::new();
    for venv in virtual_env.map(PathBuf::from).into_iter().chain([PathBuf::from(".venv")]) {
        for python in children(venv.join("lib")) {
            found.extend(["cu13/lib", "cublas/lib"].map(|d| python.join("site-packages/nvidia").join(d)));
        }
    }
    found.push("/usr/local/cuda/lib64".into());
    found
}

/// Loads both libraries from the first directory that has them. They stay loaded, so that code which opens them by name
/// later finds these: the loader knows a loaded library by its SONAME.
fn load_from(directories: &[PathBuf]) -> Result<String, String> {
    let open = |path: &Path| {
        // SAFETY: as in load().
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
        library.map(std::mem::forget).is_ok()
    };
    for d in directories {
        for version in [13, 12] {
            // the second needs the first
            if ["cublasLt", "cublas"].iter().all(|name| open(&d.join(format!("lib{name}.so.{version}")))) {
                return Ok(d.join(format!("libcublas.so.{version}")).display().to_string());
            }
        }
    }
    let tried: Vec<_> = directories.iter().map(|d| d.display().to_string()).collect();
    Err(format!(
        "no libcublas.so.13 or .12 in {} (install the wheel nvidia-cublas, name its directory in AOJI_CUBLAS_DIR, or do \
         without it: AOJI_GEMM=own)",
        tried.join(", ")
    ))
}

/// A handle on our stream.
pub(crate) struct Blas {
    handle: sys::cublasHandle_t,
    /// Used by calls in flight; freed on the stream, after them.
    _workspace: CudaSlice<u8>,
    context: Arc<CudaContext>,
}

// SAFETY: a handle may be used from several threads as long as none configures it, and it is configured in `open` only. All
// its work goes to one stream, so calls do not share the workspace at one time.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Blas {
    fn open(stream: &Arc<CudaStream>) -> Result<Blas> {
        load()?;
        let context = stream.context().clone();
        let what = || super::failed(|| "opening cuBLAS".into());
        context.bind_to_thread().map_err(what())?;
        let workspace = stream.alloc_zeros::<u8>(WORKSPACE_BYTES).map_err(what())?;
        let address = workspace.device_ptr(stream).0 as *mut c_void;
        let handle = result::create_handle().map_err(failed("cublasCreate"))?;
        let blas = Blas { handle, _workspace: workspace, context };
        // SAFETY: handle, stream and workspace are alive, and the handle is destroyed before the others. Setting the stream
        // resets the workspace, so it comes first. Without the mode, long sums may be split with bf16 partial sums.
        unsafe {
            result::set_stream(handle, stream.cu_stream().cast()).map_err(failed("cublasSetStream"))?;
            sys::cublasSetWorkspace_v2(handle, address, WORKSPACE_BYTES)
                .result()
                .map_err(failed("cublasSetWorkspace"))?;
            let mode = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
            sys::cublasSetMathMode(handle, mode).result().map_err(failed("cublasSetMathMode"))?;
        }
        Ok(blas)
    }

    /// `out (+)= x w^T` in bf16 with f32 sums. [`Out::Add`] is cuBLAS's `beta = 1`: added in f32, rounded once.
    pub fn gemm(&self, op: &Gemm, out: &Out<'_, Cuda>, x: &Buffer<bf16>, w: &Weight) -> Result<()> {
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let (len, address, kind, beta) = match out {
            Out::Store(out) => (out.len(), out.address, CUDA_R_16BF, 0f32),
            Out::Add(out) => (out.len(), out.address, CUDA_R_16BF, 1.0),
            Out::F32(out) => (out.len(), out.address, CUDA_R_32F, 0.0),
        };
        op.check(len, x.len(), (w.rows, w.cols))?;
        let to = To { address, kind, beta };
        // SAFETY: check() proved that x holds [rows, k], w [n, k] and out [rows, n] elements.
        unsafe { self.product(op, [op.n, op.rows, op.k], sys::cublasOperation_t::CUBLAS_OP_T, w, x, to) }
    }

    /// `dx = dy w` in bf16 with f32 sums.
    pub fn linear_dx(&self, op: &LinearDx, dx: &Buffer<bf16>, dy: &Buffer<bf16>, w: &Weight) -> Result<()> {
        op.check(dx.len(), dy.len(), (w.rows, w.cols))?;
        let to = To { address: dx.address, kind: sys::cudaDataType_t::CUDA_R_16BF, beta: 0.0 };
        // SAFETY: check() proved that dy holds [rows, n], w [n, k] and dx [rows, k] elements.
        unsafe { self.product(op, [op.k, op.rows, op.n], sys::cublasOperation_t::CUBLAS_OP_N, w, dy, to) }
    }

    /// `out [rows, n] = x w^T` or, without the transposition, `x w`, summed over `k`. Row-major matrices are the transposes of
    /// cuBLAS's column-major ones, so this is `out^T = w x^T` or `w^T x^T`.
    ///
    /// # Safety
    /// The matrices have these sizes.
    unsafe fn product(
        &self,
        op: &dyn Debug,
        [n, rows, k]: [usize; 3],
        turn: sys::cublasOperation_t,
        w: &Weight,
        x: &Buffer<bf16>,
        to: To,
    ) -> Result<()> {
        use sys::cudaDataType_t::CUDA_R_16BF;
        let [rows, n, k] = [rows, n, k].map(|n| i32::try_from(n).unwrap_or(i32::MAX)); // cuBLAS refuses the latter
        let alpha = 1f32;
        let of_w = if turn == sys::cublasOperation_t::CUBLAS_OP_T { k } else { n };
        self.context.bind_to_thread().map_err(super::failed(|| format!("cublasGemmEx for {op:?}")))?;
        // SAFETY: the caller's promise; alpha and beta are read during the call.
        unsafe {
            result::gemm_ex(
                self.handle,
                turn,
                sys::cublasOperation_t::CUBLAS_OP_N,
                n,
                rows,
                k,
                std::ptr::from_ref(&alpha).cast(),
                w.data.address as *const c_void,
                CUDA_R_16BF,
                of_w,
                x.address as *const c_void,
                CUDA_R_16BF,
                k,
                std::ptr::from_ref(&to.beta).cast(),
                to.address as *mut c_void,
                to.kind,
                n,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(failed(&format!("cublasGemmEx for {op:?}")))
    }
}

/// Where a product goes, of which type it is there, and what what is there is multiplied by before it is added.
struct To {
    address: u64,
    kind: sys::cudaDataType_t,
    beta: f32,
}

fn open(stream: &Arc<CudaStream>) -> Result<Blas, String> {
    Blas::open(stream).map_err(|e| {
        tracing::info!("matrix products by our own kernel: {e}");
        e.to_string()
    })
}

impl Drop for Blas {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: the handle is alive and this is its last use. A failure (the context is broken) leaves nothing to do.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Cuda {
    /// Who computes matrix products of many rows; at first what `AOJI_GEMM` says.
    pub fn set_gemm(&mut self, by: GemmBy) {
        self.gemm_by = by;
    }

    fn wants_blas(&self, rows: usize) -> bool {
        match self.gemm_by {
            GemmBy::Own => false,
            GemmBy::Auto => rows >= MANY_ROWS,
            GemmBy::Cublas => true,
        }
    }

    /// Begins to open cuBLAS in a thread, if it may be used for products of up to `rows` rows: this takes half a
    /// second, for which the first prompt would have to wait.
    pub(super) fn begin_blas(&self, rows: usize) {
        if self.wants_blas(rows) {
            let stream = self.stream.clone();
            self.blas.begin(move || open(&stream)); // no phase of the start: a short prompt does not wait for it
        }
    }

    /// cuBLAS if it is to compute a product of `rows` rows.
    pub(crate) fn blas_for(&self, rows: usize) -> Result<Option<&Blas>> {
        if !self.wants_blas(rows) {
            return Ok(None);
        }
        match self.blas.get_or(|| open(&self.stream)) {
            Ok(blas) => Ok(Some(blas)),
            Err(_) if self.gemm_by == GemmBy::Auto => Ok(None),
            Err(e) => Err(Error::Cuda { what: "AOJI_GEMM=cublas".into(), cause: e.clone() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gemm_by_is_one_of_three() {
        assert_eq!("".parse::<GemmBy>().unwrap(), GemmBy::Auto);
        assert_eq!("cublas".parse::<GemmBy>().unwrap(), GemmBy::Cublas);
        let e = "mkl".parse::<GemmBy>().unwrap_err().to_string();
        assert_eq!(e, "AOJI_GEMM is \"mkl\", expected auto, own or cublas");
    }

    #[test]
    fn a_named_directory_is_the_only_one() {
        assert_eq!(directories(Some("/a".into()), Some("/b".into())), [PathBuf::from("/a")]);
        assert_eq!(directories(None, None).last().unwrap(), Path::new("/usr/local/cuda/lib64"));
    }

    #[test]
    fn wheels_are_found_in_a_virtual_environment() {
        let venv = tempfile::tempdir().unwrap();
        let packages = venv.path().join("lib/python3.11/site-packages/nvidia");
        fs::create_dir_all(&packages).unwrap();
        let found = directories(None, Some(venv.path().into()));
        assert_eq!(found[..2], [packages.join("cu13/lib"), packages.join("cublas/lib")]);
        let e = load_from(&found[..2]).unwrap_err();
        assert!(
            e.starts_with("no libcublas.so.13 or .12 in ") && e.contains("cu13/lib, ") && e.contains("AOJI_GEMM=own")
        );
    }
}
