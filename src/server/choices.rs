//! Responses of OpenAI's two older APIs, completions and chats. Both are a list of choices in the same envelope.

use super::{
    answer::Delta,
    error::ApiError,
    prepare::Prepared,
    reply::{Api, event},
    state::{State, now},
    usage::{Tally, Times, Usage},
};
use axum::response::sse::Event;
use serde::Serialize;
use utoipa::ToSchema;

/// A reply, or an event of one.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct Reply<C> {
    /// Id of the request.
    id: String,
    /// What this is.
    object: &'static str,
    /// Seconds since 1970.
    created: u64,
    /// The name that the request had for the model.
    model: String,
    /// Changes when the version, the model or the device does.
    system_fingerprint: String,
    /// The answers, or what is added to them.
    choices: Vec<C>,
    /// Counts of tokens; in events of a stream `null` or absent, unless they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    usage: Option<Option<Usage>>,
    /// How long each phase took; in a stream it comes with the last choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<Times>,
}

/// What differs between the two APIs.
pub(super) trait Shape: Send + 'static {
    /// An answer.
    type Choice: Serialize + Send;
    /// What is added to an answer.
    type Chunk: Serialize + Send;
    /// What `id` begins with.
    const PREFIX: &'static str;
    /// `object` of a reply and of an event.
    const OBJECTS: [&'static str; 2];

    /// Adds to answer `index`.
    fn add(&mut self, index: usize, delta: Delta);
    /// The whole answers.
    fn choices(self) -> Vec<Self::Choice>;
    /// The events that report what is new of answer `index`.
    fn chunks(&mut self, index: usize, delta: Delta) -> Vec<Self::Chunk>;
}

/// The answers to a request and their envelope.
pub(super) struct Choices<S> {
    shape: S,
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    fingerprint: String,
    include_usage: bool,
    continuous_usage: bool,
    /// Answers that have not ended.
    left: usize,
}

impl<S: Shape> Choices<S> {
    /// For the answers to `request`.
    pub fn new(state: &State, request: &Prepared, shape: S) -> Choices<S> {
        Choices {
            shape,
            id: format!("{}-{:016x}{:08x}", S::PREFIX, fastrand::u64(..), fastrand::u32(..)),
            object: S::OBJECTS[usize::from(request.stream)],
            created: now(),
            model: request.model.clone(),
            fingerprint: state.fingerprint.clone(),
            include_usage: request.include_usage,
            continuous_usage: request.continuous_usage,
            left: request.jobs.len(),
        }
    }

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

/// The last event of a stream, whatever came before.
fn done() -> Event {
    Event::default().data("[DONE]")
}

impl<S: Shape> Api for Choices<S> {
    type Reply = Reply<S::Choice>;

    fn add(&mut self, index: usize, delta: Delta) {
        self.shape.add(index, delta);
    }

    fn reply(self, tally: &Tally) -> Reply<S::Choice> {
        let mut reply = self.wrap(Vec::new(), Some(Some(tally.usage())), Some(tally.times()));
        reply.choices = self.shape.choices();
        reply
    }

    fn events(&mut self, index: usize, delta: Delta, tally: &Tally) -> Vec<Event> {
        self.left -= usize::from(delta.end.is_some());
        let chunks = self.shape.chunks(index, delta);
        let n = chunks.len();
        let chunk = |(i, chunk): (usize, S::Chunk)| {
            let last = self.left == 0 && i + 1 == n;
            let usage = match self.continuous_usage {
                true => Some(Some(tally.usage())),
                false => self.include_usage.then_some(None),
            };
            event(None, &self.wrap(vec![chunk], usage, last.then(|| tally.times())))
        };
        chunks.into_iter().enumerate().filter_map(chunk).collect()
    }

    fn end(&mut self, tally: &Tally) -> Vec<Event> {
        let usage = self.include_usage.then(|| self.wrap(Vec::<S::Chunk>::new(), Some(Some(tally.usage())), None));
        usage.and_then(|reply| event(None, &reply)).into_iter().chain([done()]).collect()
    }

    fn error(&mut self, error: &ApiError) -> Vec<Event> {
        event(None, &error.reply()).into_iter().chain([done()]).collect()
    }
}
