//! Text in and text out: tokenizer, streaming decoder, stop strings, prompt templates.
//!
//! ```text
//! messages ─► Template ─► Tokenizer ─► ids ─► (model) ─► ids ─► TokenStream ─► StopStrings ─► text
//! ```

mod decoding;
mod jinja;
mod message;
mod percent;
mod prompt;
mod python;
mod stop;
mod stream;
mod strftime;
mod tokenizer;
mod tokenizer_config;
mod tokenizer_file;
mod tool;

pub use jinja::Jinja;
pub use message::{Message, Turn};
pub use prompt::{AOG_INSTRUCTION, Template};
pub use stop::{Found, StopStrings};
pub use stream::TokenStream;
pub use tokenizer::Tokenizer;
#[cfg(feature = "server")]
pub use tokenizer_config::tokenizer_config;
pub(crate) use tokenizer_config::{ChatTemplate, TokenizerConfig};
#[cfg(feature = "server")]
pub(crate) use tool::json_line;
pub use tool::{CalledFunction, ToolCall};
