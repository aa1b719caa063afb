//! The options of a server.

use super::{calls::ToolParser, policy::UnknownFields};
use crate::{
    SamplingDefaults, Speculate, Template,
    error::{Error, Result},
};
use axum::http::{HeaderName, HeaderValue, Method};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

/// How to serve.
#[derive(Clone)]
pub struct ServerOptions {
    /// Names under which requests know the model, at least one.
    pub names: Vec<String>,
    /// Answers that are generated at the same time; their cache is what the engine [planned](crate::Options::cache_tokens).
    pub sequences: usize,
    /// Most tokens of a prompt that are computed between two steps of the running answers.
    pub prefill_chunk: usize,
    /// Answers that may wait besides the ones that run; more are refused with 429.
    pub queue: usize,
    /// API keys. Without any, everybody is let in.
    pub keys: Vec<String>,
    /// Origins of web pages that may use the server; `*` is any.
    pub cors: Vec<String>,
    /// Most bytes of a request's body.
    pub body_limit: usize,
    /// How chats become prompts, if not by the model's own template.
    pub template: Option<Template>,
    /// How the model writes calls of functions.
    pub tool_parser: ToolParser,
    /// What happens to unknown fields.
    pub unknown_fields: UnknownFields,
    /// Sampling for requests that do not set it: what the model's author recommends.
    pub sampling: SamplingDefaults,
    /// Whether the next tokens are guessed for requests that do not say: answers come faster, and are the same.
    pub speculate: Speculate,
    /// How many tokens of earlier answers to the same key [`Speculate::Ngram`] may use for guesses.
    pub speculate_memory: usize,
    /// The checkpoint's `tokenizer_config.json`, for `/tokenizer_info`.
    pub tokenizer_config: serde_json::Map<String, serde_json::Value>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            names: vec!["aoji".into()],
            sequences: 8,
            prefill_chunk: 256,
            queue: 64,
            keys: Vec::new(),
            cors: Vec::new(),
            body_limit: 16 << 20,
            template: None,
            tool_parser: ToolParser::default(),
            unknown_fields: UnknownFields::default(),
            sampling: SamplingDefaults::default(),
            speculate: Speculate::default(),
            speculate_memory: 0,
            tokenizer_config: serde_json::Map::new(),
        }
    }
}

/// Which web pages may use the server.
pub(super) fn cors(origins: &[String]) -> Result<Option<CorsLayer>> {
    if origins.is_empty() {
        return Ok(None);
    }
    let origin = |origin: &String| match HeaderValue::from_str(origin) {
        Ok(value) if origin.contains("://") && !origin.ends_with('/') => Ok(value),
        _ => Err(Error::Input(format!("CORS origin {origin:?}: expected * or an origin like https://example.com"))),
    };
    let allowed = match origins.iter().any(|o| o == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().map(origin).collect::<Result<Vec<_>>>()?),
    };
    let exposed = ["x-request-id", "x-aoji-ignored-params", "retry-after"].map(HeaderName::from_static);
    let cors = CorsLayer::new().allow_origin(allowed).allow_methods([Method::GET, Method::POST]);
    // Clients send headers of their own, such as x-stainless-lang, and more of them with each version. Who is let in is
    // decided by the origin and the key: a page of an allowed origin may send any header.
    Ok(Some(cors.allow_headers(AllowHeaders::mirror_request()).expose_headers(exposed)))
}
