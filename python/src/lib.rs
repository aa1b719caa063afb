//! The Python module `aoji`: engines, sessions and generations of the library, without the GIL while they work.

mod engine;
mod error;
mod options;
mod session;
mod stream;
mod wait;

#[pyo3::pymodule]
mod _aoji {
    #[pymodule_export]
    use super::{
        engine::{Answer, Engine, Score},
        error::{
            AojiError, ContextError, CudaError, DeviceMemoryError, FileError, InputError, NoGpuError, NoModelError,
            UnsupportedError,
        },
        session::Session,
        stream::Generation,
    };

    /// The version of aoji.
    #[pymodule_export]
    #[allow(non_upper_case_globals)] // Python's name for it
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
