//! Text in and text out: tokenizer, streaming decoder, stop strings, prompt templates.
//!
//! ```text
//! messages ─► Template ─► Tokenizer ─► ids ─► (model) ─► ids ─► TokenStream ─► StopStrings ─► text
//! ```

mod jinja;
mod prompt;
mod stop;
mod stream;
mod tokenizer;

pub use jinja::Jinja;
pub(crate) use jinja::special_tokens;
pub use prompt::{AOG_INSTRUCTION, Message, Template, Turn};
pub use stop::{Found, StopStrings};
pub use stream::TokenStream;
pub use tokenizer::Tokenizer;
