//! Tests that need no device: files, text, downloads.

#[path = "../common/mod.rs"]
mod common;
mod config;
#[cfg(feature = "cli")]
mod download;
mod files;
mod gguf;
#[path = "../common/gguf.rs"]
mod gguf_file;
mod gguf_vocabulary;
mod prompt;
mod quantize;
mod quantized;
#[cfg(unix)]
mod reader;
mod rope;
mod synth;
mod text;
#[path = "../common/tiny_gguf.rs"]
mod tiny_gguf;
mod token_ids;
mod tokenizer_files;
mod tokenizers;
