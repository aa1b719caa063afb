//! Measures speculation beside plain decoding: how much faster each kind of text comes, and that it stays the same.

use super::median;
use crate::{
    Engine, Event, GenerateOptions, Session, Timings,
    error::{Error, Result},
};
use serde::Serialize;

/// Something to continue.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// The kind of text, by which results are grouped.
    pub kind: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Tokens that may come; see [`GenerateOptions::prediction`].
    pub prediction: Vec<u32>,
}

/// Results for the texts of one kind.
#[derive(Debug, Clone, Serialize)]
pub struct Kind {
    /// The kind of text.
    pub kind: String,
    /// Texts.
    pub texts: usize,
    /// Tokens of their answers.
    pub tokens: usize,
    /// Guesses that were tried.
    pub drafted: usize,
    /// Of these, the ones that were right.
    pub accepted: usize,
    /// Right guesses in each step, on average.
    pub accepted_per_step: f64,
    /// Tokens a second without guesses; of each text the median of its runs.
    pub plain_tokens_per_s: f64,
    /// Tokens a second with guesses.
    pub tokens_per_s: f64,
    /// The quotient of the two.
    pub times_plain: f64,
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Speculation {
    /// By kind, in the order in which the prompts have them.
    pub kinds: Vec<Kind>,
    /// Milliseconds of a step by its number of rows (the last token and the guesses), for the numbers that occurred.
    pub step_ms: Vec<(usize, f64)>,
}

/// Continues each prompt with and without guesses in turn, `repeat` times after a time that is not counted.
///
/// # Errors
/// `Disagree` when guesses changed a text; `Context` when prompt and answer do not fit; `Input` without `repeat`, `speculate`
/// or `max_tokens` among the options.
pub fn speculate(
    engine: &Engine,
    prompts: &[Prompt],
    options: &GenerateOptions,
    repeat: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Speculation> {
    super::at_least_one("--repeat", repeat)?;
    let most = options.max_tokens.unwrap_or(0);
    super::at_least_one("--tokens", most)?;
    let longest = prompts.iter().map(|p| p.tokens.len()).max().unwrap_or(0);
    let mut session = engine.session(longest + most)?;
    let mut kinds: Vec<Kind> = Vec::new();
    let mut seconds: Vec<[f64; 2]> = Vec::new();
    for (done, prompt) in prompts.iter().enumerate() {
        progress(done);
        let with = GenerateOptions { prediction: prompt.prediction.clone(), ..options.clone() };
        let plain = GenerateOptions { speculate: crate::Speculate::Off, prediction: Vec::new(), ..options.clone() };
        let (mut times, mut counts) = ([Vec::new(), Vec::new()], Timings::default());
        let expected = run(&mut session, &prompt.tokens, &plain)?.0;
        for i in 0..=repeat {
            let (guessed, t) = run(&mut session, &prompt.tokens, &with)?;
            if let Some(at) = (0..expected.len()).find(|&at| guessed.get(at) != Some(&expected[at])) {
                let (kind, n) = (&prompt.kind, done + 1);
                return Err(Error::Disagree(format!("prompt {n} ({kind}): with guesses, token {at} is another")));
            }
            if i > 0 {
                times[0].push(run(&mut session, &prompt.tokens, &plain)?.1.decode_seconds);
                times[1].push(t.decode_seconds);
                counts = t;
            }
        }
        let at = kinds.iter().position(|k| k.kind == prompt.kind).unwrap_or_else(|| {
            kinds.push(Kind::new(&prompt.kind));
            seconds.push([0.0; 2]);
            kinds.len() - 1
        });
        let kind = &mut kinds[at];
        kind.texts += 1;
        kind.tokens += expected.len();
        kind.drafted += counts.drafted_tokens;
        kind.accepted += counts.accepted_tokens;
        times.iter_mut().zip(&mut seconds[at]).for_each(|(times, sum)| *sum += median(times));
    }
    kinds.iter_mut().zip(&seconds).for_each(|(kind, seconds)| kind.divide(*seconds));
    Ok(Speculation { kinds, step_ms: session.step_ms() })
}

impl Kind {
    fn new(kind: &str) -> Kind {
        Kind {
            kind: kind.into(),
            texts: 0,
            tokens: 0,
            drafted: 0,
            accepted: 0,
            accepted_per_step: 0.0,
            plain_tokens_per_s: 0.0,
            tokens_per_s: 0.0,
            times_plain: 0.0,
        }
    }

    /// Computes the rates from the seconds without guesses and with them.
    fn divide(&mut self, [plain, with]: [f64; 2]) {
        self.accepted_per_step = self.accepted as f64 / (self.tokens - self.accepted).max(1) as f64;
        [self.plain_tokens_per_s, self.tokens_per_s] = [plain, with].map(|s| self.tokens as f64 / s);
        self.times_plain = plain / with;
    }
}

/// The tokens of an answer, and its times.
fn run(session: &mut Session, prompt: &[u32], options: &GenerateOptions) -> Result<(Vec<u32>, Timings)> {
    let (mut tokens, mut timings) = (Vec::new(), Timings::default());
    for event in session.generate(prompt, options)? {
        match event? {
            Event::Token(token) => tokens.push(token),
            Event::Text(_) => {}
            Event::Finish(_, t) => timings = t,
        }
    }
    Ok((tokens, timings))
}
