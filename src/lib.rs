//! Low-latency inference of Llama-architecture models on one GPU.
#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

mod error;

pub use error::{Error, Result};
