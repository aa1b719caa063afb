//! [`AnyTimeline`] on each backend.

use super::{AnyTimeline, Branch, Loaded, Row, TokenScore};
use crate::{
    backend::{Backend, DECODE_ROWS, SamplerState},
    engine::sampler::Sampling,
    error::{Error, Result},
    files::session_file::Sink,
    model::{LOGIT_ROWS, Part, Rows, Scratch, kv::Kv},
    ops::{
        Act, Argmax, LogProb, Sample,
        guesses::Counted,
        sample::{IN_PROMPT, Params},
    },
    tiles::SAMPLE_PARAMS,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// Most targets (tokens whose scores are wanted) of a row in one call of `log_prob`.
const LOG_PROB_TARGETS: usize = 8;

/// Sequences of tokens on backend `B`.
pub struct Timeline<B: Backend> {
    loaded: Arc<Loaded<B>>,
    s: Scratch<B>,
    kv: Kv<B>,
    sampler: SamplerState<B>,
    /// For each sequence, whether it takes the token of the largest logit.
    greedy: Vec<bool>,
    /// For each sequence, whether it has a bias other than zero.
    biased: Vec<bool>,
    /// Buffers for the part of a prompt that is being computed.
    prompt: Rows<B>,
    /// Buffers of the rows that decode. Their tokens and places (a place is an index into the cache: sequence and
    /// position in one number) are fed back on the device.
    steps: Rows<B>,
    /// Targets of `log_prob`, its log-probabilities and flags. `[LOGIT_ROWS, LOG_PROB_TARGETS]`
    scores: (B::Buf<u32>, B::Buf<f32>, B::Buf<u32>),
    graphs: B::Graphs,
    run: Run,
    waited: Duration,
}

/// What is being decoded at present.
#[derive(Default)]
struct Run {
    rows: Vec<Row>,
    /// Steps that the device was asked for.
    enqueued: usize,
    /// Steps whose tokens were taken.
    taken: usize,
    choice: Choice,
}

/// How a step chooses its tokens.
#[derive(Debug, Clone, Copy, Default)]
enum Choice {
    /// As each row's parameters say.
    #[default]
    Sample,
    /// The largest logit of each row.
    Argmax,
    /// The same, in one kernel with the head: no logits are stored.
    HeadArgmax,
    /// No choice: the host asks for the choice of each row.
    None,
}

impl<B: Backend> Timeline<B> {
    pub fn new(loaded: Arc<Loaded<B>>, sequences: usize, max_tokens: usize, pool: Option<usize>) -> Result<Self> {
        let (b, c) = (&loaded.b, &loaded.model.config);
        let chunk = B::CHUNK.min(max_tokens);
        let kv = match pool {
            Some(pages) => Kv::with_pool(b, c, loaded.kv, sequences, max_tokens, pages)?,
            None => Kv::new(b, c, loaded.kv, sequences, max_tokens)?,
        };
        let s = Scratch::new(b, c, chunk.max(DECODE_ROWS), LOGIT_ROWS, kv.max_seq)?;
        let sampler = SamplerState::new(b, c.vocab, sequences)?;
        let (prompt, steps) = (Rows::new(b, chunk)?, Rows::new(b, DECODE_ROWS)?);
        let n = LOGIT_ROWS * LOG_PROB_TARGETS;
        let scores = (b.alloc(n)?, b.alloc(n)?, b.alloc(n)?);
        let (graphs, run, waited) = (B::Graphs::default(), Run::default(), Duration::ZERO);
        let (greedy, biased) = (vec![true; sequences], vec![false; sequences]);
        Ok(Timeline { loaded, s, kv, sampler, greedy, biased, prompt, steps, scores, graphs, run, waited })
    }

    /// Computes `tokens`, at most a chunk, up to the hidden states in `s.x`.
    fn forward(&mut self, sequence: usize, tokens: &[u32], pos: usize) -> Result<()> {
        let Loaded { b, model, .. } = &*self.loaded;
        let places: Vec<u32> = (pos..pos + tokens.len()).map(|p| self.kv.place(sequence, p)).collect();
        self.prompt.set(b, tokens, &places)?;
        model.forward(b, &mut self.s, &mut self.kv, &self.prompt, tokens.len(), pos + tokens.len())
    }

    /// The scores of each row's targets, from the rows of `s.logits`.
    fn log_probs(&mut self, targets: &[Vec<u32>]) -> Result<Vec<Vec<TokenScore>>> {
        let Loaded { b, model, .. } = &*self.loaded;
        let (ids, out, greedy) = &mut self.scores;
        let mut all: Vec<Vec<TokenScore>> = targets.iter().map(|t| Vec::with_capacity(t.len())).collect();
        let most = targets.iter().map(Vec::len).max().unwrap_or(0);
        for at in (0..most).step_by(LOG_PROB_TARGETS) {
            let op =
                LogProb { rows: targets.len(), targets: LOG_PROB_TARGETS.min(most - at), vocab: model.config.vocab };
            // rows with fewer targets than the longest are filled up with token 0
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

    /// One more token of each row: computes the last one, which is on the device, and chooses the next.
    fn step(&mut self) -> Result<()> {
        let Timeline { loaded, s, kv, sampler, steps, graphs, run, .. } = self;
        let Loaded { b, model, .. } = &**loaded;
        let rows = run.rows.len();
        let len = run.rows.iter().map(|r| r.pos + 1 + run.enqueued).max().unwrap_or(0); // with this step's tokens
        let (kv_len, max_seq) = (bucket(len, kv.max_seq), kv.max_seq);
        let key = (kv_len * (DECODE_ROWS + 1) + rows) * 4 + run.choice as usize;
        b.replay(graphs, key, &mut || {
            model.forward(b, s, kv, steps, rows, kv_len)?;
            if let Choice::HeadArgmax = run.choice {
                return model.head_argmax(b, s, steps, rows, max_seq, sampler);
            }
            model.head(b, s, 0, rows)?;
            if let Choice::None = run.choice {
                return Ok(());
            }
            let greedy = matches!(run.choice, Choice::Argmax);
            choose(b, greedy, rows, model.config.vocab, max_seq, steps, sampler, &s.logits)
        })?;
        run.enqueued += 1;
        Ok(())
    }

    /// Takes the oldest token that was chosen for a sequence and not taken yet.
    fn take(&mut self, sequence: usize) -> Result<u32> {
        let begin = Instant::now();
        let token = self.loaded.b.take(&mut self.sampler.outbox, sequence);
        self.waited += begin.elapsed();
        token
    }

    /// Whether every row has a position left for the token of one more step, and a page for it.
    fn has_room(&self) -> bool {
        self.run.rows.iter().all(|r| r.pos + self.run.enqueued < self.kv.room(r.sequence))
    }
}

/// Chooses the tokens after the first rows of the logits, and writes them to the tokens of `at` and to the outbox
/// (memory in which the host waits for chosen tokens).
#[expect(clippy::too_many_arguments, reason = "sizes and buffers of the op")]
fn choose<B: Backend>(
    b: &B,
    greedy: bool,
    rows: usize,
    vocab: usize,
    max_seq: usize,
    Rows { tokens, pos }: &mut Rows<B>,
    sampler: &mut SamplerState<B>,
    logits: &B::Buf<f32>,
) -> Result<()> {
    let SamplerState { params, history, bias, mask, scratch, outbox } = sampler;
    if greedy {
        return b.argmax(&Argmax { rows, vocab, max_seq }, tokens, pos, scratch, outbox, logits);
    }
    b.sample(&Sample { rows, vocab, max_seq }, tokens, pos, params, history, scratch, outbox, bias, mask, logits)
}

impl<B: Backend> Drop for Timeline<B> {
    fn drop(&mut self) {
        let _ = self.loaded.b.synchronize(); // a recorded step must not be destroyed while it runs
    }
}

/// How many positions a recorded step covers: steps are recorded once for each power of two from 512 on.
fn bucket(len: usize, max_seq: usize) -> usize {
    len.next_power_of_two().max(512).min(max_seq)
}

impl<B: Backend> AnyTimeline for Timeline<B> {
    fn chunk(&self) -> usize {
        B::CHUNK.min(self.kv.max_tokens())
    }

    fn extend(&mut self, sequence: usize, tokens: &[u32], pos: usize, head: bool) -> Result<()> {
        self.forward(sequence, tokens, pos)?;
        match head {
            true => self.head(tokens.len() - 1),
            false => Ok(()),
        }
    }

    fn head(&mut self, row: usize) -> Result<()> {
        self.loaded.model.head(&self.loaded.b, &mut self.s, row, 1)
    }

    fn extend_each(
        &mut self,
        sequence: usize,
        tokens: &[u32],
        pos: usize,
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        self.forward(sequence, tokens, pos)?;
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

    fn hidden(&mut self, first: usize, rows: usize, each: &mut dyn FnMut(&[f32])) -> Result<()> {
        let Loaded { b, model, .. } = &*self.loaded;
        model.final_norm(b, &mut self.s, first, rows)?;
        let dim = model.config.dim;
        let mut acts = vec![B::Act::from_f32(0.0); rows * dim];
        b.read(&mut acts, &self.s.xb, 0)?;
        let mut state = vec![0f32; dim];
        for row in acts.chunks_exact(dim) {
            state.iter_mut().zip(row).for_each(|(x, act)| *x = act.to_f32());
            each(&state);
        }
        Ok(())
    }

    fn extend_score(&mut self, branches: &[Branch], targets: &[Vec<u32>]) -> Result<Vec<Vec<TokenScore>>> {
        let tokens: Vec<u32> = branches.iter().flat_map(|b| &b.tokens).copied().collect();
        match branches {
            [one] if one.sequence == 0 => self.forward(0, &one.tokens, one.pos)?,
            _ => {
                let places =
                    |x: &Branch| (x.pos..x.pos + x.tokens.len()).map(|p| self.kv.place(x.sequence, p)).collect();
                let places: Vec<u32> = branches.iter().flat_map(|x| -> Vec<u32> { places(x) }).collect();
                let part = |x: &Branch| {
                    let rows = x.tokens.len();
                    Part { rows, kv_len: x.pos + rows, shared: x.shared }
                };
                let parts: Vec<Part> = branches.iter().map(part).collect();
                let Loaded { b, model, .. } = &*self.loaded;
                self.prompt.set(b, &tokens, &places)?;
                model.forward_parts(b, &mut self.s, &mut self.kv, &self.prompt, &parts)?;
            }
        }
        let mut all = Vec::with_capacity(targets.len());
        let first = tokens.len() - targets.len();
        for (i, rows) in targets.chunks(LOGIT_ROWS).enumerate() {
            self.loaded.model.head(&self.loaded.b, &mut self.s, first + i * LOGIT_ROWS, rows.len())?;
            all.extend(self.log_probs(rows)?);
        }
        Ok(all)
    }

    fn set_pages(&mut self, sequence: usize, first: usize, pages: &[u32]) -> Result<()> {
        self.kv.set_pages(&self.loaded.b, sequence, first, pages)
    }

    fn copy_page(&mut self, to: u32, from: u32) -> Result<()> {
        self.kv.copy_page(&self.loaded.b, &self.loaded.model.config, to, from)
    }

    fn act_bytes(&self) -> usize {
        size_of::<B::Act>()
    }
    fn save(&mut self, len: usize, to: &mut Sink<'_>) -> Result<()> {
        self.kv.save(&self.loaded.b, &self.loaded.model.config, len, to)
    }
    fn load(&mut self, len: usize, bytes: &[u8]) -> Result<()> {
        self.kv.load(&self.loaded.b, &self.loaded.model.config, len, bytes)
    }

    fn logits(&mut self, row: usize, logits: &mut [f32]) -> Result<()> {
        self.loaded.b.read(logits, &self.s.logits, row * self.loaded.model.config.vocab)
    }

    fn wait(&self) -> Result<()> {
        self.loaded.b.synchronize()
    }

    fn sampler(
        &mut self,
        sequence: usize,
        prompt: &[u32],
        answer: &[u32],
        sampling: &Sampling,
        stop_ids: &[u32],
        masked: bool,
    ) -> Result<()> {
        let b = &self.loaded.b;
        let vocab = self.loaded.model.config.vocab;
        sampling.check(vocab)?;
        let params = Params { masked, draws: answer.len() as u32, ..sampling.params(stop_ids)? };
        self.greedy[sequence] = sampling.is_plain_greedy() && !masked;
        b.write(&mut self.sampler.params, sequence * SAMPLE_PARAMS as usize, &params.words())?;
        if sampling.has_penalties() {
            let mut history = vec![0u32; vocab];
            answer.iter().for_each(|&t| history[t as usize] += 1);
            prompt.iter().for_each(|&t| history[t as usize] |= IN_PROMPT);
            b.write(&mut self.sampler.history, sequence * vocab, &history)?;
        }
        let is_biased = !sampling.logit_bias.is_empty();
        if std::mem::replace(&mut self.biased[sequence], is_biased) || is_biased {
            let mut bias = vec![0f32; vocab];
            sampling.logit_bias.iter().for_each(|&(t, x)| bias[t as usize] += x);
            b.write(&mut self.sampler.bias, sequence * vocab, &bias)?;
        }
        Ok(())
    }

    fn mask(&mut self, sequence: usize, mask: &[u32]) -> Result<()> {
        self.loaded.b.write(&mut self.sampler.mask, sequence * mask.len(), mask)
    }

    fn choose(&mut self, sequence: usize, row: usize, len: usize) -> Result<u32> {
        let Timeline { loaded, s, kv, sampler, greedy, prompt, .. } = self;
        let Loaded { b, model, .. } = &**loaded;
        if row > 0 {
            b.copy(&mut s.logits, 0, row * model.config.vocab, model.config.vocab)?;
        }
        b.write(&mut prompt.pos, 0, &[kv.place(sequence, len - 1)])?; // choosing moves on by one
        choose(b, greedy[sequence], 1, model.config.vocab, kv.max_seq, prompt, sampler, &s.logits)?;
        self.take(sequence)
    }

    fn compute(&mut self, rows: &[Row]) -> Result<()> {
        self.run(rows, true)?;
        self.run.choice = Choice::None;
        self.step()?;
        self.run = Run::default(); // this step chooses no tokens
        Ok(())
    }

    fn speculate(&mut self, rows: &[Row], keep_logits: bool, tokens: &mut Vec<Option<u32>>) -> Result<()> {
        self.run(rows, keep_logits)?;
        self.step()?;
        self.run = Run::default(); // the next step has other rows
        tokens.clear();
        let mut counted = Counted::default();
        for row in rows {
            let token = if counted.next(row.sequence, row.token) { Some(self.take(row.sequence)?) } else { None };
            token.into_iter().for_each(|token| counted.chose(token));
            tokens.push(token);
        }
        Ok(())
    }

    fn run(&mut self, rows: &[Row], keep_logits: bool) -> Result<()> {
        let ahead = self.ahead();
        let Timeline { loaded, kv, sampler, steps, greedy, run, .. } = self;
        run.rows.iter().for_each(|r| loaded.b.skip(&mut sampler.outbox, r.sequence, ahead));
        *run = Run { rows: rows.to_vec(), ..Run::default() };
        run.choice = match rows.iter().all(|r| greedy[r.sequence]) {
            true if keep_logits => Choice::Argmax,
            true => Choice::HeadArgmax,
            false => Choice::Sample,
        };
        let tokens: Vec<u32> = rows.iter().map(|r| r.token).collect();
        let places: Vec<u32> = rows.iter().map(|r| kv.place(r.sequence, r.pos)).collect();
        if tokens.is_empty() { Ok(()) } else { steps.set(&loaded.b, &tokens, &places) }
    }

    fn ahead(&self) -> usize {
        self.run.enqueued - self.run.taken
    }

    fn next(&mut self, ahead: bool, tokens: &mut Vec<u32>) -> Result<()> {
        let most = if ahead { B::LOOKAHEAD } else { 0 };
        while self.ahead() <= most && self.has_room() {
            self.step()?;
        }
        if self.ahead() == 0 {
            return Err(Error::Context { needed: self.kv.max_tokens() + 1, max: self.kv.max_tokens() });
        }
        tokens.clear();
        for r in 0..self.run.rows.len() {
            tokens.push(self.take(self.run.rows[r].sequence)?);
        }
        self.run.taken += 1;
        Ok(())
    }

    fn waited(&self) -> Duration {
        self.waited
    }
}
