//! Bodies of requests: how they are read, and in which thread they are processed.

use super::{error::ApiError, state::Server, worker::Phase};
use axum::{
    body::Bytes,
    extract::{FromRequest, Request},
    http::{StatusCode, header},
};
use std::time::Duration;

/// The longest that a client may take to send a body.
const BODY_SECONDS: u64 = 60;

/// A request of at most this many bytes is processed in the thread that received it; handing it to another would take
/// longer.
const SHORT: usize = 2048;

/// Does the work of a request of `bytes` bytes.
pub(super) async fn work<T: Send + 'static>(
    bytes: usize,
    f: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if bytes <= SHORT { f() } else { blocking(f).await }
}

/// Does long work, such as tokenizing a book, where it does not hold up other requests.
pub(super) async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(f).await {
        Ok(result) => result,
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic), // `panicked` makes a reply of it
            Err(_) => Err(ApiError::unavailable("the server is shutting down")),
        },
    }
}

/// The body of a request, which should be JSON but is not parsed yet. Refused while the server is not ready.
pub(super) struct Body(pub Bytes);

impl FromRequest<Server> for Body {
    type Rejection = ApiError;
    async fn from_request(request: Request, server: &Server) -> Result<Body, ApiError> {
        let metrics = &server.0.metrics;
        match server.phase() {
            Phase::Starting | Phase::Ready => {}
            Phase::Draining => {
                metrics.rejected("draining");
                return Err(ApiError::unavailable("the server is shutting down"));
            }
            Phase::Failed(why) => return Err(ApiError::unavailable(format!("the engine has stopped: {why}"))),
        }
        if let Some(found) = request.headers().get(header::CONTENT_TYPE) {
            let found = String::from_utf8_lossy(found.as_bytes());
            let essence = found.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
            if essence != "application/json" && !essence.ends_with("+json") {
                return Err(ApiError::not_json(&found));
            }
        }
        let limit = server.0.options.body_limit;
        let read = tokio::time::timeout(Duration::from_secs(BODY_SECONDS), Bytes::from_request(request, server)).await;
        match read {
            Ok(Ok(bytes)) => Ok(Body(bytes)),
            Ok(Err(e)) if e.status() == StatusCode::PAYLOAD_TOO_LARGE => Err(ApiError::too_large(limit)),
            Ok(Err(e)) => Err(ApiError::bad(format!("the body could not be read: {e}"))),
            Err(_) => Err(ApiError::bad(format!("the body did not arrive within {BODY_SECONDS} seconds"))),
        }
    }
}
