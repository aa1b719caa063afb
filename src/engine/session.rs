//! A session is one growing sequence of tokens with its KV cache.

mod saved;

use crate::{
    backend::DECODE_ROWS,
    engine::{
        load::Engine,
        sampler::Sampling,
        score::{Scores, Trie},
        speculate::{Companion, Costs, Guesser, share},
        timeline::{AnyTimeline, Branch, Row},
    },
    error::{Error, Result},
};
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// One mutable sequence: its tokens, their keys and values, and the logits after the last token.
///
/// A caller passes whole token sequences; [`Session::sync`] computes only what differs from the tokens that the session
/// already holds.
pub struct Session {
    engine: Engine,
    timeline: Box<dyn AnyTimeline>,
    tokens: Vec<u32>,
    /// How many tokens, from the first on, have their keys and values in the cache.
    computed: usize,
    /// Whether the device holds the logits after the last token.
    has_logits: bool,
    max_tokens: usize,
    /// How many continuations are scored in one pass; each is a sequence of its own.
    branches: usize,
    /// How long its steps take.
    costs: Costs,
    /// A smaller model that guesses, if the engine has one.
    companion: Option<Companion>,
}

impl Engine {
    /// An empty session with room for `max_tokens` tokens, at most [`Engine::max_context`].
    pub fn session(&self, max_tokens: usize) -> Result<Session> {
        self.session_with_branches(max_tokens, 1)
    }

    /// A session that can score up to `branches` continuations of a prefix in one pass over the weights; see
    /// [`Session::score`]. It takes the memory of this many sequences.
    pub fn session_with_branches(&self, max_tokens: usize, branches: usize) -> Result<Session> {
        let branches = branches.max(1);
        let timeline = self.timeline(branches, max_tokens)?;
        let companion = self.draft().map(|draft| Companion::new(draft, 1, max_tokens)).transpose()?;
        Ok(Session::new(self.clone(), timeline, companion, max_tokens, branches))
    }

    /// [`Session::score`] in a new session.
    ///
    /// ```
    /// # use aoji::{Device, Engine, Options};
    /// # let engine = Engine::open("demo", &Options { device: Device::Cpu, ..Options::default() })?;
    /// let scores = engine.score(&[2046, 70], &[[71, 72], [71, 73]])?;
    /// assert!(scores.continuations.iter().all(|c| c.sum() < 0.0));
    /// assert_eq!(scores.computed, 3); // the prefix and token 71, once
    /// # Ok::<(), aoji::Error>(())
    /// ```
    pub fn score<T: AsRef<[u32]>>(&self, prefix: &[u32], continuations: &[T]) -> Result<Scores> {
        let longest = continuations.iter().map(|c| c.as_ref().len()).max().unwrap_or(0);
        self.session((prefix.len() + longest.saturating_sub(1)).max(1))?.score(prefix, continuations)
    }
}

impl Session {
    fn new(
        engine: Engine,
        timeline: Box<dyn AnyTimeline>,
        companion: Option<Companion>,
        max_tokens: usize,
        branches: usize,
    ) -> Session {
        let tokens = Vec::with_capacity(max_tokens); // a step allocates nothing
        Session {
            engine,
            timeline,
            tokens,
            computed: 0,
            has_logits: false,
            max_tokens,
            branches,
            costs: Costs::default(),
            companion,
        }
    }

    /// The engine that made it.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Its tokens so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Capacity in tokens.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// How many first tokens the session and `tokens` have in common.
    fn common(&self, tokens: &[u32]) -> usize {
        self.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count()
    }

    fn check_ids(&self, tokens: &[u32]) -> Result<()> {
        let vocab = self.engine.config().vocab;
        match tokens.iter().find(|t| **t as usize >= vocab) {
            Some(t) => Err(Error::Input(format!("token {t} is not below the vocabulary's {vocab}"))),
            None => Ok(()),
        }
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
        self.check_ids(tokens)?;
        match tokens.len() {
            0 => Err(Error::Input("no tokens: a sequence needs at least one".into())),
            n if n > self.max_tokens => Err(Error::Context { needed: n, max: self.max_tokens }),
            _ => Ok(()),
        }
    }

