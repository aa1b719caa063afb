//! Text from a session, as an iterator of events.

use crate::{
    error::{Error, Result},
    sampler::Sampling,
    session::{Decode, Session},
    text::{StopStrings, TokenStream, Tokenizer},
};
use serde::Serialize;
use std::{collections::VecDeque, time::Instant};

/// What to generate and when to stop.
#[derive(Debug, Clone, Default)]
pub struct GenerateOptions {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens; until the context is full when absent.
    pub max_tokens: Option<usize>,
    /// The text ends before the first of these.
    pub stop: Vec<String>,
    /// A stop string that ends the text stays in it.
    pub include_stop: bool,
    /// Ids that end the text besides the model's own.
    pub stop_ids: Vec<u32>,
    /// The model's own end-of-text ids do not end the text.
    pub ignore_eos: bool,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop id or a stop string.
    Stop,
    /// `max_tokens`, or the context is full.
    Length,
}

/// Times and counts of one generation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Timings {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, the ones that were in the cache already.
    pub reused_tokens: usize,
    /// Seconds from the start to the prompt's last logits.
    pub prompt_seconds: f64,
    /// Tokens generated, with the one that ended the text.
    pub tokens: usize,
    /// Seconds from the prompt's last logits to the last token.
    pub decode_seconds: f64,
    /// Seconds from the start to the first token.
    pub first_token_seconds: f64,
}

impl Timings {
    /// Tokens generated a second.
    pub fn tokens_per_second(&self) -> f64 {
        if self.decode_seconds > 0.0 { self.tokens as f64 / self.decode_seconds } else { 0.0 }
    }
}

/// What a generation yields, in the order it happens.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token was chosen.
    Token(u32),
    /// Text that is certain: whole characters, and no part of a stop string.
    Text(String),
    /// The end; nothing follows.
    Finish(FinishReason, Timings),
}

/// Iterator of events; dropping it cancels.
pub struct Generation<'a> {
    decode: Decode<'a>,
    stop_ids: Vec<u32>,
    stream: Option<TokenStream>,
    stops: StopStrings,
    queue: VecDeque<Event>,
    begin: Instant,
    timings: Timings,
    left: usize,
    done: bool,
}

impl Session {
    /// Continues `prompt`: computes the part of it that the session does not hold, then decodes. Without a tokenizer the events
    /// carry no text.
    ///
    /// # Errors
    /// `Context` when the prompt leaves no room for a token; `Input` for options out of range.
    pub fn generate(&mut self, prompt: &[u32], options: &GenerateOptions) -> Result<Generation<'_>> {
        let generation = self.generate_with(prompt, options, &mut |_, _| true)?;
        Ok(generation.expect("nobody cancelled it"))
    }

    /// [`Session::generate`] that reports and can be cancelled before the first token as [`Session::sync_with`]; `None` is a
    /// cancelled one.
    pub fn generate_with(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        go_on: &mut dyn FnMut(usize, usize) -> bool,
    ) -> Result<Option<Generation<'_>>> {
        if prompt.len() >= self.max_tokens() {
            return Err(Error::Context { needed: prompt.len() + 1, max: self.max_tokens() });
        }
        options.sampling.check(self.engine().config().vocab)?;
        let stops = StopStrings::new(options.stop.clone())?;
        if !options.stop.is_empty() {
            self.engine().tokenizer()?; // stop strings need text
        }
        let stream = self.engine().tokenizer().ok().map(Tokenizer::stream);
        let mut stop_ids = options.stop_ids.clone();
        if !options.ignore_eos {
            stop_ids.extend(&self.engine().config().eos);
        }
        let begin = Instant::now();
        let (reused_tokens, complete) = self.sync_with(prompt, go_on)?;
        if !complete {
            return Ok(None);
        }
        self.wait()?; // a device computes behind the host's back, and the time is the prompt's
        let prompt_seconds = begin.elapsed().as_secs_f64();
        let room = self.max_tokens() - prompt.len();
        let left = options.max_tokens.unwrap_or(room).min(room);
        let timings = Timings { prompt_tokens: prompt.len(), reused_tokens, prompt_seconds, ..Timings::default() };
        let decode = self.decode(&options.sampling, &stop_ids)?;
        let queue = VecDeque::new();
        Ok(Some(Generation { decode, stop_ids, stream, stops, queue, begin, timings, left, done: false }))
    }
}

impl Generation<'_> {
    /// Times and counts so far.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    /// Queues the events of one more token.
    fn advance(&mut self) -> Result<()> {
        if self.left == 0 {
            self.finish(FinishReason::Length);
            return Ok(());
        }
        let Some(token) = self.decode.next().transpose()? else {
            self.finish(FinishReason::Length);
            return Ok(());
        };
        self.left -= 1;
        let t = &mut self.timings;
        t.tokens += 1;
        let now = self.begin.elapsed().as_secs_f64();
        if t.tokens == 1 {
            t.first_token_seconds = now;
        }
        t.decode_seconds = now - t.prompt_seconds;
        self.queue.push_back(Event::Token(token));
        if self.stop_ids.contains(&token) {
            self.finish(FinishReason::Stop);
        } else if let Some(piece) = self.stream.as_mut().and_then(|s| s.push(token)) {
            self.text(&piece);
        }
        Ok(())
    }

    /// Queues what of a piece is before a stop string and cannot become one.
    fn text(&mut self, piece: &str) {
        let found = self.stops.push(piece);
        if !found.text.is_empty() {
            self.queue.push_back(Event::Text(found.text));
        }
        if found.stopped.is_some() {
            self.done = true;
            self.queue.push_back(Event::Finish(FinishReason::Stop, self.timings));
        }
    }

    /// Queues what was held back, and the end.
    fn finish(&mut self, reason: FinishReason) {
        if let Some(piece) = self.stream.as_mut().and_then(TokenStream::finish) {
            self.text(&piece);
        }
        if self.done {
            return; // a stop string was completed by the last piece
        }
        let rest = self.stops.finish();
        if !rest.is_empty() {
            self.queue.push_back(Event::Text(rest));
        }
        self.done = true;
        self.queue.push_back(Event::Finish(reason, self.timings));
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Result<Event>> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Some(Ok(event));
            }
            if self.done {
                return None;
            }
            if let Err(e) = self.advance() {
                self.done = true;
                return Some(Err(e));
            }
        }
    }
}
