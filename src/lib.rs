//! Low-latency inference of Llama-architecture models on one GPU.
#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

pub mod backend;
pub mod bench;
pub mod config;
pub mod count;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod engine;
mod error;
mod generate;
pub mod hub;
pub mod kv;
pub mod lockstep;
pub mod model;
pub mod ops;
mod sampler;
mod session;
pub mod synth;
mod text;
mod timeline;
pub mod verify;
pub mod weights;
pub mod tiles {
    //! Numbers that kernels and launch code share, from `kernels/common/tiles.h`.
    include!(concat!(env!("OUT_DIR"), "/tiles.rs"));
}

pub use config::{Config, Dtype, RopeScaling};
pub use engine::{Activations, Device, Engine, ModelFiles, Options, Plan};
pub use error::{Error, Result};
pub use generate::{Event, FinishReason, GenerateOptions, Generation, Timings};
pub use sampler::Sampling;
pub use session::{Decode, Session};
pub use text::{AOG_INSTRUCTION, Found, Jinja, Message, StopStrings, Template, TokenStream, Tokenizer, Turn};
pub use weights::{LayerTensors, Tensor, Weights};
