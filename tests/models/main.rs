//! Real models: against Hugging Face, and the embedded one against its list of answers.

mod arch;
mod calibration;
#[path = "../common/mod.rs"]
mod common;
mod demo;
mod gguf;
#[path = "../common/gguf.rs"]
mod gguf_file;
mod golden;
mod kobest;
mod lora;
mod perplexity;
#[path = "../common/tiny_gguf.rs"]
mod tiny_gguf;
