//! What needs no device: files, text, downloads.

#[path = "../common/mod.rs"]
mod common;
mod config;
#[cfg(feature = "cli")]
mod download;
mod files;
mod prompt;
#[cfg(unix)]
mod reader;
mod rope;
mod synth;
mod text;
mod token_ids;
mod tokenizers;