    /// Makes the session hold exactly `tokens`, and keeps the longest common prefix of what is computed already. The
    /// logits after the last token are then ready. Returns how many tokens did not have to be computed.
    ///
    /// # Errors
    /// `Context` when they do not fit, `Input` for an empty sequence or an id outside the vocabulary; the session is then
    /// unchanged.
    pub fn sync(&mut self, tokens: &[u32]) -> Result<usize> {
        self.sync_with(tokens, &mut |_, _| true).map(|(reused, _)| reused)
    }

    /// [`Session::sync`] that calls `go_on(tokens ready, tokens in all)` before each chunk, which cancels it by
    /// returning `false`. The second value says whether it ran to the end.
    pub fn sync_with(&mut self, tokens: &[u32], go_on: &mut dyn FnMut(usize, usize) -> bool) -> Result<(usize, bool)> {
        self.check(tokens)?;
        let same = self.common(tokens);
        if same == tokens.len() && same == self.tokens.len() && self.has_logits {
            return Ok((same, true));
        }
        let reused = same.min(self.computed).min(tokens.len() - 1); // the last token's logits are wanted
        self.tokens.truncate(reused);
        (self.computed, self.has_logits) = (reused, false);
        for chunk in tokens[reused..].chunks(self.timeline.chunk()) {
            if !go_on(self.computed, tokens.len()) {
                return Ok((reused, false));
            }
            let last = self.computed + chunk.len() == tokens.len();
            self.timeline.extend(0, chunk, self.computed, last)?;
            self.tokens.extend(chunk);
            self.computed += chunk.len();
        }
        self.has_logits = true;
        Ok((reused, true))
    }

    /// To verify speculation: from now on the number of guesses in a step is random, whatever they cost.
    pub(crate) fn try_drafts(&mut self, seed: u64) {
        self.costs = Costs::trial(seed);
    }

    /// How many milliseconds steps took while decoding with guesses, by their number of rows.
    pub(crate) fn step_ms(&self) -> Vec<(usize, f64)> {
        self.costs.measured().map(|(rows, seconds)| (rows, seconds * 1e3)).collect()
    }

    /// The smaller model that guesses.
    pub(crate) fn companion(&self) -> Option<&Companion> {
        self.companion.as_ref()
    }

    /// Waits until the device has done everything that was asked of it.
    pub(crate) fn wait(&self) -> Result<()> {
        self.timeline.wait()
    }

    /// Appends one token.
    pub fn step(&mut self, token: u32) -> Result<()> {
        let mut tokens = self.tokens.clone();
        tokens.push(token);
        self.sync(&tokens).map(drop)
    }

    /// Logits after the last token, f32 `[vocab]`.
    pub fn logits(&mut self) -> Result<Vec<f32>> {
        if !self.has_logits {
            let tokens = self.tokens.clone();
            self.sync(&tokens)?;
        }
        let mut logits = vec![0f32; self.engine.config().vocab];
        self.timeline.logits(0, &mut logits)?;
        Ok(logits)
    }

    /// Makes the session hold exactly `tokens`; calls `each(i, logits)` with the logits after token `i`, for `i` in `from..`.
    pub fn logits_of(&mut self, tokens: &[u32], from: usize, each: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        self.check(tokens)?;
        if from >= tokens.len() {
            return Err(Error::Input(format!("logits from token {from} on of {} tokens", tokens.len())));
        }
        if from > 0 {
            self.sync(&tokens[..from])?;
        } else {
            self.tokens.clear();
        }
        (self.computed, self.has_logits) = (from, false);
        for chunk in tokens[from..].chunks(self.timeline.chunk()) {
            let at = self.computed;
            self.timeline.extend_each(0, chunk, at, &mut |i, logits| each(at + i, logits))?;
            self.tokens.extend(chunk);
            self.computed += chunk.len();
        }
        Ok(())
    }

