//! Training of LoRA adapters (Hu et al. 2021): `aoji tune`, and `aoji data`, which prepares its rows.
//!
//! ```text
//! TuneConfig ─► Data ─► micro-batches ─► Pass (loss, gradients) ─► AdamW ─► adapter, checkpoints, train.jsonl
//! ```
//!
//! The bits of an adapter depend on the model, the configuration, the data, and on whether a CPU or a GPU computes: not on the
//! threads or which CPU, on whether activations are kept or recomputed, or on where the run was interrupted.

mod adapter;
mod checkpoint;
mod config;
mod data;
mod keys;
mod pass;
mod place;
mod plan;
mod prepare;
mod prompt;
mod run;

pub use adapter::{Adapter, Shape, Site};
pub use config::{LossMean, Resume, Scheduler, TuneConfig};
pub use data::{Data, Dropped, Packing, rows};
pub use keys::KEYS;
pub use pass::{MicroBatch, Pass, Sizes, Training};
pub(crate) use place::On;
pub use place::Place;
pub use plan::Summary;
pub use prepare::{CARD_INSTRUCTION, CARD_SHARE, Pair, Prepare, Source};
pub use prompt::{Encoder, Example, Kind, PromptFormat, eos};
pub use run::{Line, Outcome, TuneEvent, Tuner, tokens_of};
