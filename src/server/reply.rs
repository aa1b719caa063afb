//! Runs the jobs of a request and makes the response, whole or as a stream of events, in the shape of an API.

use super::{
    answer::{Answers, Delta},
    body::work,
    error::ApiError,
    log::RequestLog,
    memory::Remembering,
    prepare::Prepared,
    state::{Server, State},
    usage::Tally,
};
use crate::Speculate;
use axum::{
    Json,
    body::Bytes,
    http::{HeaderMap, HeaderName, HeaderValue},
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
};
use futures_util::stream;
use serde::Serialize;
use std::{collections::VecDeque, convert::Infallible, mem, sync::Arc, time::Duration};

/// A stream says something at least so often, for proxies that close a connection on which nothing is said.
const SILENCE: Duration = Duration::from_secs(15);

/// How an API shapes the answers to a request.
pub(super) trait Api: Send + 'static {
    /// The body of a response that is not streamed.
    type Reply: Serialize + Send;

    /// Adds to answer `index` of such a body.
    fn add(&mut self, index: usize, delta: Delta);
    /// The body, once everything has been added.
    fn reply(self, tally: &Tally) -> Self::Reply;
    /// The events with which a stream begins, before anything is computed.
    fn begin(&mut self, _tally: &Tally) -> Vec<Event> {
        Vec::new()
    }
    /// The events that report what is new of answer `index`.
    fn events(&mut self, index: usize, delta: Delta, tally: &Tally) -> Vec<Event>;
    /// The events after the last answer.
    fn end(&mut self, tally: &Tally) -> Vec<Event>;
    /// The last events of a stream that fails.
    fn error(&mut self, error: &ApiError) -> Vec<Event>;
}

/// An event, with a name if the API names its events. Our own types can always be written as JSON; if one cannot, that
/// is logged.
pub(super) fn event(name: Option<&str>, data: &impl Serialize) -> Option<Event> {
    let event = name.map_or_else(Event::default, |name| Event::default().event(name));
    event.json_data(data).inspect_err(|error| tracing::error!("an event cannot be written: {error}")).ok()
}

impl Server {
    /// Reads a body with `read`, runs the jobs of the request, and responds.
    pub(super) async fn reply<A: Api>(
        &self,
        body: Bytes,
        log: Arc<RequestLog>,
        read: impl FnOnce(&State, &[u8]) -> Result<(Prepared, A), ApiError> + Send + 'static,
    ) -> Result<Response, ApiError> {
        let state = self.0.clone();
        state.admit(1)?; // refused before the work of reading it
        let (request, api) = work(body.len(), move || read(&state, &body)).await?;
        self.0.run(request, api, log).await
    }
}

impl State {
    async fn run<A: Api>(
        self: &Arc<Self>,
        mut request: Prepared,
        mut api: A,
        log: Arc<RequestLog>,
    ) -> Result<Response, ApiError> {
        self.constrain(&mut request).await?;
        let mut tally = Tally::new(&request.prompts, request.n);
        log.tally(&tally);
        let (mut jobs, key) = (mem::take(&mut request.jobs), log.key());
        let n = jobs.len();
        for job in jobs.iter_mut().filter(|job| job.options.speculate == Speculate::Ngram) {
            job.options.earlier = self.memory.of(key);
        }
        let running = self.worker.submit(jobs).await.inspect_err(|e| self.refused(e))?;
        let mut answers = Answers::new(running, request.stop_ids, n, Remembering::new(self.memory.clone(), key, n));
        let headers = ignored_header(&request.ignored);
        if request.stream {
            // Until something comes a gateway may give the request to another server, and an error has its status.
            let first = match tokio::time::timeout(SILENCE, answers.next()).await {
                Ok(Some(Err(error))) => return Err(error),
                first => first.ok(),
            };
            let queue = VecDeque::from(api.begin(&tally));
            let mut events = Events { answers, api, tally, queue, log, done: false };
            if let Some(first) = first {
                events.take(first);
            }
            let body = stream::unfold(events, |mut events| async move {
                let event = events.next().await?;
                Some((Ok::<_, Infallible>(event), events))
            });
            // Comments keep proxies from closing a connection on which a long prompt is being computed.
            let body = Sse::new(body).keep_alive(KeepAlive::new().interval(SILENCE));
            let unbuffered = [(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"))];
            return Ok((headers, unbuffered, body).into_response());
        }
        while let Some(next) = answers.next().await {
            let (index, delta) = next?;
            count(&mut tally, index, &delta, &log);
            api.add(index, delta);
        }
        Ok((headers, Json(api.reply(&tally))).into_response())
    }
}

/// Counts what arrived.
pub(super) fn count(tally: &mut Tally, index: usize, delta: &Delta, log: &RequestLog) {
    tally.tokens(delta.tokens.len());
    if let Some(end) = &delta.end {
        tally.end(index, end);
    }
    log.tally(tally); // each time, since this is dropped if the client goes away
}

/// The events of a stream. Dropping it cancels what has not ended.
struct Events<A> {
    answers: Answers,
    api: A,
    tally: Tally,
    queue: VecDeque<Event>,
    log: Arc<RequestLog>,
    done: bool,
}

impl<A: Api> Events<A> {
    async fn next(&mut self) -> Option<Event> {
        while self.queue.is_empty() && !self.done {
            let next = self.answers.next().await;
            self.take(next);
        }
        self.queue.pop_front()
    }

    /// Queues the events of what came.
    fn take(&mut self, next: Option<Result<(usize, Delta), ApiError>>) {
        let events = match next {
            Some(Ok((index, delta))) => {
                count(&mut self.tally, index, &delta, &self.log);
                self.api.events(index, delta, &self.tally)
            }
            Some(Err(error)) => {
                self.log.error(&error.message);
                self.finish();
                self.api.error(&error)
            }
            None => {
                self.finish();
                self.api.end(&self.tally)
            }
        };
        self.queue.extend(events);
    }

    fn finish(&mut self) {
        self.log.complete();
        self.done = true;
    }
}

/// The header that names the ignored fields.
pub(super) fn ignored_header(names: &[String]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if names.is_empty() {
        return headers;
    }
    // The names come from the client: characters that may not be in a header are replaced, and a long list is cut.
    let text: String = names.join(",").chars().map(|c| if c.is_ascii_graphic() { c } else { '?' }).take(1000).collect();
    if let Ok(value) = HeaderValue::from_str(&text) {
        headers.insert(HeaderName::from_static("x-aoji-ignored-params"), value);
    }
    headers
}
