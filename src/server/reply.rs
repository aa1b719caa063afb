//! Replies of both APIs, whole or as a stream.

use super::{
    answer::{Answers, Delta},
    error::ApiError,
    log::RequestLog,
    prepare::Prepared,
    state::{State, now},
    usage::{Tally, Times, Usage},
};
use axum::{
    Json,
    http::{HeaderMap, HeaderName, HeaderValue},
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
};
use futures_util::{Stream, stream};
use serde::Serialize;
use std::{collections::VecDeque, convert::Infallible, mem, sync::Arc};
use utoipa::ToSchema;

/// A reply, or an event of one.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct Reply<C> {
    /// Of the request.
    id: String,
    /// What this is.
    object: &'static str,
    /// Seconds since 1970.
    created: u64,
    /// The name under which the model was asked for.
    model: String,
    /// Changes when the version, the model or the device does.
    system_fingerprint: String,
    /// The answers, or what is new of them.
    choices: Vec<C>,
    /// Counts of tokens; in events of a stream `null` or absent, unless they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    usage: Option<Option<Usage>>,
    /// Where the time went; in a stream with its last choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<Times>,
}

/// What is different between the APIs.
pub(super) trait Shape: Send + 'static {
    /// An answer.
    type Choice: Serialize + Send;
    /// What is new of an answer.
    type Chunk: Serialize + Send;
    /// What `id` begins with.
    const PREFIX: &'static str;
    /// `object` of a reply and of an event.
    const OBJECTS: [&'static str; 2];

    /// Adds to answer `index`.
    fn add(&mut self, index: usize, delta: Delta);
    /// The answers, whole.
    fn choices(self) -> Vec<Self::Choice>;
    /// The events that say what is new of answer `index`.
    fn chunks(&mut self, index: usize, delta: Delta) -> Vec<Self::Chunk>;
}

impl State {
    /// Lets the jobs of a request run.
    pub async fn begin(
        self: &Arc<Self>,
        request: &mut Prepared,
        log: &RequestLog,
    ) -> Result<(Answers, Tally), ApiError> {
        self.constrain(request).await?;
        let tally = Tally::new(&request.prompts, request.n);
        log.tally(&tally);
        let jobs = mem::take(&mut request.jobs);
        let n = jobs.len();
        let running = self.worker.submit(jobs).await.inspect_err(|e| self.refused(e))?;
        Ok((Answers::new(running, mem::take(&mut request.stop_ids), n), tally))
    }

    /// Lets the jobs run and replies.
    pub async fn reply<S: Shape>(
        self: &Arc<Self>,
        mut request: Prepared,
        mut shape: S,
        log: Arc<RequestLog>,
    ) -> Result<Response, ApiError> {
        let left = request.jobs.len();
        let (mut answers, mut tally) = self.begin(&mut request, &log).await?;
        let headers = ignored_header(&request.ignored);
        let id = format!("{}-{:016x}{:08x}", S::PREFIX, fastrand::u64(..), fastrand::u32(..));
        let envelope = Envelope {
            id,
            object: S::OBJECTS[usize::from(request.stream)],
            created: now(),
            model: request.model,
            fingerprint: self.fingerprint.clone(),
        };
        if request.stream {
            let (include_usage, continuous) = (request.include_usage, request.continuous_usage);
            let queue = VecDeque::new();
            let events =
                Events { answers, shape, tally, envelope, include_usage, continuous, left, queue, log, done: false };
            let body = stream::unfold(events, |mut events| async move {
                let event = events.next().await?;
                Some((Ok::<_, Infallible>(event), events))
            });
            return Ok((headers, event_stream(body)).into_response());
        }
        while let Some(next) = answers.next().await {
            let (index, delta) = next?;
            note(&mut tally, index, &delta, &log);
            shape.add(index, delta);
        }
        let reply = envelope.wrap(shape.choices(), Some(Some(tally.usage())), Some(tally.times()));
        Ok((headers, Json(reply)).into_response())
    }
}

