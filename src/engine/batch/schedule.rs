//! The batch's schedule: whether the next piece of work is a decode step or a part of a waiting prompt.

use super::{
    Batch, Constraint, Finish, Job, JobEvent, JobId, MAX_CHUNK, MIN_CHUNK, Pooling, TokenLogprobs,
    logprobs::token_logprobs, prefix,
};
use crate::{
    backend::DECODE_ROWS,
    engine::{
        generate::{FinishReason, GenerateOptions, StoppedBy, Timings, Writer},
        speculate::{Draft, Guesser},
        timeline::Row,
    },
    error::Result,
};
use std::time::Instant;

/// A job that has no sequence yet.
pub struct Waiting {
    pub text: Text,
    pub since: Instant,
}

/// A job whose prompt is being computed.
pub struct Filling {
    pub text: Text,
    /// Log-probabilities of the prompt's tokens so far, where they are wanted.
    scores: Vec<TokenLogprobs>,
    /// The sum of its tokens' hidden states so far, or the last one, where its vector is wanted.
    state: Vec<f32>,
}

/// A job that is being answered.
pub struct Text {
    pub id: JobId,
    pub sequence: usize,
    prompt: Vec<u32>,
    options: GenerateOptions,
    pub logprobs: Option<usize>,
    prompt_logprobs: Option<usize>,
    embed: Option<Pooling>,
    pub constraint: Option<Box<dyn Constraint>>,
    /// Guesses the next tokens. It has read the computed part of the prompt, and the answer.
    pub guesser: Option<Guesser>,
    /// Tokens that the constraint makes likely; they are tried before those of the guesser.
    pub expected: Vec<Draft>,
    pub writer: Writer,
    begin: Instant,
    pub timings: Timings,
    queue_seconds: f64,
    /// How many tokens are computed, or about to be: the position of `last`.
    pub pos: usize,
    /// The last token chosen.
    pub last: u32,
}

pub type Each<'a> = &'a mut dyn FnMut(JobId, JobEvent);

impl Text {
    pub fn new(id: JobId, job: Job, writer: Writer) -> Text {
        Text {
            id,
            sequence: usize::MAX, // none yet
            timings: Timings { prompt_tokens: job.prompt.len(), ..Timings::default() },
            prompt: job.prompt,
            options: job.options,
            logprobs: job.logprobs,
            prompt_logprobs: job.prompt_logprobs,
            embed: job.embed,
            constraint: job.constraint,
            guesser: None,
            expected: Vec::new(),
            writer,
            begin: Instant::now(),
            queue_seconds: 0.0,
            pos: 0,
            last: 0,
        }
    }

    /// Lets the guesser read the prompt from a position on, as far as it is computed.
    fn read(&mut self, from: usize) {
        if let Some(guesser) = &mut self.guesser {
            guesser.read(&self.prompt[from..self.pos]);
        }
    }

    /// Reports a token. Returns whether the text goes on.
    pub fn tell(&mut self, token: u32, logprobs: Option<TokenLogprobs>, each: Each<'_>) -> bool {
        self.timings.count(self.begin);
        self.last = token;
        if let Some(guesser) = &mut self.guesser {
            guesser.push(token);
        }
        each(self.id, JobEvent::Token(token, logprobs));
        let written = self.writer.push(token);
        if !written.text.is_empty() {
            each(self.id, JobEvent::Text(written.text));
        }
        if let Some((reason, by)) = written.end {
            self.finish(reason, by, each);
            return false;
        }
        match self.constraint.as_mut().map(|c| c.accept(token)) {
            Some(Err(why)) => {
                each(self.id, JobEvent::Failed(why));
                false
            }
            _ => true,
        }
    }

    fn finish(&self, reason: FinishReason, by: Option<StoppedBy>, each: Each<'_>) {
        let (timings, queue_seconds) = (self.timings, self.queue_seconds);
        each(self.id, JobEvent::Finish(Finish { reason, by, timings, queue_seconds }));
    }

