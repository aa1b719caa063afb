//! Steps of a batch that also compute guesses of the next tokens, in rows that no sequence needs.

use super::{
    Batch, JobId,
    text::{Each, Text},
};
use crate::{
    backend::DECODE_ROWS,
    engine::{
        speculate::{Companion, Costs, Draft, Guesser, Offer, share},
        timeline::Row,
    },
    error::{Error, Result},
};
use std::time::Instant;

/// How likely a token is when little else is allowed: it is not certain, since the same text may be made of other tokens.
const EXPECTED: f32 = 0.9;

impl Text {
    /// The guesses that the next step may try.
    fn offer(&mut self, vocab: usize, companion: Option<&Companion>) -> Offer<'_> {
        let most = self.writer.left().min(self.room()).saturating_sub(1).min(DECODE_ROWS - 1);
        self.expected.clear();
        let Some(guesser) = &mut self.guesser else { return Offer::default() };
        let Some(constraint) = &mut self.constraint else { return guesser.offer(most, companion) };
        let mut chance = 1.0;
        self.expected.extend(constraint.expected().into_iter().take_while(|t| (*t as usize) < vocab).take(most).map(
            |token| {
                chance *= EXPECTED;
                Draft { token, chance }
            },
        ));
        if !self.expected.is_empty() {
            return Offer { drafts: &self.expected, seconds: 0.0 };
        }
        let is_known = matches!(guesser, Guesser::Text(_)); // a model's guesses are made later
        let mut offer = guesser.offer(most, companion);
        if is_known {
            let tokens: Vec<u32> = offer.drafts.iter().map(|d| d.token).collect();
            offer.drafts = &offer.drafts[..constraint.allows(&tokens).min(tokens.len())];
        }
        offer
    }

    /// The first guesses of those that it offered, at most this many; a model's as far as the constraint allows them.
    fn guesses(&mut self, count: usize) -> Vec<u32> {
        if !self.expected.is_empty() {
            return self.expected.iter().take(count).map(|d| d.token).collect();
        }
        let Some(guesser) = &mut self.guesser else { return Vec::new() };
        let mut tokens: Vec<u32> = guesser.guesses(count).collect();
        if let (Guesser::Model(_), Some(constraint)) = (guesser, &mut self.constraint) {
            tokens.truncate(constraint.allows(&tokens));
        }
        tokens
    }
}

impl Batch {
    /// To verify speculation: from now on the number of guesses in a step is random, whatever they cost.
    pub(crate) fn try_drafts(&mut self, seed: u64) {
        self.costs = Costs::trial(seed);
    }

    /// Decides how many guesses are worth computing in the next step, for each text whose turn it is: they go to `taken`.
    /// Returns their sum.
    pub(super) fn plan(&mut self) -> usize {
        self.taken.clear();
        let turn = self.turn();
        if self.running[..turn].iter().all(|t| t.guesser.is_none()) {
            return 0;
        }
        let (vocab, companion) = (self.engine.config().vocab, self.companion.as_ref());
        let offers: Vec<Offer> = self.running[..turn].iter_mut().map(|t| t.offer(vocab, companion)).collect();
        share(&mut self.costs, &offers, &mut self.taken);
        self.taken.iter().sum()
    }

    /// The smaller model makes its guesses.
    fn guess(&mut self) -> Result<()> {
        let Some(companion) = &mut self.companion else { return Ok(()) };
        let texts = self.running.iter_mut().zip(&self.taken).filter(|(_, count)| **count > 0);
        let mut texts: Vec<_> = texts
            .filter_map(|(t, &count)| match &mut t.guesser {
                Some(Guesser::Model(model)) if t.expected.is_empty() => Some((t.sequence, count, model)),
                _ => None,
            })
            .collect();
        companion.guess(&mut texts)
    }

    /// Computes one token of every text whose turn it is, and one more for each guess that is right.
    pub(super) fn speculate(&mut self, each: Each<'_>) -> Result<()> {
        self.guess()?;
        let (begin, mut rows) = (Instant::now(), Vec::with_capacity(DECODE_ROWS));
        let mut texts: Vec<(JobId, usize)> = Vec::with_capacity(self.running.len());
        for (text, &most) in self.running.iter_mut().zip(&self.taken) {
            let (first, last, sequence, pos) = (rows.len(), text.last(), text.sequence, text.pos);
            let tokens = std::iter::once(last).chain(text.guesses(most)).zip(pos..);
            rows.extend(tokens.map(|(token, pos)| Row { sequence, token, pos }));
            let drafts = rows.len() - first - 1;
            text.timings.drafted_tokens += drafts;
            texts.push((text.id, drafts));
        }
        // The device chooses a token after each row, unless what is allowed there depends on the token before: then the host asks for
        // one after the other.
        let turn = self.running.iter().zip(&texts);
        let one_by_one = turn.clone().any(|(text, (_, drafts))| *drafts > 0 && text.constraint.is_some());
        let mut chosen = Vec::new();
        if one_by_one {
            self.timeline.compute(&rows)?;
        } else {
            let keep_logits = turn.into_iter().any(|(text, _)| text.logprobs.is_some());
            self.timeline.speculate(&rows, keep_logits, &mut chosen)?;
        }
        self.rows.0.clear(); // the rows that decode are to be set anew
        let mut first = 0;
        for (id, drafts) in texts {
            let guessed = &rows[first + 1..][..drafts];
            self.tell_while_right(id, first, guessed, &chosen, each)?;
            first += 1 + drafts;
        }
        self.served += 1;
        self.observe(rows.len(), begin);
        Ok(())
    }

    /// Reports a text's tokens, by the rows from `first` on, until one differs from the guess. They are chosen here, if the device has
    /// not `chosen` them.
    fn tell_while_right(
        &mut self,
        id: JobId,
        first: usize,
        guessed: &[Row],
        chosen: &[Option<u32>],
        each: Each<'_>,
    ) -> Result<()> {
        let Some(i) = self.running.iter().position(|t| t.id == id) else { return Ok(()) };
        let vocab = self.engine.config().vocab;
        for row in 0..=guessed.len() {
            let text = &mut self.running[i];
            if row > 0 {
                text.timings.accepted_tokens += 1;
                match text.mask(vocab, each) {
                    Ok(Some(mask)) => self.timeline.mask(text.sequence, &mask)?,
                    Ok(None) => {}
                    Err(()) => {
                        self.end(i);
                        return Ok(());
                    }
                }
            }
            text.pos += 1;
            let (sequence, pos, top) = (text.sequence, text.pos, text.logprobs);
            let token = match chosen.get(first + row) {
                Some(&token) => {
                    token.ok_or_else(|| Error::Op { op: "speculate", what: "a row chose no token".into() })?
                }
                None => self.timeline.choose(sequence, first + row, pos)?,
            };
            let logprobs = self.logprobs(top, first + row, token)?;
            if !self.running[i].tell(token, logprobs, each) {
                self.end(i);
                return Ok(());
            }
            if guessed.get(row).is_none_or(|next| next.token != token) {
                let text = &mut self.running[i];
                if let Some(guesser) = text.guesser.as_mut().filter(|_| text.expected.is_empty()) {
                    guesser.tried(guessed.len(), row);
                }
                return Ok(());
            }
        }
        Ok(())
    }
}
