//! LoRA adapters as PEFT stores them, added to the weights of the model that they were trained on (Hu et al. 2021).
//!
//! An adapter is `adapter_config.json` and `adapter_model.safetensors`. Each adapted matrix becomes `W + scale * B A`
//! with `scale = lora_alpha / r` (`/ sqrt(r)` with `use_rslora`; rank and alpha may differ between matrices). This is
//! computed in f32 and rounded once to the type that the device computes with; PEFT's `merge_and_unload` gives the
//! same.
mod adapter;
mod config;
mod merge;

pub(crate) use adapter::merged;
pub use adapter::{Lora, LoraSpec};
pub use config::TARGETS;
pub use merge::merge_checkpoint;
