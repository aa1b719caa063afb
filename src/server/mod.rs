//! An HTTP server that speaks OpenAI's APIs and Anthropic's.
//!
//! ```text
//! HTTP ─► router ─► chat, completions ────► prepare ─► worker (one thread, owns the Batch) ─► answer ─► reply ─► JSON or SSE
//!                   responses, anthropic
//!                   embeddings
//! ```
//!
//! [`Server::start`] gives the batch a thread of its own; [`Server::router`] is an axum service that can be part of
//! another program, and [`Server::serve`] runs it on a socket until it is told to stop. `docs/server.md` lists routes
//! and fields.
//!
//! ```no_run
//! use aoji::{Engine, Options, server::{Server, ServerOptions}};
//! use std::time::Duration;
//!
//! # async fn serve() -> Result<(), Box<dyn std::error::Error>> {
//! let engine = Engine::open("demo", &Options::default())?;
//! let server = Server::start(engine, ServerOptions::default())?;
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:8080").await?;
//! let for_ever = std::future::pending();
//! server.serve(listener, for_ever, Duration::from_secs(30)).await;
//! # Ok(())
//! # }
//! ```

mod answer;
mod anthropic;
mod body;
mod calls;
mod chat;
mod choices;
mod completions;
mod constrain;
mod embeddings;
mod error;
mod fields;
mod info;
mod listen;
mod log;
mod logprobs;
mod memory;
mod messages;
mod metrics;
mod options;
mod parts;
mod policy;
mod prepare;
mod reply;
mod responses;
mod router;
mod state;
mod tokens;
mod tools;
mod usage;
mod worker;

pub use crate::text::tokenizer_config;
pub use calls::ToolParser;
pub use constrain::{Format, Grammar, Grammars};
pub use options::ServerOptions;
pub use policy::UnknownFields;
pub use state::Server;
pub use worker::Phase;
