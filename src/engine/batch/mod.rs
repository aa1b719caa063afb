//! Runs several sequences on one device at once, as a server does.
//!
//! Jobs (requests for an answer) wait in the order in which they came until one of the batch's sequences is free, and pages for their
//! keys and values. Each call of [`Batch::step`] does the next piece of work, which is a part of one prompt and one token of every
//! sequence whose turn it is, and reports what happened. A step of several sequences reads the weights once, so it takes little
//! longer than a step of one. It has up to [`DECODE_ROWS`] rows; more sequences take turns.
//!
//! Sequences take pages of [`PAGE`] tokens from a pool as they grow, and prompts that begin alike share the pages of their beginning.
//! If a sequence needs a page and none is left, the job that came last is put back: it waits in front of the others, and all that it
//! had is computed again later. Nothing of it is told twice.
//!
//! **What a job gets does not depend on the other jobs, bit for bit.** A row of a step (one token of one sequence) has
//! the same bits whatever the other rows are, and wherever its pages lie. A prompt is computed in parts of more than [`DECODE_ROWS`] tokens, so
//! that all of it goes through the kernels for many rows, where a row's bits do not depend on where the parts begin.
//! Parts are also smaller than the number of rows from which cuBLAS may take over, which adds in an order of its own. The
//! pages of a prompt are kept for later prompts, but not those of its answer, since the kernels for few rows computed them. What was
//! put back is computed again by the kernels that computed it before: those for prompts, and those for few rows for the answer.
//!
//! ```
//! use aoji::{BatchOptions, Device, Engine, GenerateOptions, Job, JobEvent, Options};
//!
//! # fn main() -> aoji::Result<()> {
//! let engine = Engine::open("demo", &Options { device: Device::Cpu, ..Options::default() })?;
//! let mut batch = engine.batch(&BatchOptions { sequences: 2, max_tokens: 64, ..BatchOptions::default() })?;
//! for text in ["하나 둘", "안녕"] {
//!     let prompt = engine.tokenizer()?.encode(text, true)?;
//!     batch.submit(Job { prompt, options: GenerateOptions { max_tokens: Some(8), ..Default::default() }, ..Job::default() })?;
//! }
//! let mut texts = [String::new(), String::new()];
//! let mut each = |id: aoji::JobId, event| {
//!     if let JobEvent::Text(piece) = event {
//!         texts[id.0 as usize].push_str(&piece);
//!     }
//! };
//! while batch.step(&mut each)? {}
//! assert!(texts.iter().all(|t| !t.is_empty()));
//! # Ok(())
//! # }
//! ```

mod logprobs;
mod pool;
mod prompt;
mod room;
mod schedule;
mod speculate;
#[cfg(test)]
mod tests;
mod text;

use crate::{
    backend::DECODE_ROWS,
    engine::{
        generate::{FinishReason, GenerateOptions, StoppedBy, Timings, Writer},
        load::Engine,
        speculate::{Companion, Costs},
        timeline::AnyTimeline,
    },
    error::{Error, Result},
    model::{
        kv::pages_for,
        plan::{self, whole_sequences},
    },
    ops::PAGE,
};
use pool::Pool;
use prompt::Filling;
use std::{collections::VecDeque, ops::RangeInclusive};
use text::Text;

/// Most tokens of a part of a prompt: fewer than would be given to cuBLAS.
const MAX_CHUNK: usize = 511;
/// Fewest tokens: so that a prompt can be cut into parts that all have more than [`DECODE_ROWS`].
const MIN_CHUNK: usize = 2 * (DECODE_ROWS + 1);

/// Sizes of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchOptions {
    /// Sequences that run at the same time, 1 to 64. More than 16 take turns.
    pub sequences: usize,
    /// Most tokens of each, prompt and answer together.
    pub max_tokens: usize,
    /// Tokens whose keys and values there is memory for, of all sequences together, rounded up to whole pages. At least `max_tokens`.
    /// Absent: what the engine [planned](crate::Plan::cache_tokens), if it was opened for so many sequences; else `max_tokens` for
    /// each sequence, but for no more than 16.
    pub cache_tokens: Option<usize>,
    /// Most tokens of a prompt that are computed between two steps of the running sequences, 34 to 511. While no
    /// sequence runs, it is 511.
    pub chunk: usize,
}

