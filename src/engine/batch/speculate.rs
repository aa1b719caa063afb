//! Steps of a batch with guesses: they take rows that no sequence needs.

use super::{Batch, JobId, schedule::Each};
use crate::{
    backend::DECODE_ROWS,
    engine::{
        speculate::{Costs, Draft, share},
        timeline::Row,
    },
    error::Result,
};

impl Batch {
    /// From here on steps take as many guesses as chance will have, whatever they cost.
    pub(crate) fn try_drafts(&mut self, seed: u64) {
        self.costs = Costs::trial(seed);
    }

    /// How many guesses are worth their rows in the next step; of each running text, in `taken`.
    pub(super) fn plan(&mut self) -> usize {
        self.taken.clear();
        if self.running.iter().all(|t| t.drafter.is_none()) {
            return 0;
        }
        let drafts = self.running.iter_mut().map(|t| {
            let most = t.writer.left().saturating_sub(1).min(DECODE_ROWS - 1);
            t.drafter.as_mut().map_or(&[][..], |d| d.drafts(most))
        });
        let drafts: Vec<&[Draft]> = drafts.collect();
        share(&mut self.costs, &drafts, &mut self.taken);
        self.taken.iter().sum()
    }

    /// One token of every running text, and one more for each of its guesses that is right.
    pub(super) fn speculate(&mut self, each: Each<'_>) -> Result<()> {
        let mut rows = Vec::with_capacity(DECODE_ROWS);
        let mut texts: Vec<(JobId, usize)> = Vec::with_capacity(self.running.len());
        for (text, &drafts) in self.running.iter_mut().zip(&self.taken) {
            let guessed = text.drafter.as_mut().map_or(&[][..], |d| d.drafts(drafts)).iter().map(|d| d.token);
            let tokens = std::iter::once(text.last).chain(guessed).zip(text.pos..);
            rows.extend(tokens.map(|(token, pos)| Row { sequence: text.sequence, token, pos }));
            text.timings.drafted_tokens += drafts;
            texts.push((text.id, drafts));
        }
        self.timeline.compute(&rows)?;
        self.rows.0.clear(); // the rows that decode are to be set anew
        let mut first = 0;
        for (id, drafts) in texts {
            let guessed = &rows[first + 1..][..drafts];
            self.choose_while_right(id, first, guessed, each)?;
            first += 1 + drafts;
        }
        self.release();
        Ok(())
    }

    /// Tells of a text's tokens by the rows from `first` on, until one is not what was guessed.
    fn choose_while_right(&mut self, id: JobId, first: usize, guessed: &[Row], each: Each<'_>) -> Result<()> {
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
                        self.running.remove(i);
                        return Ok(());
                    }
                }
            }
            text.pos += 1;
            let (sequence, pos, top) = (text.sequence, text.pos, text.logprobs);
            let token = self.timeline.choose(sequence, first + row, pos)?;
            let logprobs = self.logprobs(top, first + row, token)?;
            if !self.running[i].tell(token, logprobs, each) {
                self.running.remove(i);
                return Ok(());
            }
            if guessed.get(row).is_none_or(|next| next.token != token) {
                return Ok(());
            }
        }
        Ok(())
    }
}
