//! From jobs to a response, whole or as a stream of events, in whatever shape an API gives it.

use super::{
    answer::{Answers, Delta},
    body::work,
    error::ApiError,
    log::RequestLog,
    prepare::Prepared,
    state::{Server, State},
    usage::Tally,
};
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
use std::{collections::VecDeque, convert::Infallible, mem, sync::Arc};

/// What an API makes of the answers to a request.
pub(super) trait Api: Send + 'static {
    /// The body of a response that is not streamed.
    type Reply: Serialize + Send;

    /// Adds to answer `index` of such a body.
    fn add(&mut self, index: usize, delta: Delta);
    /// The body, after all has been added.
    fn reply(self, tally: &Tally) -> Self::Reply;
    /// The events with which a stream begins, before anything is computed.
    fn begin(&mut self, _tally: &Tally) -> Vec<Event> {
        Vec::new()
    }
    /// The events that say what is new of answer `index`.
    fn events(&mut self, index: usize, delta: Delta, tally: &Tally) -> Vec<Event>;
    /// The events after the last answer.
    fn end(&mut self, tally: &Tally) -> Vec<Event>;
    /// The events with which a stream ends that cannot go on.
    fn error(&mut self, error: &ApiError) -> Vec<Event>;
}

/// An event with its name, where its API names events. Our own types can all be written: a failure is logged.
pub(super) fn event(name: Option<&str>, data: &impl Serialize) -> Option<Event> {
    let event = name.map_or_else(Event::default, |name| Event::default().event(name));
    event.json_data(data).inspect_err(|error| tracing::error!("an event cannot be written: {error}")).ok()
}

impl Server {
    /// Reads a body as `read` does, lets the jobs of the request run, and replies.
    pub(super) async fn reply<A: Api>(
        &self,
        body: Bytes,
        log: Arc<RequestLog>,
        read: impl FnOnce(&State, &[u8]) -> Result<(Prepared, A), ApiError> + Send + 'static,
    ) -> Result<Response, ApiError> {
        let state = self.0.clone();
        state.admit(1)?; // before the work of reading it
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
        let jobs = mem::take(&mut request.jobs);
        let n = jobs.len();
        let running = self.worker.submit(jobs).await.inspect_err(|e| self.refused(e))?;
        let mut answers = Answers::new(running, request.stop_ids, n);
        let headers = ignored_header(&request.ignored);
        if request.stream {
            let queue = VecDeque::from(api.begin(&tally));
            let events = Events { answers, api, tally, queue, log, done: false };
            let body = stream::unfold(events, |mut events| async move {
                let event = events.next().await?;
                Some((Ok::<_, Infallible>(event), events))
            });
            // Comments keep proxies from closing a connection on which a long prompt is being computed.
            let body = Sse::new(body).keep_alive(KeepAlive::default());
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

/// Counts what came.
pub(super) fn count(tally: &mut Tally, index: usize, delta: &Delta, log: &RequestLog) {
    tally.tokens(delta.tokens.len());
    if let Some(end) = &delta.end {
        tally.end(index, end);
    }
    log.tally(tally); // each time: a client that goes away lets nothing run to its end
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
            let events = match self.answers.next().await {
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
        self.queue.pop_front()
    }

    fn finish(&mut self) {
        self.log.complete();
        self.done = true;
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
