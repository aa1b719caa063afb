//! The one error type of the library.

use std::path::{Path, PathBuf};

/// Result of every fallible call in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong. Each error says what was wrong, where, and what was expected.
///
/// Messages are complete sentences for a person at a terminal; [`Error::hint`] adds what to do where there is
/// something to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file was read but its content is not what it should be.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A tensor of a checkpoint is missing, superfluous, or has the wrong shape or dtype.
    #[error("{}: tensor {tensor}: expected {expected}, found {found}", file.display())]
    Tensor {
        /// The safetensors file (or the directory, when no file holds the tensor).
        file: PathBuf,
        /// Its name in the file.
        tensor: String,
        /// What the configuration asks for.
        expected: String,
        /// What the file has.
        found: String,
    },
    /// The model is of a kind that aoji does not run.
    #[error("{}: {what}", path.display())]
    Unsupported {
        /// The file that says so, usually `config.json`.
        path: PathBuf,
        /// What is not supported and what is.
        what: String,
    },
    /// A named model is neither a directory nor in the local Hugging Face cache.
    #[error("model {name:?} not found: {tried}")]
    NoModel {
        /// What was asked for.
        name: String,
        /// Where it was looked for.
        tried: String,
    },
    /// A download failed.
    #[error("{url}: {what}")]
    Download {
        /// What was asked for.
        url: String,
        /// What the server or the network said.
        what: String,
    },
    /// An argument of a call or a field of a request is out of range.
    #[error("{0}")]
    Input(String),
    /// The tokens do not fit the context.
    #[error("{needed} tokens do not fit the context of {max} tokens")]
    Context {
        /// Tokens asked for.
        needed: usize,
        /// Capacity of the session.
        max: usize,
    },
    /// An op was called with buffers that contradict its sizes, or with sizes that its kernels do not cover.
    #[error("{op}: {what}")]
    Op {
        /// Stem of the op.
        op: &'static str,
        /// Which argument or size, what was found and what was expected.
        what: String,
    },
    /// Weights, KV cache and scratch do not fit the memory of the device.
    #[error("{0}")]
    Memory(String),
    /// The GPU cannot be used: no driver, no device, too old a driver, no kernels for it.
    #[error("{0}")]
    NoGpu(String),
    /// A CUDA or cuBLAS call failed.
    #[error("{what}: {cause}")]
    Cuda {
        /// What was being done; for a launch, the op with its sizes.
        what: String,
        /// What the driver said.
        cause: String,
    },
    /// Two backends computed different numbers (`lockstep`).
    #[error("{0}")]
    Disagree(String),
}

impl Error {
    /// An I/O error with the file it happened to; for `map_err`.
    pub(crate) fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// A file with wrong content.
    pub(crate) fn file(path: impl AsRef<Path>, what: impl Into<String>) -> Error {
        Error::File { path: path.as_ref().to_path_buf(), what: what.into() }
    }

    /// A tensor that is not what it should be.
    pub(crate) fn tensor(
        file: impl AsRef<Path>,
        tensor: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        let file = file.as_ref().to_path_buf();
        Error::Tensor { file, tensor: tensor.into(), expected: expected.into(), found: found.into() }
    }

    /// What the user can do about it, where there is something to do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Error::NoModel { .. } => Some(
                "give a directory in Hugging Face layout, a GGUF file, `demo`, or fetch the model with `aoji pull OWNER/NAME`",
            ),
            Error::NoGpu(_) => Some("`aoji doctor` shows what is missing; `--device cpu` runs without a GPU"),
            Error::Context { .. } => Some("shorten the prompt or ask for a larger context with `--context`"),
            _ => None,
        }
    }
}
