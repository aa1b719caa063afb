//! A job on its way from its prompt to the end of its answer.

use super::{Constraint, Finish, Job, JobEvent, JobId, Pooling, TokenLogprobs};
use crate::{
    backend::DECODE_ROWS,
    engine::{
        generate::{FinishReason, GenerateOptions, StoppedBy, Timings, Writer},
        speculate::{Companion, Draft, Guesser},
    },
};
use std::time::Instant;

/// A job.
pub struct Text {
    pub id: JobId,
    /// Its sequence, while it has one.
    pub sequence: usize,
    pub prompt: Vec<u32>,
    /// The tokens chosen so far.
    pub answer: Vec<u32>,
    pub options: GenerateOptions,
    pub logprobs: Option<usize>,
    pub prompt_logprobs: Option<usize>,
    pub embed: Option<Pooling>,
    pub constraint: Option<Box<dyn Constraint>>,
    /// Guesses the next tokens. It has read the computed part of the prompt, and the answer.
    pub guesser: Option<Guesser>,
    /// Tokens that the constraint makes likely; they are tried before those of the guesser.
    pub expected: Vec<Draft>,
    pub writer: Writer,
    since: Instant,
    pub begin: Instant,
    pub timings: Timings,
    queue_seconds: f64,
    /// How many tokens are computed, or about to be. While it decodes, this is the position of its last token.
    pub pos: usize,
    /// The pages of its sequence.
    pub pages: Vec<u32>,
    /// How many of these, from the first on, others can find.
    pub held: usize,
}

pub type Each<'a> = &'a mut dyn FnMut(JobId, JobEvent);

impl Text {
    pub fn new(id: JobId, job: Job, writer: Writer) -> Text {
        Text {
            id,
            sequence: usize::MAX, // none yet
            timings: Timings { prompt_tokens: job.prompt.len(), ..Timings::default() },
            prompt: job.prompt,
            answer: Vec::new(),
            options: job.options,
            logprobs: job.logprobs,
            prompt_logprobs: job.prompt_logprobs,
            embed: job.embed,
            constraint: job.constraint,
            guesser: None,
            expected: Vec::new(),
            writer,
            since: Instant::now(),
            begin: Instant::now(),
            queue_seconds: 0.0,
            pos: 0,
            pages: Vec::new(),
            held: 0,
        }
    }

    /// How many tokens of its prompt may be taken from the cache.
    pub fn reusable(&self) -> usize {
        // The last part of a prompt must have more than DECODE_ROWS tokens, so a shorter prompt is computed as a whole.
        // So is a prompt of which each token is scored or each hidden state is wanted.
        let each = self.prompt_logprobs.is_some() || self.embed == Some(Pooling::Mean);
        if each && !self.is_told() { 0 } else { self.prompt.len().saturating_sub(DECODE_ROWS + 1) }
    }

    /// Whether its prompt was computed before and its answer begun: it was put back.
    pub fn is_told(&self) -> bool {
        !self.answer.is_empty()
    }

    /// Its tokens that must be computed before the next one can be chosen in a step.
    pub fn len(&self) -> usize {
        self.prompt.len() + self.answer.len().saturating_sub(1)
    }

    /// The last token chosen, which is not computed yet.
    pub fn last(&self) -> u32 {
        self.answer.last().copied().unwrap_or_default()
    }

    /// It gets a sequence, in whose pages its first `reused` tokens are computed. `room` tokens of it are possible in all.
    pub fn begin(&mut self, sequence: usize, reused: usize, room: usize, companion: Option<&Companion>) {
        (self.sequence, self.pos) = (sequence, reused);
        let companion = companion.filter(|c| sequence < c.sequences());
        if self.is_told() {
            match (&mut self.guesser, companion) {
                (Some(Guesser::Model(model)), Some(_)) => model.moved(),
                (Some(Guesser::Model(_)), None) => self.guesser = None,
                _ => {}
            }
            return;
        }
        self.begin = Instant::now();
        self.queue_seconds = (self.begin - self.since).as_secs_f64();
        self.timings.reused_tokens = reused;
        self.guesser = self.options.guesser(&self.prompt, room - self.prompt.len(), companion);
        self.read(0);
    }

    /// Lets the guesser read the prompt from a position on, as far as it is computed.
    pub fn read(&mut self, from: usize) {
        if let (Some(guesser), true) = (&mut self.guesser, self.answer.is_empty()) {
            guesser.read(&self.prompt[from..self.pos]);
        }
    }

    /// Reports a token. Returns whether the text goes on.
    pub fn tell(&mut self, token: u32, logprobs: Option<TokenLogprobs>, each: Each<'_>) -> bool {
        self.timings.count(self.begin);
        self.answer.push(token);
        if let Some(guesser) = &mut self.guesser {
            guesser.push(token);
        }
        each(self.id, JobEvent::Token(token, logprobs));
        let written = self.writer.push(token);
        if !written.text.is_empty() {
            each(self.id, JobEvent::Text(written.text));
        }
        if let Some((reason, by)) = written.end {
            self.finish(reason, by, each);
            return false;
        }
        match self.constraint.as_mut().map(|c| c.accept(token)) {
            Some(Err(why)) => {
                each(self.id, JobEvent::Failed(why));
                false
            }
            _ => true,
        }
    }

    pub fn finish(&self, reason: FinishReason, by: Option<StoppedBy>, each: Each<'_>) {
        let (timings, queue_seconds) = (self.timings, self.queue_seconds);
        each(self.id, JobEvent::Finish(Finish { reason, by, timings, queue_seconds }));
    }

    /// The tokens that its constraint allows; `None` without one. If the constraint fails, that is reported and the
    /// text ends.
    pub fn mask(&mut self, vocab: usize, each: Each<'_>) -> Result<Option<Vec<u32>>, ()> {
        let Some(constraint) = &mut self.constraint else { return Ok(None) };
        let mut mask = vec![0; vocab.div_ceil(32)];
        match constraint.allowed(&mut mask) {
            Ok(()) => Ok(Some(mask)),
            Err(why) => {
                each(self.id, JobEvent::Failed(why));
                Err(())
            }
        }
    }
}
