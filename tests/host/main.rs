//! What needs no device: files, text, downloads.

#[path = "../common/mod.rs"]
mod common;
mod config;
mod files;
mod prompt;
#[cfg(feature = "cli")]
mod pull;
mod synth;
mod text;
mod tokenizers;
