//! `POST /v1/responses`: OpenAI's newer API, but without stored conversations: a request carries its whole
//! conversation.
//!
//! `request` turns it into a chat, and `reply` turns the answer into output items and named events. In between, it is
//! handled like a chat.

mod reply;
mod request;

use super::{
    body::Body,
    error::{ApiError, ErrorReply},
    log::RequestLog,
    state::{Server, State},
};
use axum::{Extension, extract, response::Response};
use reply::{ResponseEvent, ResponseObject, Responses};
use request::ResponsesRequest;
use std::sync::Arc;

/// Continues a conversation, in the shape of OpenAI's Responses.
#[utoipa::path(
    post, path = "/v1/responses", tag = "openai", security((), ("key" = [])), request_body = ResponsesRequest,
    responses(
        (status = 200, description = "The answer; with `stream` named server-sent events", content(
            (ResponseObject = "application/json"), (ResponseEvent = "text/event-stream")
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
        let (request, echoed) = request::prepare(state, body)?;
        let responses = Responses::new(&request, echoed);
        Ok((request, responses))
    };
    server.reply(body, log, read).await
}
