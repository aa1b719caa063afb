//! Errors as exceptions, one for each kind that a program may want to tell from the others.

use aoji::Error;
use pyo3::{PyErr, create_exception, exceptions::PyException};

create_exception!(aoji, AojiError, PyException, "What aoji could not do; the others are kinds of it.");
create_exception!(aoji, InputError, AojiError, "An argument is out of range.");
create_exception!(aoji, ContextError, AojiError, "The tokens do not fit the context.");
create_exception!(aoji, NoModelError, AojiError, "There is no such model.");
create_exception!(aoji, FileError, AojiError, "A file is missing, unreadable, or not what it should be.");
create_exception!(aoji, UnsupportedError, AojiError, "A model of a kind that aoji does not run.");
create_exception!(aoji, DeviceMemoryError, AojiError, "Weights or KV cache do not fit the memory of the device.");
create_exception!(aoji, NoGpuError, AojiError, "The GPU cannot be used.");
create_exception!(aoji, CudaError, AojiError, "The GPU or its driver failed.");

/// The exception for an error of the library.
pub fn exception(error: Error) -> PyErr {
    let text = match &error {
        // Their hints speak of the command, which the module comes with.
        Error::NoModel { .. } | Error::NoGpu(_) => error.hint().map(|hint| format!("{error}; {hint}")),
        _ => None,
    };
    let text = text.unwrap_or_else(|| error.to_string());
    match error {
        Error::Input(_) => InputError::new_err(text),
        Error::Context { .. } => ContextError::new_err(text),
        Error::NoModel { .. } => NoModelError::new_err(text),
        Error::Io { .. } | Error::File { .. } | Error::Tensor { .. } => FileError::new_err(text),
        Error::Unsupported { .. } => UnsupportedError::new_err(text),
        Error::Memory(_) => DeviceMemoryError::new_err(text),
        Error::NoGpu(_) => NoGpuError::new_err(text),
        Error::Cuda { .. } => CudaError::new_err(text),
        _ => AojiError::new_err(text),
    }
}
