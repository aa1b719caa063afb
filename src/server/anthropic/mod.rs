//! `POST /v1/messages`: a conversation in the shape of Anthropic's API.
//!
//! `request` turns it into a chat, and `reply` turns the answer into content blocks and named events. In between, it is
//! handled like a chat of OpenAI's API.

mod reply;
mod request;

use super::{
    body::{Body, work},
    error::ApiError,
    log::RequestLog,
    state::{Server, State},
};
use axum::{
    Extension, Json,
    body::Body as Bytes,
    extract::{self, Request},
    http::{HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use reply::{Message, MessageEvent, Messages};
use request::{MessagesRequest, Talk};
use serde::Serialize;
use std::sync::Arc;
use utoipa::ToSchema;

/// Below this path, errors have the shape of this API.
const PATH: &str = "/v1/messages";

/// The body of a reply that says what went wrong, and the last event of a stream that fails.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MessagesError)]
pub(super) struct ErrorReply {
    /// `error`
    #[serde(rename = "type")]
    kind: &'static str,
    error: ErrorBody,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MessagesErrorBody)]
struct ErrorBody {
    /// `invalid_request_error`, `authentication_error`, `not_found_error`, `request_too_large`, `rate_limit_error`, `api_error` or
    /// `overloaded_error`
    #[serde(rename = "type")]
    kind: &'static str,
    /// What is wrong, for people.
    message: String,
}

impl ErrorReply {
    fn of(error: &ApiError) -> ErrorReply {
        let kind = match error.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
            status if status.is_server_error() => "api_error",
            _ => "invalid_request_error",
        };
        // This shape has no field that could name the parameter.
        let message = match &error.param {
            Some(param) if !error.message.starts_with(param.as_str()) => format!("{param}: {}", error.message),
            _ => error.message.clone(),
        };
        ErrorReply { kind: "error", error: ErrorBody { kind, message } }
    }
}

/// Gives every error of these routes the shape of this API, wherever it comes from.
pub(super) async fn errors(request: Request, next: Next) -> Response {
    let own = request.uri().path().starts_with(PATH);
    let mut response = next.run(request).await;
    if own && let Some(error) = response.extensions_mut().remove::<ApiError>() {
        let body = Json(ErrorReply::of(&error)).into_response().into_body();
        let (mut head, _) = response.into_parts();
        head.headers.remove(header::CONTENT_LENGTH);
        head.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        return Response::from_parts(head, Bytes::new(body));
    }
    response
}

/// Continues a conversation, in Anthropic's shape.
#[utoipa::path(
    post, path = "/v1/messages", tag = "anthropic", security((), ("key" = [])), request_body = MessagesRequest,
    responses(
        (status = 200, description = "The answer; with `stream` named server-sent events", content(
            (Message = "application/json"), (MessageEvent = "text/event-stream")
        )),
        (status = "4XX", description = "The request is wrong, or not let in", body = ErrorReply),
        (status = 503, description = "Not answering now", body = ErrorReply),
    )
)]
pub(super) async fn create(
    extract::State(server): extract::State<Server>,
    Extension(log): Extension<Arc<RequestLog>>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    let read = |state: &State, body: &[u8]| {
        let request = request::prepare(state, body)?;
        let messages = Messages::new(&request);
        Ok((request, messages))
    };
    server.reply(body, log, read).await
}

/// How many tokens a conversation has.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TokenCount {
    input_tokens: usize,
}

/// Counts the tokens of the prompt that a conversation becomes.
#[utoipa::path(
    post, path = "/v1/messages/count_tokens", tag = "anthropic", security((), ("key" = [])), request_body = Talk,
    responses(
        (status = 200, description = "The count", body = TokenCount),
        (status = "4XX", description = "The request is wrong", body = ErrorReply),
    )
)]
pub(super) async fn count_tokens(
    extract::State(server): extract::State<Server>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    let state = server.0.clone();
    let (input_tokens, ignored) = work(body.len(), move || request::count(&state, &body)).await?;
    Ok((super::reply::ignored_header(&ignored), Json(TokenCount { input_tokens })).into_response())
}
