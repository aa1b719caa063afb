//! Low-latency inference of Llama-architecture models on one GPU.
//!
//! An [`Engine`] is a loaded model, immutable and shared; a [`Session`] is one timeline of tokens with its KV cache;
//! [`Session::generate`] is an iterator of events. The README has the picture of how the modules stand to each other.
//!
//! ```
//! use aoji::{Device, Engine, Event, GenerateOptions, Message, Options};
//!
//! # fn main() -> aoji::Result<()> {
//! let options = Options { device: Device::Cpu, ..Options::default() };
//! let engine = Engine::open("demo", &options)?;
//! let prompt = engine.template().encode(engine.tokenizer()?, &[Message::new("user", "넌 누구니?")], None)?;
//! let mut session = engine.session(prompt.len() + 100)?;
//! let mut answer = String::new();
//! for event in session.generate(&prompt, &GenerateOptions::default())? {
//!     if let Event::Text(piece) = event? {
//!         answer.push_str(&piece);
//!     }
//! }
//! assert!(answer.contains("데모 모델"));
//! # Ok(())
//! # }
//! ```
#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

pub mod backend;
mod batch;
pub mod bench;
pub mod config;
pub mod count;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod engine;
mod error;
pub mod eval;
mod generate;
pub mod hub;
pub mod invariance;
pub mod kv;
pub mod lockstep;
pub mod lora;
pub mod model;
pub mod ops;
mod sampler;
pub mod score;
#[cfg(feature = "server")]
pub mod server;
mod session;
mod startup;
pub mod synth;
mod text;
mod timeline;
pub mod verify;
pub mod weights;
pub mod tiles {
    //! Numbers that kernels and launch code share, from `kernels/common/tiles.h`.
    include!(concat!(env!("OUT_DIR"), "/tiles.rs"));
}

pub use batch::{Batch, BatchOptions, Constraint, Finish, Job, JobEvent, JobId, Load, StoppedBy, TokenLogprobs};
pub use config::{Config, Dtype, RopeScaling};
pub use engine::{Activations, Device, Engine, ModelFiles, Options, Plan};
pub use error::{Error, Result};
pub use generate::{Event, FinishReason, GenerateOptions, Generation, Timings};
pub use sampler::Sampling;
pub use session::{Decode, Session};
pub use startup::{Phase, Startup, StartupReport};
pub use text::{AOG_INSTRUCTION, Found, Jinja, Message, StopStrings, Template, TokenStream, Tokenizer, Turn};
pub use weights::{LayerTensors, Tensor, Weights};