    /// Log-probabilities of each continuation after `prefix`. The prefix is computed once, as far as the session does
    /// not hold it already, and so are, mostly, tokens with which several continuations begin. The last token of a
    /// continuation is only looked up, so a continuation of one token costs nothing more. A session [with
    /// branches](crate::Engine::session_with_branches) computes several continuations in one pass over the weights.
    ///
    /// # Errors
    /// `Context` when the prefix and a continuation without its last token do not fit, `Input` for an empty prefix or
    /// an id outside the vocabulary; the session is then unchanged.
    pub fn score<T: AsRef<[u32]>>(&mut self, prefix: &[u32], continuations: &[T]) -> Result<Scores> {
        self.check(prefix)?;
        for c in continuations.iter().map(AsRef::as_ref).filter(|c| !c.is_empty()) {
            self.check_ids(c)?;
            let needed = prefix.len() + c.len() - 1;
            if needed > self.max_tokens {
                return Err(Error::Context { needed, max: self.max_tokens });
            }
        }
        let mut trie = Trie::new(continuations);
        let (trunk, branches) = trie.branches();
        // the trunk's tokens; before them what is missing of the prefix, whose last token's logits are wanted
        let start = self.common(prefix).min(self.computed).min(prefix.len() - 1);
        let tokens = [&prefix[start..], &trie.tokens(&trunk)].concat();
        let (unscored, size) = (prefix.len() - 1 - start, self.timeline.chunk());
        self.tokens.truncate(start);
        (self.computed, self.has_logits) = (start, false);
        let (mut pass, mut at, mut computed) = (Pass::default(), 0, tokens.len());
        for tokens in tokens.chunks(size) {
            self.score_pass(&mut pass, &mut trie)?;
            let end = at + tokens.len();
            let nodes = &trunk[at.max(unscored) - unscored..end.max(unscored) - unscored];
            pass.add(Branch { sequence: 0, tokens: tokens.to_vec(), pos: start + at, shared: 0 }, nodes);
            at = end;
        }
        // branches join the trunk's last pass, each in a sequence of its own, or follow in later passes
        for branch in branches {
            let shared = prefix.len() - 1 + trie.depth(branch[0]);
            let mut pos = shared;
            for nodes in branch.chunks(size) {
                let tokens = trie.tokens(nodes);
                if pass.sequences() == self.branches || pass.tokens() + tokens.len() > size {
                    self.score_pass(&mut pass, &mut trie)?;
                }
                let n = tokens.len();
                computed += n;
                let (sequence, shared) = if self.branches == 1 { (0, 0) } else { (pass.sequences().max(1), shared) };
                pass.add(Branch { sequence, tokens, pos, shared }, nodes);
                pos += n;
            }
        }
        self.score_pass(&mut pass, &mut trie)?;
        Ok(Scores { continuations: trie.scores(continuations), computed })
    }

    /// Computes the branches of a pass, gives the scores of tokens that may follow to their nodes, and empties the pass.
    fn score_pass(&mut self, pass: &mut Pass, trie: &mut Trie) -> Result<()> {
        let Pass { branches, nodes } = std::mem::take(pass);
        if branches.is_empty() {
            return Ok(());
        }
        let targets: Vec<Vec<u32>> = nodes.iter().map(|&node| trie.targets(node)).collect();
        let scores = self.timeline.extend_score(&branches, &targets)?;
        nodes.iter().zip(scores).for_each(|(&node, scores)| trie.set(node, &scores));
        for own in branches.into_iter().filter(|b| b.sequence == 0) {
            self.tokens.truncate(own.pos);
            self.tokens.extend(own.tokens);
            self.computed = self.tokens.len();
        }
        Ok(())
    }

