//! Inference of Llama-like models (Llama, Mistral, Qwen2, Qwen3) on one GPU or a CPU, made for low latency.
//!
//! An [`Engine`] is a loaded model, immutable and shared; a [`Session`] is one growing sequence of tokens with its KV
//! cache (the keys and values of attention); [`Session::generate`] is an iterator of events. The README has a picture
//! of how the modules depend on each other.
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
//!
//! # Below text
//!
//! A session is given whole sequences of tokens and computes only what differs from the tokens that it already holds.
//! Then the caller can read the logits, or take the tokens that follow one by one, and stops by dropping the iterator.
//!
//! ```
//! # use aoji::{Device, Engine, Options, Sampling};
//! # fn main() -> aoji::Result<()> {
//! # let engine = Engine::open("demo", &Options { device: Device::Cpu, ..Options::default() })?;
//! let tokens = engine.tokenizer()?.encode("하늘은 파란색", true)?;
//! let mut session = engine.session(64)?;
//! assert_eq!(session.sync(&tokens)?, 0);
//! let logits = session.logits()?;
//! assert_eq!(logits.len(), engine.config().vocab);
//!
//! let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
//! let three: Vec<u32> = session.decode(&Sampling::default(), &[])?.take(3).collect::<aoji::Result<_>>()?;
//! assert_eq!(best, Some(three[0] as usize));
//!
//! assert_eq!(session.sync(&tokens)?, tokens.len() - 1); // back again; the last token's logits are computed anew
//! # Ok(())
//! # }
//! ```
//!
//! A generation is cancelled the same way, and the session goes on from what was generated:
//!
//! ```
//! # use aoji::{Device, Engine, Event, GenerateOptions, Options};
//! # fn main() -> aoji::Result<()> {
//! # let engine = Engine::open("demo", &Options { device: Device::Cpu, ..Options::default() })?;
//! # let prompt = engine.tokenizer()?.encode("하늘은 파란색", true)?;
//! let mut session = engine.session(64)?;
//! for event in session.generate(&prompt, &GenerateOptions::default())? {
//!     if let Event::Token(_) = event? {
//!         break; // drops the iterator
//!     }
//! }
//! let longer = session.tokens().to_vec();
//! assert_eq!(longer.len(), prompt.len() + 1);
//! assert_eq!(session.sync(&longer)?, prompt.len());
//! # Ok(())
//! # }
//! ```
//!
//! # Inside your program
//!
//! The library leaves the process alone. It prints nothing (what it has to say goes to [`tracing`]), never ends the
//! process, and installs no handlers of signals or panics. It has no global state but three things that belong to the
//! process: rayon's pool, the threads on which the CPU computes ([`Options::threads`] gives an engine its own), and
//! where cuBLAS was found. Engines and sessions are independent of each other, and what they hold, on the device too,
//! is freed when the last of them is dropped. Environment variables are read, never set.
//!
//! Every call that can fail returns [`Error`], the one error type; a call with wrong arguments leaves a session as it
//! was. A panic is a bug. Calls block: an asynchronous program runs them in a thread (`examples/tokio_embed.rs`). Any
//! number of threads may use an [`Engine`] at once, a [`Session`] only one at a time. The crates in `capi`
//! and `python` offer most of this to C and Python; adapters are missing in both, batches in C, saved sessions in Python.
#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

pub mod backend;
mod engine;
mod error;
mod files;
mod measure;
pub mod model;
pub mod ops;
#[cfg(feature = "server")]
pub mod server;
mod text;
pub mod train;
pub mod tiles {
    //! Numbers that kernels and launch code share, from `kernels/common/tiles.h`.
    include!(concat!(env!("OUT_DIR"), "/tiles.rs"));
}

#[cfg(feature = "cuda")]
pub use backend::cuda;
pub use backend::{count, cpu, lockstep};
pub use engine::{
    Activations, Batch, BatchOptions, Constraint, Decode, Device, Draft, Drafter, Engine, Event, Finish, FinishReason,
    GenerateOptions, Generation, Job, JobEvent, JobId, Load, Options, Pooling, Sampling, Session, Speculate, StoppedBy,
    Timings, TokenLogprobs, score,
};
pub use error::{Error, Result};
pub use files::{
    ModelFiles, Phase, Startup, StartupReport,
    config::{self, Arch, Config, Dtype, RopeScaling, SamplingDefaults},
    format::{self, Format},
    gguf, hub, lora, model_files, output, quantize, synth,
    weights::{self, Biases, LayerTensors, Tensor, Weights},
};
pub use measure::{bench, calibration, divergence, eval, invariance, verify};
pub use model::{kv, plan::Plan};
pub use ops::KvDtype;
pub use text::{
    AOG_INSTRUCTION, CalledFunction, Found, Jinja, Message, StopStrings, Template, TokenStream, Tokenizer, ToolCall,
    Turn,
};
