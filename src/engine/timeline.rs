//! Sequences of tokens on one backend. Code above this file does not know the type of the backend.

mod sequences;

use crate::{
    backend::Backend, engine::sampler::Sampling, error::Result, files::session_file::Sink, model::Model, ops::KvDtype,
};
use sequences::Timeline;
use std::{sync::Arc, time::Duration};

/// The score of one token, given those before it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Whether it is the most likely token. Of several equally likely ones, that is the one with the lowest id.
    pub greedy: bool,
}

/// A model on its backend, shared by all sessions.
pub(crate) struct Loaded<B: Backend> {
    pub b: B,
    pub model: Model<B>,
    /// How its sequences store keys and values.
    pub kv: KvDtype,
}

/// A loaded model of whatever backend.
pub(crate) trait AnyLoaded: Send + Sync {
    /// Creates this many empty sequences with room for `max_tokens` tokens each. They take their pages from a pool of this many, with
    /// [`AnyTimeline::set_pages`]; without a pool each has all its pages.
    fn timeline(
        self: Arc<Self>,
        sequences: usize,
        max_tokens: usize,
        pool: Option<usize>,
    ) -> Result<Box<dyn AnyTimeline>>;
    /// The backend, for callers that know which types it may have.
    #[cfg(feature = "cuda")]
    fn backend(&self) -> &dyn std::any::Any;
}

impl<B: Backend> AnyLoaded for Loaded<B> {
    fn timeline(
        self: Arc<Self>,
        sequences: usize,
        max_tokens: usize,
        pool: Option<usize>,
    ) -> Result<Box<dyn AnyTimeline>> {
        Ok(Box::new(Timeline::new(self, sequences, max_tokens, pool)?))
    }

    #[cfg(feature = "cuda")]
    fn backend(&self) -> &dyn std::any::Any {
        &self.b
    }
}

/// One token of a sequence, to be computed in a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    pub sequence: usize,
    /// The token, which is not computed yet.
    pub token: u32,
    /// How many tokens come before it: its position.
    pub pos: usize,
}

/// Tokens at positions from `pos` on. Positions below `shared` are those of sequence 0; the tokens may also be in
/// sequence 0 itself.
#[derive(Debug, Clone)]
pub(crate) struct Branch {
    pub sequence: usize,
    pub tokens: Vec<u32>,
    pub pos: usize,
    /// Positions below this are read from sequence 0.
    pub shared: usize,
}

/// What a session or a batch can do with its sequences. The caller is responsible for positions and tokens being in
/// range.
pub(crate) trait AnyTimeline: Send {
    /// Most tokens of one call of `extend`.
    fn chunk(&self) -> usize;
    /// Computes `tokens` of a sequence at positions from `pos` on. With `head`, row 0 of the logits becomes those of
    /// the last token.
    fn extend(&mut self, sequence: usize, tokens: &[u32], pos: usize, head: bool) -> Result<()>;
    /// Computes row 0 of the logits from row `row` of the last `extend`.
    fn head(&mut self, row: usize) -> Result<()>;
    /// As `extend`; also gives the logits after each token.
    fn extend_each(
        &mut self,
        sequence: usize,
        tokens: &[u32],
        pos: usize,
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()>;
    /// Gives the hidden states, `[dim]` each, of rows `first..first + rows` of the last `extend`, as they would go into
    /// the head.
    fn hidden(&mut self, first: usize, rows: usize, each: &mut dyn FnMut(&[f32])) -> Result<()>;
    /// Computes branches, of at most a chunk of tokens together, and scores the tokens that may follow. `targets`
    /// belong to the last `targets.len()` tokens of all branches; the scores come in their order.
    fn extend_score(&mut self, branches: &[Branch], targets: &[Vec<u32>]) -> Result<Vec<Vec<TokenScore>>>;
    /// Gives a sequence `pages` from its page `first` on, and takes those after them away.
    fn set_pages(&mut self, sequence: usize, first: usize, pages: &[u32]) -> Result<()>;
    /// Copies page `from` to page `to`.
    fn copy_page(&mut self, to: u32, from: u32) -> Result<()>;
    /// Bytes of an element of keys and values.
    fn act_bytes(&self) -> usize;
    /// Gives the bytes of the first `len` keys and values of sequence 0, in the order of a [session file](crate::files::session_file).
    fn save(&mut self, len: usize, to: &mut Sink<'_>) -> Result<()>;
    /// Makes the first `len` keys and values of sequence 0 those that were saved.
    fn load(&mut self, len: usize, bytes: &[u8]) -> Result<()>;
    /// A row of the last logits, `[vocab]`.
    fn logits(&mut self, row: usize, logits: &mut [f32]) -> Result<()>;
    /// Waits until the device has done everything that was asked of it.
    fn wait(&self) -> Result<()>;
    /// Sets up the sampler of a sequence whose tokens so far are `prompt` and, chosen by it, `answer`. `masked`: only
    /// tokens of a `mask` are allowed.
    fn sampler(
        &mut self,
        sequence: usize,
        prompt: &[u32],
        answer: &[u32],
        sampling: &Sampling,
        stop_ids: &[u32],
        masked: bool,
    ) -> Result<()>;
    /// The tokens that are allowed next in a sequence: a bit for each.
    fn mask(&mut self, sequence: usize, mask: &[u32]) -> Result<()>;
    /// Chooses a token by a row of the logits, for a sequence of `len` tokens. Call it for rows in rising order: it may
    /// overwrite the rows before.
    fn choose(&mut self, sequence: usize, row: usize, len: usize) -> Result<u32>;
    /// Computes these rows, at most [`DECODE_ROWS`](crate::backend::DECODE_ROWS), and the logits after each. Several may be consecutive tokens of
    /// one sequence: each sees those before it. This cancels an earlier [`AnyTimeline::run`].
    fn compute(&mut self, rows: &[Row]) -> Result<()>;
    /// Computes these rows as [`AnyTimeline::compute`] does, and chooses a token after each, on the device. Rows of one sequence are side by
    /// side, and all but its first are guesses: `tokens` has `None` for the rows after a wrong one. With `keep_logits`, the logits are
    /// kept until the next step.
    fn speculate(&mut self, rows: &[Row], keep_logits: bool, tokens: &mut Vec<Option<u32>>) -> Result<()>;
    /// From now on these rows decode; steps that were enqueued ahead are dropped. With `keep_logits`, the logits of
    /// each step are kept until the next.
    fn run(&mut self, rows: &[Row], keep_logits: bool) -> Result<()>;
    /// How many steps are enqueued whose tokens have not been taken.
    fn ahead(&self) -> usize;
    /// The tokens of the next step, in the order of the rows. With `ahead`, more steps are enqueued while every row has
    /// room.
    fn next(&mut self, ahead: bool, tokens: &mut Vec<u32>) -> Result<()>;
    /// Total time that has been spent waiting for chosen tokens.
    fn waited(&self) -> Duration;
}
