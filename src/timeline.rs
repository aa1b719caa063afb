//! One sequence of tokens on one backend: where the type of the backend stops.

use crate::{
    backend::{Backend, SamplerState},
    error::{Error, Result},
    kv::Kv,
    model::{Model, Scratch},
    ops::{
        Argmax, LogProb, Sample,
        sample::{IN_PROMPT, Params},
    },
    sampler::Sampling,
    score::TokenScore,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// Most rows of logits that are computed at once.
pub(crate) const LOGIT_ROWS: usize = 16;
/// Most targets of a row that one call of `log_prob` takes.
const LOG_PROB_TARGETS: usize = 8;

/// A model on its backend, shared by all sessions.
pub(crate) struct Loaded<B: Backend> {
    pub b: B,
    pub model: Model<B>,
}

/// A loaded model of whatever backend.
pub(crate) trait AnyLoaded: Send + Sync {
    /// An empty sequence with room for `max_seq` tokens.
    fn timeline(self: Arc<Self>, max_seq: usize) -> Result<Box<dyn AnyTimeline>>;
    /// The backend, for who knows which it may be.
    #[cfg(feature = "cuda")]
    fn backend(&self) -> &dyn std::any::Any;
}

impl<B: Backend> AnyLoaded for Loaded<B> {
    fn timeline(self: Arc<Self>, max_seq: usize) -> Result<Box<dyn AnyTimeline>> {
        Ok(Box::new(Timeline::new(self, max_seq)?))
    }

    #[cfg(feature = "cuda")]
    fn backend(&self) -> &dyn std::any::Any {
        &self.b
    }
}

/// What a session does with its sequence. Positions and tokens are the session's business: it proves them in range.
pub(crate) trait AnyTimeline: Send {
    /// Tokens that one call of `extend` takes.
    fn chunk(&self) -> usize;
    /// Computes `tokens` at positions from `pos` on; with `head` also the logits of the last.
    fn extend(&mut self, tokens: &[u32], pos: usize, head: bool) -> Result<()>;
    /// Computes `tokens` at positions from `pos` on and gives the logits after each.
    fn extend_each(&mut self, tokens: &[u32], pos: usize, each: &mut dyn FnMut(usize, &[f32])) -> Result<()>;
    /// Computes `tokens` at positions from `pos` on and scores what may follow: `targets` are those of the last
    /// `targets.len()` rows. The scores come in the order of the targets.
    fn extend_score(&mut self, tokens: &[u32], pos: usize, targets: &[Vec<u32>]) -> Result<Vec<Vec<TokenScore>>>;
    /// The logits of the last `extend` with `head`, `[vocab]`.
    fn logits(&mut self) -> Result<Vec<f32>>;
    /// Waits for everything asked of the device.
    fn wait(&self) -> Result<()>;
    /// Prepares to decode after `prompt`, whose last logits are computed.
    fn start(&mut self, prompt: &[u32], sampling: &Sampling, stop_ids: &[u32]) -> Result<()>;
    /// The next token. Work goes on in the background up to the capacity.
    fn next(&mut self) -> Result<u32>;
    /// Time that `next` has waited for the device, ever.
    fn waited(&self) -> Duration;
    /// Ends decoding; what was computed ahead is dropped. Positions whose keys and values are in the cache.
    fn stop(&mut self) -> Result<usize>;
}

/// Sequence of tokens on backend `B`.
struct Timeline<B: Backend> {
    loaded: Arc<Loaded<B>>,
    s: Scratch<B>,
    kv: Kv<B>,
    sampler: SamplerState<B>,
    /// Targets of `log_prob`, its log-probabilities and flags. `[LOGIT_ROWS, LOG_PROB_TARGETS]`
    scores: (B::Buf<u32>, B::Buf<f32>, B::Buf<u32>),
    graphs: B::Graphs,
    decoding: Decoding,
    waited: Duration,
}

#[derive(Default)]
struct Decoding {
    /// Tokens of the prompt.
    prompt: usize,
    /// Tokens asked of the device; each but the first has computed the one before it.
    enqueued: usize,
    /// Tokens given out.
    taken: usize,
    /// `argmax` is enough.
    greedy: bool,
}

impl<B: Backend> Timeline<B> {
    fn new(loaded: Arc<Loaded<B>>, max_seq: usize) -> Result<Self> {
        let (b, c) = (&loaded.b, &loaded.model.config);
        let s = Scratch::new(b, c, B::CHUNK.min(max_seq), LOGIT_ROWS, max_seq)?;
        let kv = Kv::new(b, c, max_seq)?;
        let sampler = SamplerState {
            params: b.alloc(crate::tiles::SAMPLE_PARAMS as usize)?,
            history: b.alloc(c.vocab)?,
            bias: b.alloc(c.vocab)?,
            scratch: b.alloc(c.vocab.max(Argmax::scratch()))?,
            outbox: b.outbox()?,
        };
        let n = LOGIT_ROWS * LOG_PROB_TARGETS;
        let scores = (b.alloc(n)?, b.alloc(n)?, b.alloc(n)?);
        let (graphs, decoding, waited) = (B::Graphs::default(), Decoding::default(), Duration::ZERO);
        Ok(Timeline { loaded, s, kv, sampler, scores, graphs, decoding, waited })
    }

    /// `s.x` of `tokens`, at most a chunk.
    fn forward(&mut self, tokens: &[u32], pos: usize) -> Result<()> {
        let Loaded { b, model } = &*self.loaded;
        let positions: Vec<u32> = (pos..pos + tokens.len()).map(|p| p as u32).collect();
        b.write(&mut self.s.tokens, 0, tokens)?;
        b.write(&mut self.s.pos, 0, &positions)?;
        model.forward(b, &mut self.s, &mut self.kv, tokens.len(), pos + tokens.len())
    }

    /// The scores of each row's targets by the rows of `s.logits`.
    fn log_probs(&mut self, targets: &[Vec<u32>]) -> Result<Vec<Vec<TokenScore>>> {
        let Loaded { b, model } = &*self.loaded;
        let (ids, out, greedy) = &mut self.scores;
        let mut all: Vec<Vec<TokenScore>> = targets.iter().map(|t| Vec::with_capacity(t.len())).collect();
        let most = targets.iter().map(Vec::len).max().unwrap_or(0);
        for at in (0..most).step_by(LOG_PROB_TARGETS) {
            let op =
                LogProb { rows: targets.len(), targets: LOG_PROB_TARGETS.min(most - at), vocab: model.config.vocab };
            // a row with fewer targets than another is filled up with token 0
            let padded =
                |t: &Vec<u32>| (at..at + op.targets).map(|i| t.get(i).copied().unwrap_or(0)).collect::<Vec<_>>();
            let words: Vec<u32> = targets.iter().flat_map(padded).collect();
            b.write(ids, 0, &words)?;
            b.log_prob(&op, out, greedy, &self.s.logits, ids)?;
            let (mut logprobs, mut flags) = (vec![0f32; words.len()], vec![0u32; words.len()]);
            b.read(&mut logprobs, out, 0)?;
            b.read(&mut flags, greedy, 0)?;
            let scores = logprobs.iter().zip(flags).map(|(&logprob, flag)| TokenScore { logprob, greedy: flag != 0 });
            let scores: Vec<TokenScore> = scores.collect();
            for ((all, t), scores) in all.iter_mut().zip(targets).zip(scores.chunks_exact(op.targets)) {
                all.extend(&scores[..op.targets.min(t.len().saturating_sub(at))]);
            }
        }
        Ok(all)
    }

    /// Chooses from the logits of row 0 and feeds the token back.
    fn choose(&mut self) -> Result<()> {
        let Loaded { b, model } = &*self.loaded;
        let (s, vocab) = (&mut self.s, model.config.vocab);
        let SamplerState { params, history, bias, scratch, outbox } = &mut self.sampler;
        if self.decoding.greedy {
            b.argmax(&Argmax { vocab }, &mut s.tokens, &mut s.pos, scratch, outbox, &s.logits)
        } else {
            let op = Sample { vocab };
            b.sample(&op, &mut s.tokens, &mut s.pos, params, history, scratch, outbox, bias, &s.logits)
        }
    }

    /// One token more: computes the last one, which is on the device, and chooses the next.
    fn step(&mut self) -> Result<()> {
        let len = self.decoding.prompt + self.decoding.enqueued; // tokens after this step's forward
        let kv_len = bucket(len, self.kv.max_seq);
        let mut graphs = std::mem::take(&mut self.graphs);
        let loaded = self.loaded.clone();
        let key = 2 * kv_len + usize::from(self.decoding.greedy);
        let result = loaded.b.replay(&mut graphs, key, || {
            loaded.model.forward(&loaded.b, &mut self.s, &mut self.kv, 1, kv_len)?;
            if self.decoding.greedy {
                return loaded.model.head_argmax(&loaded.b, &mut self.s, &mut self.sampler);
            }
            loaded.model.head(&loaded.b, &mut self.s, 0, 1)?;
            self.choose()
        });
        self.graphs = graphs;
        result
    }
}

impl<B: Backend> Drop for Timeline<B> {
    fn drop(&mut self) {
        let _ = self.loaded.b.synchronize(); // a recorded step must not be destroyed while it runs
    }
}

/// Positions that a recorded step covers: a step is recorded once for each power of two from 512 on.
fn bucket(len: usize, max_seq: usize) -> usize {
    len.next_power_of_two().max(512).min(max_seq)
}

impl<B: Backend> AnyTimeline for Timeline<B> {
    fn chunk(&self) -> usize {
        self.s.rows
    }

    fn extend(&mut self, tokens: &[u32], pos: usize, head: bool) -> Result<()> {
        self.forward(tokens, pos)?;
        match head {
            true => self.loaded.model.head(&self.loaded.b, &mut self.s, tokens.len() - 1, 1),
            false => Ok(()),
        }
    }

    fn extend_each(&mut self, tokens: &[u32], pos: usize, each: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        self.forward(tokens, pos)?;
        let vocab = self.loaded.model.config.vocab;
        let mut logits = vec![0f32; LOGIT_ROWS * vocab];
        for first in (0..tokens.len()).step_by(LOGIT_ROWS) {
            let rows = LOGIT_ROWS.min(tokens.len() - first);
            self.loaded.model.head(&self.loaded.b, &mut self.s, first, rows)?;
            self.loaded.b.read(&mut logits[..rows * vocab], &self.s.logits, 0)?;
            logits.chunks_exact(vocab).take(rows).enumerate().for_each(|(r, logits)| each(first + r, logits));
        }
        Ok(())
    }

    fn extend_score(&mut self, tokens: &[u32], pos: usize, targets: &[Vec<u32>]) -> Result<Vec<Vec<TokenScore>>> {
        self.forward(tokens, pos)?;
        let mut all = Vec::with_capacity(targets.len());
        let first = tokens.len() - targets.len();
        for (i, rows) in targets.chunks(LOGIT_ROWS).enumerate() {
            self.loaded.model.head(&self.loaded.b, &mut self.s, first + i * LOGIT_ROWS, rows.len())?;
            all.extend(self.log_probs(rows)?);
        }
        Ok(all)
    }

    fn wait(&self) -> Result<()> {
        self.loaded.b.synchronize()
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        let mut logits = vec![0f32; self.loaded.model.config.vocab];
        self.loaded.b.read(&mut logits, &self.s.logits, 0)?;
        Ok(logits)
    }

    fn start(&mut self, prompt: &[u32], sampling: &Sampling, stop_ids: &[u32]) -> Result<()> {
        let b = &self.loaded.b;
        let vocab = self.loaded.model.config.vocab;
        sampling.check(vocab)?;
        let params: Params = sampling.params(stop_ids)?;
        let greedy = sampling.is_plain_greedy();
        if !greedy {
            let mut history = vec![0u32; vocab];
            prompt.iter().for_each(|&t| history[t as usize] |= IN_PROMPT);
            let mut bias = vec![0f32; vocab];
            sampling.logit_bias.iter().for_each(|&(t, x)| bias[t as usize] += x);
            b.write(&mut self.sampler.params, 0, &params.words())?;
            b.write(&mut self.sampler.history, 0, &history)?;
            b.write(&mut self.sampler.bias, 0, &bias)?;
        }
        // of the last token of the prompt: choosing moves on by one
        b.write(&mut self.s.pos, 0, &[prompt.len() as u32 - 1])?;
        self.decoding = Decoding { prompt: prompt.len(), enqueued: 0, taken: 0, greedy };
        Ok(())
    }

    fn next(&mut self) -> Result<u32> {
        while self.decoding.enqueued <= self.decoding.taken + B::LOOKAHEAD
            && self.decoding.prompt + self.decoding.enqueued <= self.kv.max_seq
        {
            if self.decoding.enqueued == 0 {
                self.choose()?
            } else {
                self.step()?
            }
            self.decoding.enqueued += 1;
        }
        if self.decoding.taken == self.decoding.enqueued {
            return Err(Error::Context { needed: self.kv.max_seq + 1, max: self.kv.max_seq });
        }
        self.decoding.taken += 1;
        let begin = Instant::now();
        let token = self.loaded.b.take(&mut self.sampler.outbox);
        self.waited += begin.elapsed();
        token
    }

    fn waited(&self) -> Duration {
        self.waited
    }

    fn stop(&mut self) -> Result<usize> {
        let computed = self.decoding.prompt + self.decoding.enqueued.saturating_sub(1);
        self.loaded.b.skip(&mut self.sampler.outbox, self.decoding.enqueued - self.decoding.taken);
        self.decoding = Decoding::default();
        Ok(computed)
    }
}