    /// The tokens that follow, one by one, chosen and fed back on the device. Stop ids only matter for `min_tokens`:
    /// the caller decides when to stop, by dropping the iterator. It ends when the context is full.
    ///
    /// # Errors
    /// `Input` when an option is out of range or the session has no tokens.
    pub fn decode(&mut self, sampling: &Sampling, stop_ids: &[u32]) -> Result<Decode<'_>> {
        self.decode_with(sampling, stop_ids, None, usize::MAX)
    }

    /// [`Session::decode`] with a drafter, which guesses next tokens, but none beyond the `most` tokens that are wanted.
    pub(crate) fn decode_with(
        &mut self,
        sampling: &Sampling,
        stop_ids: &[u32],
        guesser: Option<Guesser>,
        most: usize,
    ) -> Result<Decode<'_>> {
        if !self.has_logits {
            let tokens = self.tokens.clone();
            self.sync(&tokens)?;
        }
        self.timeline.sampler(0, &self.tokens, &[], sampling, stop_ids, false)?;
        self.has_logits = false;
        let left = most.min(self.max_tokens - self.tokens.len());
        let speculation = guesser.map(|guesser| Speculation::new(guesser, left));
        let (chosen, ready) = (Vec::with_capacity(1), VecDeque::with_capacity(DECODE_ROWS));
        Ok(Decode { computed: self.tokens.len(), session: self, last: None, chosen, ready, speculation, failed: false })
    }
}

/// Branches that are computed together, and the nodes of their last tokens.
#[derive(Default)]
struct Pass {
    branches: Vec<Branch>,
    nodes: Vec<usize>,
}

impl Pass {
    fn add(&mut self, branch: Branch, nodes: &[usize]) {
        self.branches.push(branch);
        self.nodes.extend(nodes);
    }

    /// Sequences in use, with sequence 0, which is the trunk's.
    fn sequences(&self) -> usize {
        self.branches.iter().map(|b| b.sequence + 1).max().unwrap_or(0)
    }

    fn tokens(&self) -> usize {
        self.branches.iter().map(|b| b.tokens.len()).sum()
    }
}

/// Iterator of [`Session::decode`].
pub struct Decode<'a> {
    session: &'a mut Session,
    /// How many tokens have their keys and values in the cache, not counting steps that are enqueued ahead.
    computed: usize,
    /// The token after those; `None` before the first.
    last: Option<u32>,
    /// The token that a step chose.
    chosen: Vec<u32>,
    /// Chosen tokens that were not yet given to the caller.
    ready: VecDeque<u32>,
    speculation: Option<Speculation>,
    failed: bool,
}

/// What decoding with guesses needs in addition.
struct Speculation {
    guesser: Guesser,
    /// How many tokens may still be chosen.
    left: usize,
    /// Whether the rows that the device decodes are no longer at the end of the text.
    moved: bool,
    /// How many guesses the next step tries, for the one sequence.
    taken: Vec<usize>,
    /// The last token and the guesses.
    rows: Vec<Row>,
    /// What the rows chose, those after a wrong guess nothing.
    chosen: Vec<Option<u32>>,
    drafted: usize,
    accepted: usize,
}

impl Speculation {
    fn new(guesser: Guesser, left: usize) -> Speculation {
        let (taken, rows) = (Vec::with_capacity(1), Vec::with_capacity(DECODE_ROWS));
        let chosen = Vec::with_capacity(DECODE_ROWS);
        Speculation { guesser, left, moved: false, taken, rows, chosen, drafted: 0, accepted: 0 }
    }

    /// How many guesses are worth a row in the next step.
    fn plan(&mut self, costs: &mut Costs, companion: Option<&Companion>) -> usize {
        let offer = self.guesser.offer(self.left.saturating_sub(1).min(DECODE_ROWS - 1), companion);
        share(costs, &[offer], &mut self.taken);
        self.taken[0]
    }

