//! What is on disk: configurations, weights, adapters, the local Hugging Face cache. Nothing here knows of a device.
mod checkpoint;
pub mod config;
pub mod format;
pub mod gguf;
pub mod hub;
pub(crate) mod json;
pub mod lora;
pub mod model_files;
pub mod output;
pub mod quantize;
pub(crate) mod session_file;
mod shards;
mod startup;
pub mod synth;
pub(crate) mod threads;
mod token_ids;
pub mod weights;

pub use checkpoint::ModelFiles;
pub(crate) use checkpoint::Source;
pub use startup::{Phase, Startup, StartupReport};
