//! Collects the answers of one request from the batch: they come token by token, and those of several answers mixed.
//! Each piece of news has the index of its answer; every API builds its response from these, whole or as a stream.

use super::{
    error::ApiError,
    logprobs::Scored,
    memory::Remembering,
    worker::{Message, Running},
};
use crate::{Finish, FinishReason, StoppedBy, Timings, TokenLogprobs};
use serde::Serialize;
use std::mem;
use utoipa::ToSchema;

/// News of one answer.
#[derive(Debug, Default, Clone)]
pub(super) struct Delta {
    /// The prompt's own log-probabilities, once and before everything else.
    pub prompt: Option<Vec<TokenLogprobs>>,
    /// The prompt as one vector, once.
    pub embedding: Option<Vec<f32>>,
    /// New text.
    pub text: String,
    /// The tokens that it is made of.
    pub tokens: Vec<Scored>,
    /// The answer ended.
    pub end: Option<End>,
}

/// The end of an answer.
#[derive(Debug, Clone)]
pub(super) struct End {
    /// Why, in OpenAI's words.
    pub reason: &'static str,
    /// The stop string or the stop id of the request that ended it.
    pub stop_reason: Option<StopReason>,
    /// Times and counts.
    pub timings: Timings,
    /// Seconds in the queue.
    pub queue_seconds: f64,
}

/// Which stop condition of the request ended an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum StopReason {
    /// An id of `stop_token_ids`.
    Token(u32),
    /// A string of `stop`.
    Text(String),
}

/// The answers of a request.
pub(super) struct Answers {
    running: Running,
    stop_ids: Vec<u32>,
    /// For each answer, the tokens whose text has not come yet.
    held: Vec<Delta>,
    remembering: Remembering,
}

impl Answers {
    /// `n` answers. If one of `stop_ids` ends an answer, the response says so.
    pub fn new(running: Running, stop_ids: Vec<u32>, n: usize, remembering: Remembering) -> Answers {
        Answers { running, stop_ids, held: vec![Delta::default(); n], remembering }
    }

    /// The next piece of news, with the index of its answer; `None` after all answers have ended.
    pub async fn next(&mut self) -> Option<Result<(usize, Delta), ApiError>> {
        loop {
            let (index, message) = self.running.next().await?;
            let held = &mut self.held[index];
            match message {
                Message::Prompt(scored) => held.prompt = Some(scored),
                Message::Embedding(vector) => held.embedding = Some(vector),
                Message::Piece(piece) => {
                    self.remembering.add(index, piece.tokens.iter().map(|t| t.0));
                    held.text.push_str(&piece.text);
                    held.tokens.extend(piece.tokens);
                    if !held.text.is_empty() {
                        return Some(Ok((index, mem::take(held))));
                    }
                }
                Message::Finish(finish) => {
                    self.remembering.end(index);
                    held.end = Some(End::of(finish, &self.stop_ids));
                    return Some(Ok((index, mem::take(held))));
                }
                Message::Failed(why) => return Some(Err(ApiError::constraint(why))),
                Message::Lost(why) => return Some(Err(ApiError::unavailable(why))),
            }
        }
    }
}

impl End {
    fn of(finish: Finish, stop_ids: &[u32]) -> End {
        let reason = match finish.reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        };
        let stop_reason = match finish.by {
            Some(StoppedBy::Text(text)) => Some(StopReason::Text(text)),
            Some(StoppedBy::Token(id)) if stop_ids.contains(&id) => Some(StopReason::Token(id)),
            _ => None, // a token of the model's own ends it
        };
        End { reason, stop_reason, timings: finish.timings, queue_seconds: finish.queue_seconds }
    }
}