    /// Sets `rows` to the last token and at most this many guesses, and returns how many guesses there are.
    fn set_rows(&mut self, guesses: usize, token: u32, pos: usize) -> usize {
        self.rows.clear();
        let tokens = std::iter::once(token).chain(self.guesser.guesses(guesses)).zip(pos..);
        self.rows.extend(tokens.map(|(token, pos)| Row { sequence: 0, token, pos }));
        self.rows.len() - 1
    }
}

impl Decode<'_> {
    /// Total time that the session has spent waiting for tokens from the device.
    pub(crate) fn waited(&self) -> Duration {
        self.session.timeline.waited()
    }

    /// How many guesses were tried, and how many were right.
    pub(crate) fn drafted(&self) -> (usize, usize) {
        self.speculation.as_ref().map_or((0, 0), |s| (s.drafted, s.accepted))
    }

    fn advance(&mut self) -> Result<u32> {
        if self.ready.is_empty() {
            match self.last {
                None => {
                    let timeline = &mut self.session.timeline;
                    let token = timeline.choose(0, 0, self.computed)?;
                    timeline.run(&[Row { sequence: 0, token, pos: self.computed }], false)?;
                    self.ready.push_back(token);
                }
                Some(last) if self.speculation.is_some() => self.speculate(last)?,
                Some(_) => {
                    self.session.timeline.next(true, &mut self.chosen)?;
                    self.ready.push_back(self.chosen[0]);
                    self.computed += 1;
                }
            }
            self.last = self.ready.back().copied();
            if let Some(s) = &mut self.speculation {
                s.left = s.left.saturating_sub(self.ready.len());
                self.ready.iter().for_each(|&token| s.guesser.push(token));
            }
        }
        self.ready.pop_front().ok_or_else(|| Error::Op { op: "decode", what: "a step chose no token".into() })
    }

    /// A step with guesses, or without them where they are not worth it.
    fn speculate(&mut self, last: u32) -> Result<()> {
        let Some(s) = &mut self.speculation else { return Ok(()) };
        let Session { timeline, costs, companion, .. } = &mut *self.session;
        let planned = s.plan(costs, companion.as_ref());
        let can_try = planned > 0 && timeline.ahead() == 0;
        if let (true, Guesser::Model(text), Some(companion)) = (can_try, &mut s.guesser, companion) {
            companion.guess(&mut [(0, planned, text)])?;
        }
        let drafts = s.set_rows(if can_try { planned } else { 0 }, last, self.computed);
        let begin = Instant::now();
        if drafts == 0 {
            if std::mem::take(&mut s.moved) {
                timeline.run(&s.rows, false)?;
            }
            // until there is something to guess, steps are enqueued ahead
            timeline.next(planned == 0, &mut self.chosen)?;
            self.ready.push_back(self.chosen[0]);
            self.computed += 1;
            costs.observe(1, begin.elapsed().as_secs_f64());
            return Ok(());
        }
        timeline.speculate(&s.rows, false, &mut s.chosen)?;
        s.moved = true;
        self.ready.extend(s.chosen.iter().flatten());
        self.computed += self.ready.len();
        s.drafted += drafts;
        s.accepted += self.ready.len() - 1;
        s.guesser.tried(drafts, self.ready.len() - 1);
        costs.observe(s.rows.len(), begin.elapsed().as_secs_f64());
        Ok(())
    }
}

impl Iterator for Decode<'_> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Result<u32>> {
        if self.failed || self.session.tokens.len() >= self.session.max_tokens {
            return None;
        }
        let token = self.advance();
        match &token {
            Ok(t) => self.session.tokens.push(*t),
            Err(_) => self.failed = true,
        }
        Some(token)
    }
}

impl Drop for Decode<'_> {
    fn drop(&mut self) {
        let s = &mut *self.session;
        let ahead = s.timeline.ahead();
        let stopped = s.timeline.run(&[], false).is_ok();
        // after an error, nothing that was computed is relied upon
        s.computed = if self.failed || !stopped { 0 } else { (self.computed + ahead).min(s.tokens.len()) };
    }
}