    /// The tokens that its constraint allows; `None` without one. If the constraint fails, that is reported and the
    /// text ends.
    pub fn mask(&mut self, vocab: usize, each: Each<'_>) -> Result<Option<Vec<u32>>, ()> {
        let Some(constraint) = &mut self.constraint else { return Ok(None) };
        let mut mask = vec![0; vocab.div_ceil(32)];
        match constraint.allowed(&mut mask) {
            Ok(()) => Ok(Some(mask)),
            Err(why) => {
                each(self.id, JobEvent::Failed(why));
                Err(())
            }
        }
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

    /// Frees the sequences that no job uses any more.
    pub(super) fn release(&mut self) {
        let texts = || self.running.iter().chain(self.filling.as_ref().map(|f| &f.text));
        for i in 0..self.held.len() {
            self.held[i].busy = texts().any(|t| t.sequence == i);
        }
    }

    /// Gives the next job a sequence, if no other prompt is being computed.
    fn admit(&mut self) -> Result<()> {
        if self.filling.is_some() {
            return Ok(());
        }
        let Some(text) = self.queue.front().map(|w| &w.text) else { return Ok(()) };
        // The last part of a prompt must have more than DECODE_ROWS tokens, so a shorter prompt is computed as a whole.
        // So is a prompt of which each token is scored or each hidden state is wanted.
        let each = text.prompt_logprobs.is_some() || text.embed == Some(Pooling::Mean);
        let most = if each { 0 } else { text.prompt.len().saturating_sub(DECODE_ROWS + 1) };
        let Some(choice) = prefix::choose(&self.held, &text.prompt, most) else { return Ok(()) };
        let Some(Waiting { mut text, since }) = self.queue.pop_front() else { return Ok(()) };
        if let Some(from) = choice.from {
            self.timeline.copy(choice.sequence, from, choice.reused)?;
        }
        self.clock += 1;
        let held = &mut self.held[choice.sequence];
        (held.busy, held.used) = (true, self.clock);
        held.tokens.clear();
        held.tokens.extend(&text.prompt[..choice.reused]);
        text.begin = Instant::now();
        text.queue_seconds = (text.begin - since).as_secs_f64();
        text.timings.reused_tokens = choice.reused;
        (text.sequence, text.pos) = (choice.sequence, choice.reused);
        let room = self.options.max_tokens - text.prompt.len();
        text.guesser = text.options.guesser(&text.prompt, room, self.companion.as_ref());
        text.read(0);
        self.filling = Some(Filling { text, scores: Vec::new(), state: Vec::new() });
        Ok(())
    }

    /// Computes the next part of the prompt; after the last part it chooses the first token.
    fn fill(&mut self, each: Each<'_>) -> Result<()> {
        let Some(mut filling) = self.filling.take() else { return Ok(()) };
        let Filling { text, scores, state } = &mut filling;
        let (from, left) = (text.pos, text.prompt.len() - text.pos);
        // while no text is running, nobody waits for the end of this part
        let chunk = if self.running.is_empty() { MAX_CHUNK } else { self.options.chunk };
        let n = part(left, chunk.min(self.timeline.chunk().max(MIN_CHUNK)));
        let (tokens, is_last) = (&text.prompt[from..from + n], n == left);
        match text.prompt_logprobs {
            None => self.timeline.extend(text.sequence, tokens, from, is_last)?,
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
            Some(Pooling::Mean) => self.timeline.hidden(0, n, &mut |row| {
                state.resize(row.len(), 0.0);
                state.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            })?,
            Some(Pooling::Last) if is_last => self.timeline.hidden(n - 1, 1, &mut |row| *state = row.to_vec())?,
            _ => {}
        }
        if text.prompt.len() > DECODE_ROWS {
            self.held[text.sequence].tokens.extend(tokens);
        }
        text.pos += n;
        text.read(from);
        if !is_last {
            self.filling = Some(filling);
            return Ok(());
        }
        let Filling { mut text, scores, mut state } = filling;
        if let Some(pooling) = text.embed {
            let count = if pooling == Pooling::Mean { text.prompt.len() } else { 1 };
            state.iter_mut().for_each(|sum| *sum /= count as f32);
            each(text.id, JobEvent::Embedding(state));
        }
        if self.first(&mut text, scores, each)? {
            self.running.push(text);
        }
        self.release();
        Ok(())
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
        let sequence = text.sequence;
        self.timeline.sampler(
            sequence,
            &text.prompt,
            &text.options.sampling,
            text.writer.stop_ids(),
            mask.is_some(),
        )?;
        if let Some(mask) = mask {
            self.timeline.mask(sequence, &mask)?;
        }
        let token = self.timeline.choose(sequence, 0, text.prompt.len())?;
        let logprobs = self.logprobs(text.logprobs, 0, token)?;
        Ok(text.tell(token, logprobs, each))
    }

    /// The log-probabilities of a row's token, where they are wanted.
    pub(super) fn logprobs(&mut self, top: Option<usize>, row: usize, token: u32) -> Result<Option<TokenLogprobs>> {
        let Some(top) = top else { return Ok(None) };
        let mut logits = vec![0f32; self.engine.config().vocab];
        self.timeline.logits(row, &mut logits)?;
        Ok(Some(token_logprobs(&logits, token, top)))
    }

    /// One token of every running text.
    fn decode(&mut self, each: Each<'_>) -> Result<()> {
        let begin = Instant::now();
        let none_ahead = self.timeline.ahead() == 0;
        if none_ahead {
            self.set_masks(each)?;
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
        let ahead = self.filling.is_none()
            && drafts == 0
            && self.rows.0.iter().copied().eq(self.running.iter().map(|t| t.id))
            && self.running.iter().all(|t| t.logprobs.is_none() && t.constraint.is_none());
        let mut tokens = std::mem::take(&mut self.tokens);
        self.timeline.next(ahead, &mut tokens)?;
        self.observe(tokens.len(), begin);
        for (row, &token) in tokens.iter().enumerate() {
            let id = self.rows.0[row];
            let Some(i) = self.running.iter().position(|t| t.id == id) else { continue };
            let logprobs = self.logprobs(self.running[i].logprobs, row, token)?;
            let text = &mut self.running[i];
            text.pos += 1;
            if !text.tell(token, logprobs, each) {
                self.running.remove(i);
            }
        }
        self.tokens = tokens;
        self.release();
        Ok(())
    }

    /// Remembers how long a step of this many rows took, if nothing else was done meanwhile.
    pub(super) fn observe(&mut self, rows: usize, begin: Instant) {
        if self.filling.is_none() {
            self.costs.observe(rows, begin.elapsed().as_secs_f64());
        }
    }

    /// Tells the device which tokens are allowed for each constrained text.
    fn set_masks(&mut self, each: Each<'_>) -> Result<()> {
        let vocab = self.engine.config().vocab;
        let mut i = 0;
        while i < self.running.len() {
            match self.running[i].mask(vocab, each) {
                Err(()) => {
                    self.running.remove(i);
                    continue;
                }
                Ok(Some(mask)) => self.timeline.mask(self.running[i].sequence, &mask)?,
                Ok(None) => {}
            }
            i += 1;
        }
        self.release();
        Ok(())
    }

    /// Makes the device decode the texts that run now.
    fn set_rows(&mut self) -> Result<()> {
        let keeps_logits = self.running.iter().any(|t| t.logprobs.is_some());
        let ids = self.running.iter().map(|t| t.id);
        if self.rows.1 == keeps_logits && self.rows.0.iter().copied().eq(ids.clone()) {
            return Ok(());
        }
        let ids = ids.collect();
        let rows: Vec<Row> =
            self.running.iter().map(|t| Row { sequence: t.sequence, token: t.last, pos: t.pos }).collect();
        self.timeline.run(&rows, keeps_logits)?;
        self.rows = (ids, keeps_logits);
        Ok(())
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
