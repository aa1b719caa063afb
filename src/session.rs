//! A session: one timeline of tokens with its KV cache.

use crate::{
    engine::Engine,
    error::{Error, Result},
    sampler::Sampling,
    score::{Scores, Trie},
    timeline::AnyTimeline,
};
use std::time::Duration;

/// One mutable timeline: tokens, their keys and values, and the logits after the last.
///
/// A caller passes whole token sequences; [`Session::sync`] computes only what differs from what the session holds.
pub struct Session {
    engine: Engine,
    timeline: Box<dyn AnyTimeline>,
    tokens: Vec<u32>,
    /// The first so many tokens have their keys and values in the cache.
    computed: usize,
    /// The device holds the logits after the last token.
    has_logits: bool,
    max_tokens: usize,
}

impl Session {
    pub(crate) fn new(engine: Engine, timeline: Box<dyn AnyTimeline>, max_tokens: usize) -> Session {
        Session { engine, timeline, tokens: Vec::new(), computed: 0, has_logits: false, max_tokens }
    }

    /// The engine that made it.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Tokens of the timeline.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Capacity in tokens.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// How many tokens the timeline and `tokens` begin with in common.
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

    /// Makes the timeline equal to `tokens`, keeping the longest common prefix of what is computed; the logits after the last
    /// token are then ready. Returns how many tokens did not have to be computed.
    ///
    /// # Errors
    /// `Context` when they do not fit, `Input` for an empty sequence or an id outside the vocabulary; the session is then
    /// unchanged.
    pub fn sync(&mut self, tokens: &[u32]) -> Result<usize> {
        self.sync_with(tokens, &mut |_, _| true).map(|(reused, _)| reused)
    }

    /// [`Session::sync`] that reports `(tokens ready, tokens in all)` before each chunk and can be cancelled between chunks by
    /// returning `false`; the second value says whether it ran to the end.
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
            self.timeline.extend(chunk, self.computed, last)?;
            self.tokens.extend(chunk);
            self.computed += chunk.len();
        }
        self.has_logits = true;
        Ok((reused, true))
    }

    /// Waits for everything asked of the device.
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
        self.timeline.logits()
    }

    /// Makes the timeline equal to `tokens` and calls `each(i, logits)` with the logits after token `i`, for `i` in `from..`.
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
            self.timeline.extend_each(chunk, at, &mut |i, logits| each(at + i, logits))?;
            self.tokens.extend(chunk);
            self.computed += chunk.len();
        }
        Ok(())
    }

    /// Log-probabilities of each continuation after `prefix`. The prefix is computed once, as far as the session does not
    /// hold it already, and tokens that continuations begin with in common are computed once as well; the last token of a
    /// continuation is only looked up, so one of a single token costs nothing of its own.
    ///
    /// # Errors
    /// `Context` when the prefix and a continuation but for its last token do not fit, `Input` for an empty prefix or an id
    /// outside the vocabulary; the session is then unchanged.
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
        let mut computed = 0;
        for chain in trie.chains() {
            // the tokens of the chain's nodes, and before them what is missing of the prefix
            let mut tokens: Vec<u32> = trie.tokens(&chain);
            let start = match trie.depth(chain[0]) {
                0 => {
                    // the last token's logits are wanted
                    let start = self.common(prefix).min(self.computed).min(prefix.len() - 1);
                    tokens.splice(..0, prefix[start..].iter().copied());
                    start
                }
                depth => prefix.len() - 1 + depth,
            };
            computed += tokens.len();
            self.tokens.truncate(start);
            (self.computed, self.has_logits) = (start, false);
            let targets: Vec<Vec<u32>> = chain.iter().map(|&node| trie.targets(node)).collect();
            let unscored = tokens.len() - targets.len();
            let (mut scores, mut at) = (Vec::new(), 0);
            for chunk in tokens.chunks(self.timeline.chunk()) {
                let (from, to) = (at.max(unscored) - unscored, (at + chunk.len()).max(unscored) - unscored);
                scores.extend(self.timeline.extend_score(chunk, self.computed, &targets[from..to])?);
                self.tokens.extend(chunk);
                self.computed += chunk.len();
                at += chunk.len();
            }
            chain.iter().zip(scores).for_each(|(&node, scores)| trie.set(node, &scores));
        }
        Ok(Scores { continuations: trie.scores(continuations), computed })
    }

    /// The tokens that follow, one by one, chosen and fed back on the device. Stop ids only matter for `min_tokens`: whoever
    /// takes the tokens decides when to stop, by dropping the iterator. Ends when the context is full.
    ///
    /// # Errors
    /// `Input` when an option is out of range; when the timeline is empty.
    pub fn decode(&mut self, sampling: &Sampling, stop_ids: &[u32]) -> Result<Decode<'_>> {
        if !self.has_logits {
            let tokens = self.tokens.clone();
            self.sync(&tokens)?;
        }
        self.timeline.start(&self.tokens, sampling, stop_ids)?;
        self.has_logits = false;
        Ok(Decode { session: self, failed: false })
    }
}

/// Iterator of [`Session::decode`].
pub struct Decode<'a> {
    session: &'a mut Session,
    failed: bool,
}

impl Decode<'_> {
    /// Time that the session has spent waiting for tokens from the device, ever.
    pub(crate) fn waited(&self) -> Duration {
        self.session.timeline.waited()
    }
}

impl Iterator for Decode<'_> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Result<u32>> {
        let s = &mut *self.session;
        if self.failed || s.tokens.len() >= s.max_tokens {
            return None;
        }
        let token = s.timeline.next();
        match &token {
            Ok(t) => s.tokens.push(*t),
            Err(_) => self.failed = true,
        }
        Some(token)
    }
}

impl Drop for Decode<'_> {
    fn drop(&mut self) {
        let s = &mut *self.session;
        // after an error nothing that was computed is relied upon
        let computed = s.timeline.stop().unwrap_or(0);
        s.computed = if self.failed { 0 } else { computed.min(s.tokens.len()) };
    }
}
