//! Several sequences on one device at once: what a server does with a model.
//!
//! Jobs wait in the order in which they came until one of the batch's sequences is free. [`Batch::step`] then does the next
//! piece of work, a chunk of one prompt or one token of every running sequence, and reports what happened.

use crate::{
    engine::Engine,
    error::{Error, Result},
    generate::{Event, FinishReason, GenerateOptions, Timings},
};
use std::{collections::VecDeque, time::Instant};

/// Sizes of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchOptions {
    /// Sequences that run at the same time.
    pub sequences: usize,
    /// Most tokens of each, prompt and answer together.
    pub max_tokens: usize,
    /// Most tokens of a prompt that are computed between two steps of the running sequences.
    pub chunk: usize,
}

/// Which tokens a sequence may go on with, asked before each token.
pub trait Constraint: Send {
    /// Sets the bit of each allowed token: bit `t % 32` of word `t / 32`. All words are 0 before.
    ///
    /// # Errors
    /// A text for the user; it ends the job.
    fn allowed(&mut self, mask: &mut [u32]) -> Result<(), String>;
    /// A token was chosen.
    ///
    /// # Errors
    /// As [`Constraint::allowed`].
    fn accept(&mut self, token: u32) -> Result<(), String>;
}

/// What is asked of a batch.
#[derive(Default)]
pub struct Job {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// How it goes on and when it stops. `max_tokens` may be 0 where the prompt's own log-probabilities are wanted.
    pub options: GenerateOptions,
    /// With each token its log-probability, and this many of the most likely ones.
    pub logprobs: Option<usize>,
    /// The same for the tokens of the prompt.
    pub prompt_logprobs: Option<usize>,
    /// What the answer must look like.
    pub constraint: Option<Box<dyn Constraint>>,
}

/// Number of a job, unique in its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u64);

/// How likely a token was by the model's own distribution, before temperature, penalties, bias and constraint.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Its id.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The most likely tokens, the most likely first.
    pub top: Vec<(u32, f32)>,
}

/// What ended a text early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoppedBy {
    /// A stop id.
    Token(u32),
    /// A stop string.
    Text(String),
}

/// The end of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// What it was, with [`FinishReason::Stop`].
    pub by: Option<StoppedBy>,
    /// Times and counts.
    pub timings: Timings,
    /// Seconds that the job waited for a sequence.
    pub queue_seconds: f64,
}

/// What a job yields, in the order it happens.
#[derive(Debug, Clone, PartialEq)]
pub enum JobEvent {
    /// The prompt's own log-probabilities, from its second token on.
    Prompt(Vec<TokenLogprobs>),
    /// A token was chosen.
    Token(u32, Option<TokenLogprobs>),
    /// Text that is certain: whole characters, and no part of a stop string.
    Text(String),
    /// The end; nothing follows.
    Finish(Finish),
    /// Its constraint failed; nothing follows.
    Failed(String),
}

/// How busy a batch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Jobs that have a sequence.
    pub running: usize,
    /// Jobs that wait for one.
    pub waiting: usize,
    /// Tokens of the running sequences.
    pub tokens: usize,
    /// Tokens that all sequences could have.
    pub capacity: usize,
}

/// Sequences that share a model and the steps through it.
pub struct Batch {
    engine: Engine,
    options: BatchOptions,
    queue: VecDeque<(JobId, Job, Instant)>,
    next: u64,
}

impl Engine {
    /// An empty batch.
    ///
    /// # Errors
    /// `Input` for sizes out of range, `Context` when a sequence would be longer than [`Engine::max_context`], `Memory`.
    pub fn batch(&self, options: &BatchOptions) -> Result<Batch> {
        if options.sequences == 0 || options.max_tokens == 0 || options.chunk == 0 {
            return Err(Error::Input(format!("{options:?}: each must be at least 1")));
        }
        if options.max_tokens > self.max_context() {
            return Err(Error::Context { needed: options.max_tokens, max: self.max_context() });
        }
        Ok(Batch { engine: self.clone(), options: *options, queue: VecDeque::new(), next: 0 })
    }
}

impl Batch {
    /// Adds a job.
    ///
    /// # Errors
    /// `Context` when prompt and answer do not fit; `Input` for an empty prompt, an id outside the vocabulary, or an option
    /// out of range.
    pub fn submit(&mut self, job: Job) -> Result<JobId> {
        let needed = job.prompt.len() + job.options.max_tokens.unwrap_or(1);
        if needed > self.options.max_tokens {
            return Err(Error::Context { needed, max: self.options.max_tokens });
        }
        job.options.sampling.check(self.engine.config().vocab)?;
        let id = JobId(self.next);
        self.next += 1;
        self.queue.push_back((id, job, Instant::now()));
        Ok(id)
    }

    /// Ends a job: no event of it follows.
    pub fn cancel(&mut self, id: JobId) {
        self.queue.retain(|(other, ..)| *other != id);
    }

    /// How busy it is.
    pub fn load(&self) -> Load {
        let capacity = self.options.sequences * self.options.max_tokens;
        Load { running: 0, waiting: self.queue.len(), tokens: 0, capacity }
    }

    /// Does the next piece of work and gives `each` what happened. `false` when there was nothing to do.
    ///
    /// # Errors
    /// When the device fails; all jobs have ended then, without an event.
    pub fn step(&mut self, each: &mut dyn FnMut(JobId, JobEvent)) -> Result<bool> {
        let Some((id, job, since)) = self.queue.pop_front() else { return Ok(false) };
        let queue_seconds = since.elapsed().as_secs_f64();
        let mut session = self.engine.session(self.options.max_tokens)?;
        for event in session.generate(&job.prompt, &job.options)? {
            each(
                id,
                match event? {
                    Event::Token(t) => JobEvent::Token(t, None),
                    Event::Text(text) => JobEvent::Text(text),
                    Event::Finish(reason, timings) => {
                        JobEvent::Finish(Finish { reason, by: None, timings, queue_seconds })
                    }
                },
            );
        }
        Ok(true)
    }
}
