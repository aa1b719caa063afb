//! Errors as OpenAI's API reports them.

use crate::error::Error;
use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

/// What went wrong with a request, and with which of its fields.
#[derive(Debug, Clone)]
pub(super) struct ApiError {
    pub status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    pub param: Option<String>,
    pub message: String,
}

/// The body of a reply that says what went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ErrorReply {
    error: ErrorBody,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
struct ErrorBody {
    /// What is wrong, for people.
    message: String,
    /// Class of the error.
    #[serde(rename = "type")]
    kind: &'static str,
    /// The field of the request that is wrong, where one is.
    param: Option<String>,
    /// What is wrong, for programs.
    code: Option<&'static str>,
}

impl ApiError {
    /// A field has a value that it cannot have.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let param = Some(param.into());
        Self { param, ..Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message) }
    }

    /// The request as a whole is wrong.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message)
    }

    /// A field that asks for something that aoji does not do.
    pub fn unsupported(param: &str, why: &str) -> Self {
        let code = Some("unsupported_parameter");
        let param = Some(param.to_string());
        let message = format!("{}: {why}", param.as_deref().unwrap_or_default());
        Self { code, param, ..Self::bad(message) }
    }

    /// Prompt and answer are longer than the context.
    pub fn context(prompt: usize, answer: usize, max: usize, param: &str) -> Self {
        let needed = prompt.saturating_add(answer);
        // The text begins with OpenAI's words: clients like litellm recognise by them that a conversation has to be
        // shortened.
        let message = format!(
            "this model's maximum context length is {max} tokens, and the request needs {needed}: {prompt} of the prompt and {answer} for the answer"
        );
        Self { code: Some("context_length_exceeded"), ..Self::invalid(param, message) }
    }

    /// No model has this name.
    pub fn no_model(name: &str, names: &[String]) -> Self {
        let message = format!("model {name:?} does not exist; served here: {}", names.join(", "));
        let (param, code) = (Some("model".into()), Some("model_not_found"));
        Self { param, code, ..Self::new(StatusCode::NOT_FOUND, "invalid_request_error", None, message) }
    }

    /// No route has this path.
    pub fn no_route(method: &str, path: &str) -> Self {
        let message = format!("no route {method} {path}; /openapi.json lists all");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("unknown_url"), message)
    }

    /// A route does not know this method.
    pub fn no_method(method: &str, path: &str) -> Self {
        let message = format!("{path} does not take {method}; /openapi.json lists what it takes");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", Some("method_not_allowed"), message)
    }

    /// No API key, or a wrong one.
    pub fn no_key() -> Self {
        let message = "missing or wrong API key: send it as `Authorization: Bearer KEY` or `X-Api-Key: KEY`";
        Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", Some("invalid_api_key"), message)
    }

    /// More bytes than the server takes.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("the body is longer than {limit} bytes, the most that this server takes (--body-limit)");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", Some("request_too_large"), message)
    }

    /// Another content type than JSON.
    pub fn not_json(found: &str) -> Self {
        let message = format!("content type {found:?}: expected application/json, sent as the header Content-Type");
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", Some("unsupported_media_type"), message)
    }

    /// The queue is full.
    pub fn queue_full(waiting: usize) -> Self {
        let message = format!("the queue is full: {waiting} answers run or wait; try again later");
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("queue_full"), message)
    }

    /// The server cannot answer now, or not any more.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("unavailable"), message)
    }

    /// A fault in aoji itself.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", Some("internal_error"), message)
    }

    /// The model could not continue in a way that the required format allows.
    pub fn constraint(message: impl Into<String>) -> Self {
        let code = Some("constraint_failed");
        Self { code, ..Self::bad(message) }
    }

    /// An error of the library, caused by a value of `param`.
    pub fn from_library(error: Error, param: &str) -> Self {
        match error {
            Error::Context { needed, max } => Self::context(needed, 0, max, param),
            Error::Input(message) => Self::invalid(param, message),
            other => Self::unavailable(other.to_string()),
        }
    }

    /// The same in an API that calls the field `f` of a chat `own(f)`.
    pub fn renamed(mut self, own: fn(&str) -> String) -> Self {
        if let Some(param) = self.param.take() {
            let own = own(&param);
            if let Some(rest) = self.message.strip_prefix(&param).filter(|rest| rest.starts_with(':')) {
                self.message = format!("{own}{rest}");
            }
            self.param = Some(own);
        }
        self
    }

    /// The body that is sent, also as the last event of a stream that fails.
    pub fn reply(&self) -> ErrorReply {
        let Self { kind, code, ref param, ref message, .. } = *self;
        ErrorReply { error: ErrorBody { message: message.clone(), kind, param: param.clone(), code } }
    }

    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, kind, code, param: None, message: message.into() }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.reply())).into_response();
        response.extensions_mut().insert(self.clone()); // for APIs with errors of another shape
        let headers = response.headers_mut();
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
