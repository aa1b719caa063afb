//! Prompts are computed one at a time, in parts between steps; and so is again what a job that was put back had before.

use super::{
    Batch, JobEvent, MAX_CHUNK, MIN_CHUNK, Pooling, TokenLogprobs,
    logprobs::token_logprobs,
    text::{Each, Text},
};
use crate::{
    backend::DECODE_ROWS,
    engine::{generate::FinishReason, timeline::Row},
    error::Result,
};

/// A job whose prompt is being computed.
pub struct Filling {
    pub text: Text,
    /// Log-probabilities of the prompt's tokens so far, where they are wanted.
    scores: Vec<TokenLogprobs>,
    /// The sum of its tokens' hidden states so far, or the last one, where its vector is wanted.
    state: Vec<f32>,
}

impl Filling {
    pub fn new(text: Text) -> Filling {
        Filling { text, scores: Vec::new(), state: Vec::new() }
    }
}

/// How many tokens the next part of a prompt has, when `left` are still to be computed: at most `chunk`, and never so
/// many that [`DECODE_ROWS`] or fewer would be left.
fn part(left: usize, chunk: usize) -> usize {
    match left {
        _ if left <= chunk => left,
        _ if left - chunk <= DECODE_ROWS => left - (DECODE_ROWS + 1),
        _ => chunk,
    }
}

impl Batch {
    /// Computes the next part; after the last part the text runs.
    pub(super) fn fill(&mut self, each: Each<'_>) -> Result<()> {
        let Some(mut filling) = self.filling.take() else { return Ok(()) };
        match filling.text.pos < filling.text.prompt.len() {
            true => self.fill_prompt(&mut filling)?,
            false => self.fill_answer(&mut filling.text)?,
        }
        if filling.text.pos < filling.text.len() {
            self.filling = Some(filling);
            return Ok(());
        }
        let Filling { mut text, scores, mut state } = filling;
        let goes_on = match text.is_told() {
            true => self.resume(&mut text)?,
            false => {
                if let Some(pooling) = text.embed {
                    let count = if pooling == Pooling::Mean { text.prompt.len() } else { 1 };
                    state.iter_mut().for_each(|sum| *sum /= count as f32);
                    each(text.id, JobEvent::Embedding(state));
                }
                self.first(&mut text, scores, each)?
            }
        };
        self.running.push(text);
        if !goes_on {
            self.end(self.running.len() - 1);
        }
        Ok(())
    }

    /// Computes the next part of the prompt.
    fn fill_prompt(&mut self, Filling { text, scores, state }: &mut Filling) -> Result<()> {
        let (from, left) = (text.pos, text.prompt.len() - text.pos);
        // while no text is running, nobody waits for the end of this part
        let chunk = if self.running.is_empty() { MAX_CHUNK } else { self.options.chunk };
        let n = part(left, chunk.min(self.timeline.chunk().max(MIN_CHUNK)));
        let (tokens, is_last, is_told) = (&text.prompt[from..from + n], n == left, text.is_told());
        match text.prompt_logprobs.filter(|_| !is_told) {
            None => self.timeline.extend(text.sequence, tokens, from, is_last && !is_told)?,
            Some(top) => {
                let next = &text.prompt[from + 1..];
                let mut score = |i: usize, logits: &[f32]| {
                    scores.extend(next.get(i).map(|&token| token_logprobs(logits, token, top)));
                };
                self.timeline.extend_each(text.sequence, tokens, from, &mut score)?;
                self.timeline.head(n - 1)?;
            }
        }
        match text.embed {
            // Added token by token, so that the sum does not depend on where the parts begin.
            Some(Pooling::Mean) if !is_told => self.timeline.hidden(0, n, &mut |row| {
                state.resize(row.len(), 0.0);
                state.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            })?,
            Some(Pooling::Last) if is_last && !is_told => {
                self.timeline.hidden(n - 1, 1, &mut |row| *state = row.to_vec())?
            }
            _ => {}
        }
        text.pos += n;
        self.hold(text);
        text.read(from);
        Ok(())
    }

    /// Computes more of an answer that was begun before, in rows of steps, which have the bits that they had then.
    fn fill_answer(&mut self, text: &mut Text) -> Result<()> {
        let left = &text.answer[text.pos - text.prompt.len()..text.answer.len() - 1];
        let rows = left.iter().take(DECODE_ROWS).zip(text.pos..);
        let rows: Vec<Row> = rows.map(|(&token, pos)| Row { sequence: text.sequence, token, pos }).collect();
        self.rows.0.clear(); // the rows that decode are to be set anew
        self.timeline.compute(&rows)?;
        text.pos += rows.len();
        Ok(())
    }

    /// Makes the sampler what it was when the text was put back.
    fn resume(&mut self, text: &mut Text) -> Result<bool> {
        let Text { sequence, prompt, answer, options, writer, constraint, .. } = text;
        let masked = constraint.is_some();
        self.timeline.sampler(*sequence, prompt, answer, &options.sampling, writer.stop_ids(), masked)?;
        Ok(true)
    }

    /// Chooses the first token of a text whose prompt is computed. Returns whether the text goes on.
    fn first(&mut self, text: &mut Text, scores: Vec<TokenLogprobs>, each: Each<'_>) -> Result<bool> {
        self.timeline.wait()?; // a device may still be computing the prompt, and this is part of its time
        text.timings.prompt_seconds = text.begin.elapsed().as_secs_f64();
        if text.prompt_logprobs.is_some() {
            each(text.id, JobEvent::Prompt(scores));
        }
        if text.writer.left() == 0 {
            text.finish(FinishReason::Length, None, each);
            return Ok(false);
        }
        let Ok(mask) = text.mask(self.engine.config().vocab, each) else { return Ok(false) };
        let (sequence, masked) = (text.sequence, mask.is_some());
        self.timeline.sampler(sequence, &text.prompt, &[], &text.options.sampling, text.writer.stop_ids(), masked)?;
        if let Some(mask) = mask {
            self.timeline.mask(sequence, &mask)?;
        }
        let token = self.timeline.choose(sequence, 0, text.prompt.len())?;
        let logprobs = self.logprobs(text.logprobs, 0, token)?;
        Ok(text.tell(token, logprobs, each))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_never_small() {
        for chunk in [MIN_CHUNK, MIN_CHUNK + 1, 64, 511] {
            for len in DECODE_ROWS + 1..1200 {
                let (mut left, mut parts) = (len, 0);
                while left > 0 {
                    let n = part(left, chunk);
                    assert!(n > DECODE_ROWS && n <= chunk, "{n} of {left}, chunk {chunk}");
                    (left, parts) = (left - n, parts + 1);
                }
                assert!(parts <= len.div_ceil(chunk) + 1);
            }
        }
        assert_eq!(part(5, MIN_CHUNK), 5);
    }
}
