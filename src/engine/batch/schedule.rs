//! The batch's schedule: whether the next piece of work is a decode step or a part of a waiting prompt, and whose turn a step is.

use super::{Batch, TokenLogprobs, logprobs::token_logprobs, text::Each};
use crate::{backend::DECODE_ROWS, engine::timeline::Row, error::Result};
use std::time::Instant;

/// Steps of a turn, while more texts run than a step has rows. When a turn ends, the device has nothing enqueued until the host has
/// taken the last token and set the rows of the next turn: predicted, not measured, 0.05 ms on a GPU, which at 4 ms a step is 0.2% of
/// eight. And of 64 texts each gets its next tokens after at most some 24 steps of others.
const TURN: usize = 8;

impl Batch {
    pub(super) fn advance(&mut self, each: Each<'_>) -> Result<bool> {
        self.admit()?;
        // The first token after a prompt is chosen separately. Steps that were enqueued earlier could still choose a
        // token for the previous owner of this sequence, so their tokens are taken first.
        let fills = self.filling.is_some() && self.timeline.ahead() == 0;
        if fills {
            self.fill(each)?;
        }
        let decodes = !self.running.is_empty();
        self.decode(each)?;
        Ok(fills || decodes || self.filling.is_some())
    }

    /// How many of the running texts, from the first on, take part in the next step.
    pub(super) fn turn(&self) -> usize {
        self.running.len().min(DECODE_ROWS)
    }

    /// The log-probabilities of a row's token, where they are wanted.
    pub(super) fn logprobs(&mut self, top: Option<usize>, row: usize, token: u32) -> Result<Option<TokenLogprobs>> {
        let Some(top) = top else { return Ok(None) };
        let mut logits = vec![0f32; self.engine.config().vocab];
        self.timeline.logits(row, &mut logits)?;
        Ok(Some(token_logprobs(&logits, token, top)))
    }

    /// One token of every text whose turn it is.
    fn decode(&mut self, each: Each<'_>) -> Result<()> {
        let begin = Instant::now();
        let none_ahead = self.timeline.ahead() == 0;
        match none_ahead {
            true => self.prepare(each)?,
            // what is enqueued has its pages; for more there may be none yet
            false => (0..self.turn()).try_for_each(|i| self.cover(i, false).map(drop))?,
        }
        let drafts = self.plan();
        if none_ahead && drafts > 0 {
            return self.speculate(each);
        }
        if none_ahead {
            self.set_rows()?;
        }
        if self.running.is_empty() {
            // the jobs for which the remaining steps were enqueued have ended
            self.timeline.run(&[], false)?;
            self.rows.0.clear();
            return Ok(());
        }
        // While nothing has to happen between two steps, more are enqueued ahead.
        let texts = &self.running[..self.turn()];
        let ahead = self.filling.is_none()
            && drafts == 0
            && (self.running.len() == texts.len() || self.served + 1 < TURN)
            && self.rows.0.iter().copied().eq(texts.iter().map(|t| t.id))
            && texts.iter().all(|t| t.logprobs.is_none() && t.constraint.is_none());
        let mut tokens = std::mem::take(&mut self.tokens);
        self.timeline.next(ahead, &mut tokens)?;
        self.served += 1;
        self.observe(tokens.len(), begin);
        for (row, &token) in tokens.iter().enumerate() {
            let id = self.rows.0[row];
            let Some(i) = self.running.iter().position(|t| t.id == id) else { continue };
            let logprobs = self.logprobs(self.running[i].logprobs, row, token)?;
            let text = &mut self.running[i];
            text.pos += 1;
            if !text.tell(token, logprobs, each) {
                self.end(i);
            }
        }
        self.tokens = tokens;
        Ok(())
    }

    /// Remembers how long a step of this many rows took, if nothing else was done meanwhile.
    pub(super) fn observe(&mut self, rows: usize, begin: Instant) {
        if self.filling.is_none() {
            self.costs.observe(rows, begin.elapsed().as_secs_f64());
        }
    }

    /// Decides whose turn it is, gives them pages, and tells the device which tokens are allowed for each constrained text.
    fn prepare(&mut self, each: Each<'_>) -> Result<()> {
        if self.served >= TURN {
            self.served = 0;
            let turn = self.turn();
            self.running.rotate_left(turn); // the same order if it is the turn of all
        }
        self.try_put_back();
        let (vocab, mut i) = (self.engine.config().vocab, 0);
        while i < self.turn() {
            if !self.cover(i, true)? {
                i = 0; // somebody was put back
                continue;
            }
            match self.running[i].mask(vocab, each) {
                Err(()) => {
                    self.end(i);
                    continue;
                }
                Ok(Some(mask)) => self.timeline.mask(self.running[i].sequence, &mask)?,
                Ok(None) => {}
            }
            i += 1;
        }
        Ok(())
    }

    /// Makes the device decode the texts whose turn it is.
    fn set_rows(&mut self) -> Result<()> {
        let texts = &self.running[..self.turn()];
        let keeps_logits = texts.iter().any(|t| t.logprobs.is_some());
        let ids = texts.iter().map(|t| t.id);
        if self.rows.1 == keeps_logits && self.rows.0.iter().copied().eq(ids.clone()) {
            return Ok(());
        }
        let ids = ids.collect();
        let rows: Vec<Row> = texts.iter().map(|t| Row { sequence: t.sequence, token: t.last(), pos: t.pos }).collect();
        self.timeline.run(&rows, keeps_logits)?;
        self.rows = (ids, keeps_logits);
        Ok(())
    }
}
