//! Counts and times that come with every response.

use super::answer::End;
use serde::Serialize;
use utoipa::ToSchema;

/// Counts of tokens.
#[derive(Debug, Default, Clone, Copy, Serialize, ToSchema)]
pub(super) struct Usage {
    /// Tokens of the prompts, each counted once, whatever `n` is.
    pub prompt_tokens: usize,
    /// Tokens of all answers, including those that ended them.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
    /// How much of the prompts had to be computed.
    pub prompt_tokens_details: PromptDetails,
    /// How the answers were made.
    pub completion_tokens_details: CompletionDetails,
}

/// How the answers were made.
#[derive(Debug, Default, Clone, Copy, Serialize, ToSchema)]
pub(super) struct CompletionDetails {
    /// Tokens of finished answers that had been guessed, by `prediction` or otherwise.
    pub accepted_prediction_tokens: usize,
    /// Guesses that were tried and were wrong.
    pub rejected_prediction_tokens: usize,
}

/// How much of the prompts had to be computed.
#[derive(Debug, Default, Clone, Copy, Serialize, ToSchema)]
pub(super) struct PromptDetails {
    /// Tokens that did not have to be computed.
    pub cached_tokens: usize,
}

/// How long each phase took. For several answers: the longest times, and the earliest first token.
#[derive(Debug, Default, Clone, Copy, Serialize, ToSchema)]
pub(super) struct Times {
    /// Waiting for a sequence, milliseconds.
    queue_ms: f64,
    /// Computing the prompt, milliseconds.
    prefill_ms: f64,
    /// Tokens of the prompt computed a second; those in the cache do not count.
    prefill_tps: f64,
    /// From the end of the prompt to the last token, milliseconds.
    decode_ms: f64,
    /// Tokens generated a second, of all answers together.
    decode_tps: f64,
    /// From the request to the first token, milliseconds.
    ttft_ms: f64,
}

/// Adds up the answers of a request.
#[derive(Debug, Default)]
pub(super) struct Tally {
    usage: Usage,
    times: Times,
    computed: usize,
    n: usize,
}

impl Tally {
    /// For prompts of these lengths with `n` answers to each.
    pub fn new(prompts: &[usize], n: usize) -> Tally {
        let prompt_tokens = prompts.iter().sum();
        let usage = Usage { prompt_tokens, total_tokens: prompt_tokens, ..Usage::default() };
        Tally { usage, n, ..Tally::default() }
    }

    /// This many tokens came.
    pub fn tokens(&mut self, count: usize) {
        self.usage.completion_tokens += count;
        self.usage.total_tokens += count;
    }

    /// Answer `index` ended.
    pub fn end(&mut self, index: usize, end: &End) {
        let t = &end.timings;
        let ttft = (end.queue_seconds + t.first_token_seconds) * 1e3;
        let times = &mut self.times;
        times.queue_ms = times.queue_ms.max(end.queue_seconds * 1e3);
        times.prefill_ms = times.prefill_ms.max(t.prompt_seconds * 1e3);
        times.decode_ms = times.decode_ms.max(t.decode_seconds * 1e3);
        times.ttft_ms = if times.ttft_ms == 0.0 { ttft } else { times.ttft_ms.min(ttft) };
        let guesses = &mut self.usage.completion_tokens_details;
        guesses.accepted_prediction_tokens += t.accepted_tokens;
        guesses.rejected_prediction_tokens += t.drafted_tokens - t.accepted_tokens;
        self.computed = self.computed.max(t.prompt_tokens - t.reused_tokens);
        if index.is_multiple_of(self.n.max(1)) {
            // Counts the first answer to a prompt only: the others find all of the prompt in the cache.
            self.usage.prompt_tokens_details.cached_tokens += t.reused_tokens;
        }
    }

    /// The counts so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// The times so far.
    pub fn times(&self) -> Times {
        let rate = |tokens: usize, ms: f64| if ms > 0.0 { tokens as f64 * 1e3 / ms } else { 0.0 };
        let t = self.times;
        let prefill_tps = rate(self.computed, t.prefill_ms);
        Times { prefill_tps, decode_tps: rate(self.usage.completion_tokens, t.decode_ms), ..t }
    }

    /// Milliseconds to the first token.
    pub fn ttft_ms(&self) -> f64 {
        self.times.ttft_ms
    }
}
