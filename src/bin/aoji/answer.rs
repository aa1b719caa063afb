//! One answer of a model, as `generate` and `chat` show it.

use crate::common::{bar, interrupted};
use aoji::{Event, FinishReason, GenerateOptions, Result, Session, Timings};
use serde::Serialize;

/// One answer, as `aoji generate --json` prints it.
#[derive(Serialize)]
pub struct Answer {
    /// All text that was shown.
    pub text: String,
    /// Ids of the prompt.
    pub prompt_tokens: Vec<u32>,
    /// Ids that were generated, including the one that ended the text.
    pub token_ids: Vec<u32>,
    /// `None` when Ctrl-C ended it.
    pub finish_reason: Option<FinishReason>,
    /// Absent when Ctrl-C came before the first token.
    pub timings: Option<Timings>,
}

impl Answer {
    /// Speeds, and why the answer ended, in one line.
    pub fn summary(&self) -> String {
        let reason = match self.finish_reason {
            Some(FinishReason::Stop) => "the text ended",
            Some(FinishReason::Length) => "length limit",
            None => "interrupted",
        };
        let Some(t) = self.timings else { return reason.into() };
        let fresh = t.prompt_tokens - t.reused_tokens;
        let guessed = match t.drafted_tokens {
            0 => String::new(),
            n => format!(" ({} of {n} guesses right)", t.accepted_tokens),
        };
        format!(
            "prompt {} tokens ({} cached) {:.1} tokens/s | answer {} tokens{guessed} {:.1} tokens/s, first after {:.3} s | {reason}",
            t.prompt_tokens,
            t.reused_tokens,
            fresh as f64 / t.prompt_seconds.max(1e-9),
            t.tokens,
            t.tokens_per_second(),
            t.first_token_seconds,
        )
    }
}

/// Continues `prompt` until the text ends or Ctrl-C is pressed; `show` gets each piece of the text.
pub fn answer(
    session: &mut Session,
    prompt: &[u32],
    options: &GenerateOptions,
    show: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Answer> {
    let bar = bar(prompt.len() as u64, "reading the prompt", "{pos}/{len} tokens");
    let generation = session.generate_with(prompt, options, &mut |done, _| {
        if done > 0 {
            bar.set_position(done as u64);
        }
        !interrupted()
    })?;
    bar.finish_and_clear();
    let (text, prompt_tokens, token_ids) = (String::new(), prompt.to_vec(), Vec::new());
    let mut answer = Answer { text, prompt_tokens, token_ids, finish_reason: None, timings: None };
    let Some(mut generation) = generation else { return Ok(answer) };
    while !interrupted()
        && let Some(event) = generation.next()
    {
        match event? {
            Event::Token(id) => answer.token_ids.push(id),
            Event::Text(text) => {
                show(&text)?;
                answer.text.push_str(&text);
            }
            Event::Finish(reason, _) => answer.finish_reason = Some(reason),
        }
    }
    answer.timings = Some(generation.timings());
    Ok(answer)
}
