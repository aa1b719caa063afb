//! Runs a model: the engine holds it, a session works on one sequence of tokens, and a batch on several at once.
mod batch;
mod generate;
mod load;
mod sampler;
pub mod score;
mod session;
mod speculate;
mod timeline;

pub use batch::{Batch, BatchOptions, Constraint, Finish, Job, JobEvent, JobId, Load, Pooling, TokenLogprobs};
pub use generate::{Event, FinishReason, GenerateOptions, Generation, StoppedBy, Timings};
pub(crate) use load::Opened;
pub use load::{Activations, Device, Engine, Options};
pub use sampler::Sampling;
pub use session::{Decode, Session};
pub use speculate::{Draft, Drafter, Speculate};
