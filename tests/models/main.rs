//! Real models: against Hugging Face, and the embedded one against its list of answers.

mod arch;
mod calibration;
#[path = "../common/mod.rs"]
mod common;
mod demo;
mod gguf;
mod golden;
mod kobest;
mod lora;
mod perplexity;