impl BatchOptions {
    /// How many sequences are allowed.
    pub const SEQUENCES: RangeInclusive<usize> = plan::SEQUENCES;
    /// How many tokens a part of a prompt may have.
    pub const CHUNK: RangeInclusive<usize> = MIN_CHUNK..=MAX_CHUNK;
}

impl Default for BatchOptions {
    /// Eight sequences of 2048 tokens; while one answers, at most 256 tokens of another's prompt are computed between
    /// two of its tokens.
    fn default() -> Self {
        BatchOptions { sequences: 8, max_tokens: 2048, cache_tokens: None, chunk: 256 }
    }
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
    /// Tokens that probably follow, because little else is allowed. They are guesses like those of
    /// [`GenerateOptions::speculate`], used only with speculation; wrong ones do not change an answer.
    fn expected(&mut self) -> Vec<u32> {
        Vec::new()
    }
    /// How many of these tokens are allowed, one after the other. Guesses after them are not tried.
    fn allows(&mut self, tokens: &[u32]) -> usize {
        tokens.len()
    }
}

/// How a text becomes one vector, from the hidden states that the model has for each of its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The mean of all hidden states.
    Mean,
    /// The hidden state of the last token, which has seen all others.
    Last,
}

/// One request to a batch.
#[derive(Default)]
pub struct Job {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// How the text goes on and when it stops. `max_tokens` may be 0 when only the prompt's log-probabilities or its
    /// vector are wanted.
    pub options: GenerateOptions,
    /// Asks for the log-probability of each token, and of this many of the most likely ones.
    pub logprobs: Option<usize>,
    /// The same for the tokens of the prompt.
    pub prompt_logprobs: Option<usize>,
    /// Asks for the prompt as one vector.
    pub embed: Option<Pooling>,
    /// Decides which tokens are allowed.
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

/// The end of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// What ended it, with [`FinishReason::Stop`].
    pub by: Option<StoppedBy>,
    /// Times and counts.
    pub timings: Timings,
    /// Seconds that the job waited until its prompt was begun.
    pub queue_seconds: f64,
}

/// What a job yields, in the order it happens.
#[derive(Debug, Clone, PartialEq)]
pub enum JobEvent {
    /// The prompt's own log-probabilities, from its second token on.
    Prompt(Vec<TokenLogprobs>),
    /// The prompt as one vector: hidden states after the final norm, pooled. `[dim]`
    Embedding(Vec<f32>),
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
    /// Tokens of the pages that these jobs have; those that are only kept for later prompts do not count.
    pub tokens: usize,
    /// Tokens of all pages.
    pub capacity: usize,
    /// How often a job was put back so far, since a page was needed and none was left.
    pub put_back: u64,
}

/// Sequences that share a model and the steps through it.
pub struct Batch {
    engine: Engine,
    options: BatchOptions,
    timeline: Box<dyn AnyTimeline>,
    pool: Pool,
    queue: VecDeque<Text>,
    /// The one job whose prompt is being computed.
    filling: Option<Filling>,
    /// The jobs that decode; it is the turn of the first ones.
    running: Vec<Text>,
    /// Steps since the turn began.
    served: usize,
    /// The jobs of the rows that the device decodes (some of these jobs may have ended), and whether their logits are
    /// kept.
    rows: (Vec<JobId>, bool),
    /// Tokens of a step.
    tokens: Vec<u32>,
    /// How long steps take.
    costs: Costs,
    /// A smaller model that guesses, if the engine has one.
    companion: Option<Companion>,
    /// For each running text, the number of guesses that the next step tries.
    taken: Vec<usize>,
    next_id: u64,
    /// How often a job was put back.
    put_back: u64,
    /// For [`Batch::try_put_backs`]: a job is put back after so many steps, and steps since it was.
    trial: Option<(usize, usize)>,
}

