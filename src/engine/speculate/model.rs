//! Guesses by a smaller model with the same vocabulary: the tokens that it finds the most likely, one after another.

use super::{Draft, drafter::Trust};
use crate::{
    backend::DECODE_ROWS,
    engine::{
        load::Engine,
        sampler::Sampling,
        timeline::{AnyTimeline, Row},
    },
    error::{Error, Result},
    text::Tokenizer,
};
use std::time::Instant;

/// Weight, in tokens, of what is assumed about the model before anything was observed.
const PRIOR: f32 = 4.0;
/// How often it is then assumed to be right.
const ASSUMED: f32 = 0.8;
/// If the model did not seem worth it, it is tried again after this many tokens, with [`AGAIN`] guesses.
const IDLE: usize = 64;
const AGAIN: usize = 2;

/// Checks that one model can guess for another: the vocabularies must be the same.
///
/// # Errors
/// `Input` with the first token that differs.
pub(crate) fn fits(draft: &Engine, vocab: usize, tokenizer: Option<&Tokenizer>) -> Result<()> {
    let refuse = |what: String| {
        Err(Error::Input(format!(
            "the draft model has another vocabulary: {what}; one is needed whose token ids mean the same"
        )))
    };
    if draft.config().vocab != vocab {
        return refuse(format!("{} tokens, the model has {vocab}", draft.config().vocab));
    }
    let (Ok(its), Some(own)) = (draft.tokenizer(), tokenizer) else { return Ok(()) };
    match (0..vocab as u32).find(|&id| its.token(id) != own.token(id)) {
        Some(id) => refuse(format!("token {id} is {:?}, of the model {:?}", its.token(id), own.token(id))),
        None => Ok(()),
    }
}

/// The model's guesses for one text, and how far to trust them.
#[derive(Debug)]
pub(crate) struct ByModel {
    /// The text so far.
    text: Vec<u32>,
    /// How many of its first tokens the model's cache holds; `None` when that has to be looked up.
    same: Option<usize>,
    /// Most tokens that the model has room for.
    room: usize,
    /// For the first guess of a step, for the second when the first is right, and so on.
    trust: [Trust; DECODE_ROWS - 1],
    drafts: Vec<Draft>,
    guesses: Vec<u32>,
    /// Tokens since it was tried last.
    idle: usize,
}

impl ByModel {
    /// For a text that was not read yet; the model takes at most `room` tokens.
    pub fn new(room: usize) -> ByModel {
        let trust = [Trust { right: PRIOR * ASSUMED, tried: PRIOR }; DECODE_ROWS - 1];
        let (drafts, guesses) = (Vec::with_capacity(DECODE_ROWS), Vec::with_capacity(DECODE_ROWS));
        ByModel { text: Vec::with_capacity(room), same: None, room, trust, drafts, guesses, idle: 0 }
    }

    /// From now on the text has another of the model's sequences, which holds none of it.
    pub fn moved(&mut self) {
        self.same = None;
    }

    /// Reads more of the text.
    pub fn read(&mut self, tokens: &[u32]) {
        self.text.extend(tokens);
        self.idle += tokens.len();
    }

    /// How likely each of the next guesses is right, at most `most` of them. Their tokens are known only after
    /// [`Companion::guess`].
    pub fn drafts(&mut self, most: usize) -> &[Draft] {
        self.drafts.clear();
        let most = most.min(self.room.saturating_sub(self.text.len())).min(DECODE_ROWS - 1);
        let mut chance = 1.0;
        for (i, Trust { right, tried }) in self.trust.iter().take(most).enumerate() {
            chance *= if self.idle >= IDLE && i < AGAIN { ASSUMED } else { right / tried };
            self.drafts.push(Draft { token: 0, chance });
        }
        &self.drafts
    }

    /// The guesses of the last call of [`Companion::guess`].
    pub fn guesses(&self) -> &[u32] {
        &self.guesses
    }

    /// Records that `drafted` guesses were tried, and the first `accepted` of them were right.
    pub fn tried(&mut self, drafted: usize, accepted: usize) {
        self.trust.iter_mut().take(accepted).for_each(|t| t.count(true));
        if accepted < drafted {
            self.trust[accepted].count(false);
        }
        self.idle = 0;
    }
}

