//! Tests whether guesses of the next tokens change a text. The guesses are right ones, wrong ones and whatever the text
//! suggests, in random numbers; for greedy and drawn tokens, with penalties, alone, beside other texts and from the
//! cache.

use super::Compared;
use crate::{
    engine::{BatchOptions, Engine, GenerateOptions, Job, JobEvent, Sampling, Speculate},
    error::Result,
    ops::sample::philox,
};

/// Tokens of an answer.
const TOKENS: usize = 12;

/// A pseudo-random word, which differs for each `n` and `of`.
fn chance(n: usize, of: u64) -> u32 {
    philox([n as u32, 0, 0, 0], [of as u32, 7])[0]
}

/// Ways to choose tokens that have little in common.
fn samplings() -> [Sampling; 4] {
    let drawn = |temperature, seed| Sampling { temperature, seed, ..Sampling::default() };
    [
        Sampling::default(),
        Sampling { repetition_penalty: 1.3, frequency_penalty: 0.4, presence_penalty: 0.2, ..Sampling::default() },
        Sampling { top_p: 0.9, repetition_penalty: 1.1, frequency_penalty: 0.3, ..drawn(0.7, 11) },
        Sampling { top_k: 50, min_p: 0.01, ..drawn(1.5, 12) },
    ]
}

/// Answers without guesses and with them: tokens and log-probabilities; for sessions also the logits after another
/// token.
pub(super) fn with_drafts(engine: &Engine, prompt: &[u32], other: &[u32]) -> Result<Compared> {
    let mut pairs = Vec::new();
    for (seed, sampling) in samplings().into_iter().enumerate() {
        let options = |speculate, prediction: &[u32]| GenerateOptions {
            sampling: sampling.clone(),
            max_tokens: Some(TOKENS),
            ignore_eos: true,
            speculate,
            prediction: prediction.to_vec(),
            ..GenerateOptions::default()
        };
        let plain = options(Speculate::Off, &[]);
        let (expected, answer) = in_batch(engine, prompt, &[], &plain, &plain, 1, None)?.swap_remove(0);
        let mixed: Vec<u32> = answer
            .iter()
            .enumerate()
            .map(|(i, &t)| if chance(i, 1).is_multiple_of(3) { other[i] } else { t })
            .collect();
        let (right, wrong, own) =
            (options(Speculate::Ngram, &answer), options(Speculate::Off, &mixed), options(Speculate::Ngram, &[]));
        for (i, guessed) in [&right, &wrong, &own].into_iter().enumerate() {
            let beside = [&other[..prompt.len() / 2], &prompt[..4]];
            let beside = if i == 1 { &beside[..] } else { &[] };
            let trial = Some((seed * 3 + i) as u64);
            let others = if i == 2 { &own } else { &plain };
            let found = in_batch(engine, prompt, beside, guessed, others, if i == 1 { 2 } else { 1 }, trial)?;
            pairs.extend(found.into_iter().map(|(found, _)| (expected.clone(), found)));
        }
        if engine.draft().is_some() {
            let options = options(Speculate::Model, &[]);
            let beside = [&other[..prompt.len() / 2], &prompt[..4]];
            let found = in_batch(engine, prompt, &beside, &options, &options, 2, Some(seed as u64))?;
            pairs.extend(found.into_iter().map(|(found, _)| (expected.clone(), found)));
        }
        // the session divides the prompt differently from the batch, so its answer may be another
        let (expected, answer) = in_session(engine, prompt, &plain, None)?;
        for guessed in [options(Speculate::Off, &answer), options(Speculate::Off, &mixed)] {
            pairs.push((expected.clone(), in_session(engine, prompt, &guessed, Some(seed as u64))?.0));
        }
    }
    Ok(Compared(pairs))
}

/// Tokens and log-probabilities of `prompt`'s answer beside other answers, several times one after the other (from the second
/// time on, the prompt is in the cache); and the tokens alone.
fn in_batch(
    engine: &Engine,
    prompt: &[u32],
    beside: &[&[u32]],
    options: &GenerateOptions,
    others: &GenerateOptions,
    times: usize,
    trial: Option<u64>,
) -> Result<Vec<(Vec<f32>, Vec<u32>)>> {
    let sizes = BatchOptions { sequences: 3, max_tokens: prompt.len() + TOKENS, cache_tokens: None, chunk: 64 };
    let mut batch = engine.batch(&sizes)?;
    if let Some(seed) = trial {
        batch.try_drafts(seed);
    }
    let job = |prompt: &[u32], options: &GenerateOptions| Job {
        prompt: prompt.to_vec(),
        options: options.clone(),
        logprobs: Some(0),
        ..Job::default()
    };
    let mut answers = Vec::new();
    for _ in 0..times {
        for tokens in beside {
            batch.submit(job(tokens, others))?;
        }
        let id = batch.submit(job(prompt, options))?;
        let (mut values, mut tokens) = (Vec::new(), Vec::new());
        let mut each = |job, event| match event {
            JobEvent::Token(token, Some(l)) if job == id => {
                values.extend([token as f32, l.logprob]);
                tokens.push(token);
            }
            _ => {}
        };
        while batch.step(&mut each)? {}
        answers.push((values, tokens));
    }
    Ok(answers)
}

/// Tokens of a session's answer, and the logits after its first half and another token; and the tokens alone.
fn in_session(
    engine: &Engine,
    prompt: &[u32],
    options: &GenerateOptions,
    trial: Option<u64>,
) -> Result<(Vec<f32>, Vec<u32>)> {
    let mut session = engine.session(prompt.len() + TOKENS + 1)?;
    if let Some(seed) = trial {
        session.try_drafts(seed);
    }
    for event in session.generate(prompt, options)? {
        event?;
    }
    let tokens = session.tokens()[prompt.len()..].to_vec();
    let mut values: Vec<f32> = tokens.iter().map(|&t| t as f32).collect();
    session.sync(&[prompt, &tokens[..TOKENS / 2], &prompt[..1]].concat())?;
    values.extend(session.logits()?);
    Ok((values, tokens))
}
