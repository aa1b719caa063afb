//! One line in the log for each request, written when its reply has ended.

use super::{state::Server, usage::Tally};
use axum::{
    extract::{Request, State},
    http::{HeaderName, HeaderValue, StatusCode},
    middleware::Next,
    response::Response,
};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering},
    },
    time::Instant,
};

/// A request that is being answered. Its line is written when the last owner drops it: for a stream that is when the
/// stream ends, or when the client goes away.
pub(super) struct RequestLog {
    id: String,
    method: String,
    path: String,
    begin: Instant,
    status: AtomicU16,
    complete: AtomicBool,
    counts: Mutex<Counts>,
    /// Number of the API key that it came with.
    key: AtomicUsize,
}

#[derive(Default, Clone)]
struct Counts {
    prompt_tokens: usize,
    tokens: usize,
    ttft_ms: f64,
    error: Option<String>,
}

impl RequestLog {
    /// The number of the API key that it came with; 0 if there are no keys.
    pub fn key(&self) -> usize {
        self.key.load(Ordering::Relaxed)
    }

    /// Notes the key that it came with.
    pub fn set_key(&self, key: usize) {
        self.key.store(key, Ordering::Relaxed);
    }

    /// Takes over the counts so far.
    pub fn tally(&self, tally: &Tally) {
        let usage = tally.usage();
        self.change(|counts| {
            counts.prompt_tokens = usage.prompt_tokens;
            counts.tokens = usage.completion_tokens;
            counts.ttft_ms = tally.ttft_ms();
        });
    }

    /// Something went wrong in the middle of a reply.
    pub fn error(&self, what: &str) {
        self.change(|counts| counts.error = Some(what.into()));
    }

    /// The reply was made to its end.
    pub fn complete(&self) {
        self.complete.store(true, Ordering::Relaxed);
    }

    fn change(&self, f: impl FnOnce(&mut Counts)) {
        f(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for RequestLog {
    fn drop(&mut self) {
        let counts = self.counts.get_mut().unwrap_or_else(PoisonError::into_inner).clone();
        // 499 is what other servers log for a client that did not wait; it was never sent.
        let status = if self.complete.load(Ordering::Relaxed) { self.status.load(Ordering::Relaxed) } else { 499 };
        let ms = |ms: f64| (ms * 1e3).round() / 1e3;
        tracing::info!(
            id = %self.id,
            method = %self.method,
            path = %self.path,
            status,
            prompt_tokens = counts.prompt_tokens,
            tokens = counts.tokens,
            ttft_ms = ms(counts.ttft_ms),
            ms = ms(self.begin.elapsed().as_secs_f64() * 1e3),
            error = counts.error,
            "request"
        );
    }
}

/// Gives each request an id, the client's own if it sent one, and a line in the log.
pub(super) async fn log(State(_): State<Server>, mut request: Request, next: Next) -> Response {
    const ID: HeaderName = HeaderName::from_static("x-request-id");
    let plain = |id: &&str| (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
    let sent = request.headers().get(&ID).and_then(|id| id.to_str().ok()).filter(plain);
    let id = sent.map_or_else(|| format!("{:016x}", fastrand::u64(..)), String::from);
    let log = Arc::new(RequestLog {
        id: id.clone(),
        method: request.method().as_str().chars().take(16).collect(),
        path: request.uri().path().chars().take(200).collect(),
        begin: Instant::now(),
        status: AtomicU16::new(0),
        complete: AtomicBool::new(false),
        counts: Mutex::default(),
        key: AtomicUsize::new(0),
    });
    request.extensions_mut().insert(log.clone());
    let mut response = next.run(request).await;
    log.status.store(response.status().as_u16(), Ordering::Relaxed);
    let streams = response.headers().contains_key("x-accel-buffering");
    if !(streams && response.status() == StatusCode::OK) {
        log.complete();
    }
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(ID, id);
    }
    response
}