/// A stream of events.
pub(super) fn event_stream(events: impl Stream<Item = Result<Event, Infallible>> + Send + 'static) -> Response {
    // Comments keep proxies from closing a connection on which a long prompt is being computed.
    let sse = Sse::new(events).keep_alive(KeepAlive::default());
    let unbuffered = [(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"))];
    (unbuffered, sse).into_response()
}

/// Counts what came.
pub(super) fn note(tally: &mut Tally, index: usize, delta: &Delta, log: &RequestLog) {
    tally.tokens(delta.tokens.len());
    if let Some(end) = &delta.end {
        tally.end(index, end);
    }
    log.tally(tally); // each time: a client that goes away lets nothing run to its end
}

/// What all events of a reply have in common.
struct Envelope {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    fingerprint: String,
}

impl Envelope {
    fn wrap<C>(&self, choices: Vec<C>, usage: Option<Option<Usage>>, timings: Option<Times>) -> Reply<C> {
        Reply {
            id: self.id.clone(),
            object: self.object,
            created: self.created,
            model: self.model.clone(),
            system_fingerprint: self.fingerprint.clone(),
            choices,
            usage,
            timings,
        }
    }
}

/// The events of a stream. Dropping it cancels what has not ended.
struct Events<S: Shape> {
    answers: Answers,
    shape: S,
    tally: Tally,
    envelope: Envelope,
    include_usage: bool,
    continuous: bool,
    /// Answers that have not ended.
    left: usize,
    queue: VecDeque<Event>,
    log: Arc<RequestLog>,
    done: bool,
}

impl<S: Shape> Events<S> {
    async fn next(&mut self) -> Option<Event> {
        while self.queue.is_empty() && !self.done {
            match self.answers.next().await {
                Some(Ok((index, delta))) => self.delta(index, delta),
                Some(Err(error)) => {
                    self.log.error(&error.message);
                    self.push(&error.reply());
                    self.end();
                }
                None => {
                    if self.include_usage {
                        let usage = Some(Some(self.tally.usage()));
                        let last: Reply<S::Chunk> = self.envelope.wrap(Vec::new(), usage, None);
                        self.push(&last);
                    }
                    self.end();
                }
            }
        }
        self.queue.pop_front()
    }

    fn delta(&mut self, index: usize, delta: Delta) {
        note(&mut self.tally, index, &delta, &self.log);
        self.left -= usize::from(delta.end.is_some());
        let mut chunks = self.shape.chunks(index, delta).into_iter().peekable();
        while let Some(chunk) = chunks.next() {
            let last = self.left == 0 && chunks.peek().is_none();
            let usage = match self.continuous {
                true => Some(Some(self.tally.usage())),
                false => self.include_usage.then_some(None),
            };
            let reply = self.envelope.wrap(vec![chunk], usage, last.then(|| self.tally.times()));
            self.push(&reply);
        }
    }

    fn end(&mut self) {
        self.log.complete();
        self.queue.push_back(Event::default().data("[DONE]"));
        self.done = true;
    }

    fn push(&mut self, data: &impl Serialize) {
        match Event::default().json_data(data) {
            Ok(event) => self.queue.push_back(event),
            // Our own types: every one of them can be written.
            Err(error) => self.log.error(&error.to_string()),
        }
    }
}

/// Names the fields that were ignored.
pub(super) fn ignored_header(names: &[String]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if names.is_empty() {
        return headers;
    }
    // The names are the client's: what does not belong into a header is replaced, and many are cut.
    let text: String = names.join(",").chars().map(|c| if c.is_ascii_graphic() { c } else { '?' }).take(1000).collect();
    if let Ok(value) = HeaderValue::from_str(&text) {
        headers.insert(HeaderName::from_static("x-aoji-ignored-params"), value);
    }
    headers
}
