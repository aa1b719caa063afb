//! Answers on their way from the batch to a reply, for both APIs.

use super::{
    error::ApiError,
    logprobs::Scored,
    worker::{Message, Piece, Running},
};
use crate::{Finish, FinishReason, Result, StopStrings, StoppedBy, Timings, TokenLogprobs, TokenStream, Tokenizer};
use serde::Serialize;
use std::{mem, time::Instant};
use utoipa::ToSchema;

/// What is new of one answer.
#[derive(Debug, Default, Clone)]
pub(super) struct Delta {
    /// The prompt's own log-probabilities, once and before everything else.
    pub prompt: Option<Vec<TokenLogprobs>>,
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
    /// The stop string or the id of the request that ended it.
    pub stop_reason: Option<StopReason>,
    /// Times and counts.
    pub timings: Timings,
    /// Seconds in the queue.
    pub queue_seconds: f64,
}

/// What of the request ended an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum StopReason {
    /// An id of `stop_token_ids`.
    Token(u32),
    /// A string of `stop`.
    Text(String),
}

/// How the texts of a request's answers are made.
pub(super) struct Texts {
    /// Ids of `stop_token_ids`, of which a client hears when they end an answer.
    pub stop_ids: Vec<u32>,
    /// With special tokens in the text. The batch's own text has none, so then the text is made, and looked through for
    /// stop strings, on this side.
    pub with_special: Option<WithSpecial>,
}

/// What is needed to make a text with special tokens.
#[derive(Clone)]
pub(super) struct WithSpecial {
    /// Stop strings.
    pub stops: Vec<String>,
    /// Ids that end the text.
    pub ends: Vec<u32>,
    /// What ends the text stays in it.
    pub include: bool,
}

/// The answers of a request.
pub(super) struct Answers {
    running: Running,
    stop_ids: Vec<u32>,
    answers: Vec<Answer>,
}

struct Answer {
    special: Option<Special>,
    /// What came before its text did.
    held: Delta,
    count: usize,
    first: Option<f64>,
    begin: Instant,
    prompt_tokens: usize,
}

struct Special {
    stream: TokenStream,
    stops: StopStrings,
    asked: WithSpecial,
}

impl Answers {
    /// The answers to prompts of these lengths.
    pub fn new(running: Running, tokenizer: &Tokenizer, texts: &Texts, prompts: &[usize]) -> Result<Answers> {
        let answer = |&prompt_tokens: &usize| {
            let special = |asked: &WithSpecial| {
                let stops = StopStrings::new(asked.stops.clone())?;
                Ok(Special { stream: tokenizer.stream_with_special(), stops, asked: asked.clone() })
            };
            let special = texts.with_special.as_ref().map(special).transpose()?;
            let (held, begin) = (Delta::default(), Instant::now());
            Ok(Answer { special, held, count: 0, first: None, begin, prompt_tokens })
        };
        let answers = prompts.iter().map(answer).collect::<Result<_>>()?;
        Ok(Answers { running, stop_ids: texts.stop_ids.clone(), answers })
    }

    /// What is next, with the index of its answer; `None` after all have ended.
    pub async fn next(&mut self) -> Option<Result<(usize, Delta), ApiError>> {
        loop {
            let (index, message) = self.running.next().await?;
            let answer = &mut self.answers[index];
            match message {
                Message::Prompt(scored) => answer.held.prompt = Some(scored),
                Message::Piece(piece) => {
                    if let Some(by) = answer.take(piece) {
                        self.running.cancel(index);
                        return Some(Ok((index, answer.stopped(by))));
                    }
                    if !answer.held.text.is_empty() {
                        return Some(Ok((index, mem::take(&mut answer.held))));
                    }
                }
                Message::Finish(finish) => return Some(Ok((index, answer.finish(finish, &self.stop_ids)))),
                Message::Failed(why) => return Some(Err(ApiError::constraint(why))),
                Message::Lost(why) => return Some(Err(ApiError::unavailable(why))),
            }
        }
    }
}

impl Answer {
    /// Adds a piece to what is held; the stop string that ended the text, where this side looks for it.
    fn take(&mut self, piece: Piece) -> Option<String> {
        if self.count == 0 && !piece.tokens.is_empty() {
            self.first = Some(self.begin.elapsed().as_secs_f64());
        }
        self.count += piece.tokens.len();
        let Some(special) = &mut self.special else {
            self.held.text.push_str(&piece.text);
            self.held.tokens.extend(piece.tokens);
            return None;
        };
        for (id, scored) in piece.tokens {
            self.held.tokens.push((id, scored));
            if special.asked.ends.contains(&id) && !special.asked.include {
                continue;
            }
            let Some(text) = special.stream.push(id) else { continue };
            if let Some(stop) = special.add(&text, &mut self.held.text) {
                return Some(stop);
            }
        }
        None
    }

    /// The last delta of an answer that a stop string ended on this side.
    fn stopped(&mut self, by: String) -> Delta {
        let first_token_seconds = self.first.unwrap_or_default();
        let decode_seconds = self.begin.elapsed().as_secs_f64() - first_token_seconds;
        let timings = Timings {
            prompt_tokens: self.prompt_tokens,
            tokens: self.count,
            first_token_seconds,
            prompt_seconds: first_token_seconds,
            decode_seconds,
            ..Timings::default()
        };
        let end = End { reason: "stop", stop_reason: Some(StopReason::Text(by)), timings, queue_seconds: 0.0 };
        Delta { end: Some(end), ..mem::take(&mut self.held) }
    }

    fn finish(&mut self, finish: Finish, stop_ids: &[u32]) -> Delta {
        let (mut reason, mut stop_reason) = match finish.reason {
            FinishReason::Stop => ("stop", None),
            FinishReason::Length => ("length", None),
        };
        match finish.by {
            Some(StoppedBy::Text(text)) => stop_reason = Some(StopReason::Text(text)),
            Some(StoppedBy::Token(id)) if stop_ids.contains(&id) => stop_reason = Some(StopReason::Token(id)),
            _ => {}
        }
        if let Some(special) = &mut self.special {
            let rest = special.stream.finish().unwrap_or_default();
            match special.add(&rest, &mut self.held.text) {
                Some(stop) => (reason, stop_reason) = ("stop", Some(StopReason::Text(stop))),
                None => self.held.text.push_str(&special.stops.finish()),
            }
        }
        let end = End { reason, stop_reason, timings: finish.timings, queue_seconds: finish.queue_seconds };
        Delta { end: Some(end), ..mem::take(&mut self.held) }
    }
}

impl Special {
    /// Adds what of `text` is before a stop string to `shown`; the stop string that was found.
    fn add(&mut self, text: &str, shown: &mut String) -> Option<String> {
        let found = self.stops.push(text);
        shown.push_str(&found.text);
        let stop = self.asked.stops.get(found.stopped?)?;
        if self.asked.include {
            shown.push_str(stop);
        }
        Some(stop.clone())
    }
}
