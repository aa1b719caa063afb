//! Low-latency inference of Llama-architecture models on one GPU.
#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

pub mod config;
mod error;
pub mod hub;
pub mod weights;

pub use config::{Config, Dtype, RopeScaling};
pub use error::{Error, Result};
pub use weights::{LayerTensors, Tensor, Weights};