impl Engine {
    /// An empty batch.
    ///
    /// # Errors
    /// `Input` for sizes out of range or a cache that is too small for one sequence, `Context` when a sequence would be longer than
    /// [`Engine::max_context`], `Memory`.
    pub fn batch(&self, options: &BatchOptions) -> Result<Batch> {
        let BatchOptions { sequences, max_tokens, cache_tokens, chunk } = *options;
        let range = |name: &str, x: usize, allowed: RangeInclusive<usize>| match allowed.contains(&x) {
            true => Ok(()),
            false => {
                let (low, high) = allowed.into_inner();
                Err(Error::Input(format!("a batch with {name} {x}: allowed is {low} to {high}")))
            }
        };
        range("sequences", sequences, BatchOptions::SEQUENCES)?;
        range("chunk", chunk, BatchOptions::CHUNK)?;
        if max_tokens == 0 || max_tokens > self.max_context() {
            return Err(Error::Context { needed: max_tokens, max: self.max_context() });
        }
        let (one, all) = (pages_for(max_tokens), sequences * pages_for(max_tokens));
        let pages = match cache_tokens {
            Some(tokens) if tokens < max_tokens => {
                return Err(Error::Input(format!(
                    "a cache of {tokens} tokens has no room for one sequence of {max_tokens}: give it at least as many, or shorten \
                     the sequences"
                )));
            }
            Some(tokens) => pages_for(tokens).min(all),
            None if self.plan().sequences >= sequences => pages_for(self.plan().cache_tokens).clamp(one, all),
            None => whole_sequences(sequences) * one,
        };
        let timeline = self.paged_timeline(sequences, max_tokens, pages)?;
        // rows for guesses are only left while no more texts run than a step has rows
        let guessed = sequences.min(DECODE_ROWS);
        let companion = self.draft().map(|draft| Companion::new(draft, guessed, max_tokens)).transpose()?;
        Ok(Batch {
            engine: self.clone(),
            options: *options,
            timeline,
            pool: Pool::new(pages),
            queue: VecDeque::new(),
            filling: None,
            running: Vec::new(),
            served: 0,
            rows: (Vec::new(), false),
            tokens: Vec::new(),
            costs: Costs::default(),
            companion,
            taken: Vec::new(),
            next_id: 0,
            put_back: 0,
            trial: None,
        })
    }
}

impl Batch {
    /// Its sizes.
    pub fn options(&self) -> &BatchOptions {
        &self.options
    }

    /// Adds a job.
    ///
    /// # Errors
    /// `Context` when prompt and answer do not fit; `Input` for an empty prompt, an id outside the vocabulary, or an option
    /// out of range.
    pub fn submit(&mut self, job: Job) -> Result<JobId> {
        let (n, max, vocab) = (job.prompt.len(), self.options.max_tokens, self.engine.config().vocab);
        if n == 0 {
            return Err(Error::Input("no tokens: a sequence needs at least one".into()));
        }
        if let Some(t) = job.prompt.iter().find(|t| **t as usize >= vocab) {
            return Err(Error::Input(format!("token {t} is not below the vocabulary's {vocab}")));
        }
        // the sum of a client's number must not wrap: a text longer than its sequence would be written to its neighbour's pages
        match n.saturating_add(job.options.max_tokens.unwrap_or(1)) {
            needed if needed > max => return Err(Error::Context { needed, max }),
            _ => {}
        }
        let id = JobId(self.next_id);
        let writer = Writer::new(&self.engine, &job.options, &job.prompt, max - n)?;
        job.options.sampling.params(writer.stop_ids())?;
        self.next_id += 1;
        self.queue.push_back(Text::new(id, job, writer));
        Ok(id)
    }

    /// Ends a job: no event of it follows.
    pub fn cancel(&mut self, id: JobId) {
        self.queue.retain(|t| t.id != id);
        if let Some(filling) = self.filling.take_if(|f| f.text.id == id) {
            self.pool.give_back(&filling.text.pages);
        }
        if let Some(i) = self.running.iter().position(|t| t.id == id) {
            self.end(i);
        }
    }

    /// How busy it is.
    pub fn load(&self) -> Load {
        Load {
            running: self.running.len() + usize::from(self.filling.is_some()),
            waiting: self.queue.len(),
            tokens: (self.pool.size() - self.pool.available()) * PAGE,
            capacity: self.pool.size() * PAGE,
            put_back: self.put_back,
        }
    }

    /// Does the next piece of work and passes the events to `each`. `false` when there was nothing to do.
    ///
    /// # Errors
    /// When the device fails. All jobs have ended then, without an event.
    pub fn step(&mut self, each: &mut dyn FnMut(JobId, JobEvent)) -> Result<bool> {
        let result = self.advance(each);
        if result.is_err() {
            self.queue.clear();
            self.filling = None;
            self.running.clear();
            self.pool = Pool::new(self.pool.size());
        }
        result
    }
}