/// A smaller model that guesses for a larger one: it has a cache of its own for each sequence of the larger one.
pub(crate) struct Companion {
    timeline: Box<dyn AnyTimeline>,
    /// For each sequence, the tokens whose keys and values the cache has.
    held: Vec<Vec<u32>>,
    max_tokens: usize,
    tokens: Vec<u32>,
    /// Seconds that a guess for each text takes. The first one also records the CUDA graph, so it does not count.
    seconds: Option<f64>,
    guessed: bool,
}

impl Companion {
    /// For this many sequences with room for `max_tokens` tokens each.
    pub fn new(draft: &Engine, sequences: usize, max_tokens: usize) -> Result<Companion> {
        let max_tokens = max_tokens.min(draft.max_context());
        let mut timeline = draft.timeline(sequences, max_tokens)?;
        for sequence in 0..sequences {
            timeline.sampler(sequence, &[], &[], &Sampling::default(), &[], false)?;
        }
        let (held, tokens) = (vec![Vec::new(); sequences], Vec::with_capacity(sequences));
        Ok(Companion { timeline, held, max_tokens, tokens, seconds: None, guessed: false })
    }

    /// Sequences for whose texts it guesses.
    pub fn sequences(&self) -> usize {
        self.held.len()
    }

    /// Most tokens of a text for which it guesses, including the guesses.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Seconds that one more guess for each text takes; 0 as long as nothing is known.
    pub fn seconds(&self) -> f64 {
        self.seconds.unwrap_or(0.0)
    }

    /// Guesses the next tokens of the texts of these sequences, for each at most as many as are given with it and were offered.
    pub fn guess(&mut self, texts: &mut [(usize, usize, &mut ByModel)]) -> Result<()> {
        let mut most = texts.iter().map(|(_, count, _)| *count).max().unwrap_or(0);
        let mut rows = Vec::with_capacity(texts.len());
        for (sequence, _, text) in texts.iter_mut() {
            rows.extend(self.catch_up(*sequence, text)?);
            text.guesses.clear();
            most = most.min(self.max_tokens + 1 - text.text.len()); // the text with the least room limits all
        }
        if most == 0 || rows.len() < texts.len() {
            return Ok(());
        }
        let begin = Instant::now();
        self.timeline.run(&rows, false)?;
        for _ in 0..most {
            self.timeline.next(false, &mut self.tokens)?;
            for ((_, count, text), &token) in texts.iter_mut().zip(&self.tokens) {
                if text.guesses.len() < *count {
                    text.guesses.push(token);
                }
            }
        }
        self.timeline.run(&[], false)?;
        let seconds = begin.elapsed().as_secs_f64() / most as f64;
        if std::mem::replace(&mut self.guessed, true) {
            let before = self.seconds.unwrap_or(seconds);
            let weight = if seconds < before { 0.5 } else { 0.125 }; // an unusual time is too long, never too short
            self.seconds = Some(before + weight * (seconds - before));
        }
        for (sequence, _, text) in texts {
            // the keys and values of the last guess were not computed
            let guesses = &text.guesses[..text.guesses.len().saturating_sub(1)];
            self.held[*sequence].extend(guesses);
        }
        Ok(())
    }

    /// Computes what the cache lacks of a text, except for the last token, whose row it returns.
    fn catch_up(&mut self, sequence: usize, text: &mut ByModel) -> Result<Option<Row>> {
        let Some((&token, before)) = text.text.split_last() else { return Ok(None) };
        let held = &mut self.held[sequence];
        let mut same = text.same.unwrap_or(0).min(held.len());
        same += held[same..].iter().zip(&before[same.min(before.len())..]).take_while(|(a, b)| a == b).count();
        held.truncate(same.min(before.len()));
        for part in before[held.len()..].chunks(self.timeline.chunk()) {
            self.timeline.extend(sequence, part, held.len(), false)?;
            held.extend(part);
        }
        held.push(token);
        text.same = Some(held.len());
        Ok(Some(Row { sequence, token, pos: before.len() }))
    }
}
