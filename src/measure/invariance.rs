//! Tests what the bits of a result depend on, with one experiment for each thing that could matter; see [`invariance`].
//!
//! The kernels of an engine add in an order that depends only on the sizes of a call. So the bits are the same whenever
//! the sizes of all calls are the same. Whatever changes the sizes, such as a session's division of a prompt into
//! chunks on a GPU, may choose other kernels and other orders, and then the last bits may differ. A batch divides
//! prompts in a way that avoids this. On the CPU there is one order of sums for all sizes, instructions and numbers of
//! threads.

mod drafts;

use crate::{
    engine::{Batch, BatchOptions, Engine, GenerateOptions, Job, JobEvent, JobId, Sampling, Session},
    error::{Error, Result},
    measure::bench,
};
use serde::Serialize;
use std::fmt;

/// What one experiment found.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// What was varied.
    pub varied: &'static str,
    /// Whether equal bits follow from how the engine is built.
    pub by_construction: bool,
    /// Why they do, or why they need not.
    pub because: &'static str,
    /// Whether all bits were equal.
    pub equal: bool,
    /// Values compared.
    pub values: usize,
    /// Values whose bits differ.
    pub differing: usize,
    /// Largest distance of two logits.
    pub largest: f32,
}

/// The results of all experiments.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Where the engine ran.
    pub device: String,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// One for each experiment.
    pub findings: Vec<Finding>,
}

impl Report {
    /// `Ok` if everything holds that must; otherwise the error says what does not.
    pub fn verdict(&self) -> Result<(), String> {
        match self.findings.iter().find(|f| f.by_construction && !f.equal) {
            None => Ok(()),
            Some(f) => Err(format!(
                "{}: {} of {} logits differ, by up to {:.3e}, where none may",
                f.varied, f.differing, f.values, f.largest
            )),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, a prompt of {} tokens: do the bits of the logits depend on", self.device, self.prompt)?;
        for x in &self.findings {
            let found = match x.equal {
                true => "no: all bits equal".to_string(),
                false => format!("yes: {} of {} differ, by up to {:.2e}", x.differing, x.values, x.largest),
            };
            let kind = if x.by_construction { "must be equal" } else { "may differ" };
            write!(f, "\n  {:<34} {found}\n  {:<34} {kind}: {}", x.varied, "", x.because)?;
        }
        Ok(())
    }
}

/// Logits from two ways to compute the same thing, one after the other.
struct Compared(Vec<(Vec<f32>, Vec<f32>)>);

impl Compared {
    fn finding(self, varied: &'static str, by_construction: bool, because: &'static str) -> Finding {
        let pairs = || self.0.iter().flat_map(|(a, b)| a.iter().zip(b));
        let differing = pairs().filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        let largest = pairs().map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        Finding { varied, by_construction, because, equal: differing == 0, values: pairs().count(), differing, largest }
    }
}

/// Runs the experiments with a prompt of `n` random tokens.
///
/// # Errors
/// `Input` for fewer than 16 tokens; `Context` when the prompt and 13 more tokens do not fit.
pub fn invariance(engine: &Engine, n: usize) -> Result<Report> {
    if n < 16 {
        return Err(Error::Input(format!("a prompt of {n} tokens is too short to be divided: at least 16")));
    }
    let (needed, max) = (n.saturating_add(13), engine.max_context());
    if needed > max {
        return Err(Error::Context { needed, max });
    }
    let room = n + 8;
    let tokens = |seed| bench::tokens(n, engine.config().vocab, seed);
    let (prompt, other) = (tokens(1), tokens(2));
    let fresh = |parts: &[usize]| -> Result<Vec<f32>> {
        let mut s = engine.session(room)?;
        parts.iter().try_for_each(|&at| s.sync(&prompt[..at]).map(drop))?;
        s.logits()
    };
    let whole = fresh(&[n])?;
    let half = n / 2;

    let again = Compared(vec![(whole.clone(), fresh(&[n])?)]);

    let mut used = engine.session(room)?;
    used.sync(&other)?;
    let drawn = Sampling { temperature: 1.0, seed: 3, ..Sampling::default() };
    used.decode(&drawn, &[])?.take(8).try_for_each(|t| t.map(drop))?;
    used.score(&other[..half], &[&prompt[..4]])?;
    used.sync(&other[..1])?; // so that nothing of the prompt is in the cache
    let differs = [&[(prompt[0] + 1) % engine.config().vocab as u32], &other[1..]].concat();
    used.sync(&differs)?;
    used.sync(&prompt)?;
    let before = Compared(vec![(whole.clone(), used.logits()?)]);

    // the second half of the prompt, after a first half that another prompt left in the cache, and after one of its own
    let mut hit = engine.session(room)?;
    hit.sync(&prompt[..half])?;
    hit.sync(&[&prompt[..half], &other[half..]].concat())?;
    let reused = hit.sync(&prompt)?;
    debug_assert!(reused >= half);
    let cache = Compared(vec![(fresh(&[half, n])?, hit.logits()?)]);

    // the rows after row `half` have other tokens; the result of row `half` must not change
    let row = |tail: &[u32]| -> Result<Vec<f32>> {
        let (mut s, mut found) = (engine.session(room)?, Vec::new());
        let all = [&prompt[..half], tail].concat();
        s.logits_of(&all, 0, &mut |i, logits| {
            if i == half - 1 {
                found = logits.to_vec();
            }
        })?;
        Ok(found)
    };
    let neighbours = Compared(vec![(row(&prompt[half..])?, row(&other[half..])?)]);

    let batched = beside_jobs(engine, &prompt, &other)?;
    let drafts = drafts::with_drafts(engine, &prompt, &other)?;
    let beside = two_sessions(engine, room, &prompt, &other, half)?;
    let divided = [vec![half, n], vec![n - 1, n], vec![1, 3, 8, n], (1..=n).collect()];
    let chunks = divided.iter().map(|parts| Ok((whole.clone(), fresh(parts)?))).collect::<Result<_>>()?;

    let division = match engine.is_gpu() {
        true => "the number of rows decides the kernel (up to 16: gemv, split attention) and so the order of its sums",
        false => "a row's sums have one order, however many rows there are",
    };

    Ok(Report {
        device: engine.device().into(),
        prompt: n,
        findings: vec![
            again.finding("being run again", true, "no kernel adds in an order that depends on timing"),
            before.finding("what ran before", true, "a step reads only what this sequence has written"),
            cache.finding(
                "prefix-cache hits",
                true,
                "the cached keys and values are those that the same division of the prompt computes",
            ),
            neighbours.finding(
                "tokens in neighbouring rows",
                true,
                "each row has its own sums, in an order that only the sizes decide",
            ),
            Compared(vec![(fresh(&[half, n])?, beside)]).finding(
                "another session at the same time",
                true,
                "sessions share only the weights, which nobody writes",
            ),
            Compared(batched).finding(
                "other jobs of a batch",
                true,
                "a step's rows are independent, and a prompt's parts are never so small that other kernels take them",
            ),
            drafts.finding(
                "guesses of the next tokens",
                true,
                "a row's bits do not depend on the others, and a token is a function of its logits, seed and position",
            ),
            Compared(chunks).finding("how a session's prompt is divided", !engine.is_gpu(), division),
        ],
    })
}

/// Log-probabilities of 8 tokens drawn after `prompt`: alone in a batch, and for comparison beside other jobs that begin and
/// end meanwhile, with the prompt from the cache, with its beginning shared with a busy sequence, and put back with memory for only
/// one sequence, so that pages change hands.
fn beside_jobs(engine: &Engine, prompt: &[u32], other: &[u32]) -> Result<Vec<(Vec<f32>, Vec<f32>)>> {
    let max_tokens = prompt.len() + 8;
    let options = BatchOptions { sequences: 3, max_tokens, cache_tokens: None, chunk: 64 };
    let tight = BatchOptions { cache_tokens: Some(max_tokens), ..options };
    let job = |prompt: &[u32], n: usize, seed| Job {
        prompt: prompt.to_vec(),
        options: GenerateOptions {
            sampling: Sampling { temperature: 1.0, seed, ..Sampling::default() },
            max_tokens: Some(n),
            ignore_eos: true,
            ..GenerateOptions::default()
        },
        logprobs: Some(0),
        ..Job::default()
    };
    let run = |batch: &mut Batch, wanted: JobId| -> Result<Vec<f32>> {
        let mut found = Vec::new();
        let mut each = |id, event| match event {
            JobEvent::Token(_, Some(l)) if id == wanted => found.push(l.logprob),
            _ => {}
        };
        while batch.step(&mut each)? {}
        Ok(found)
    };
    let mut batch = engine.batch(&options)?;
    let id = batch.submit(job(prompt, 8, 1))?;
    let alone = run(&mut batch, id)?;
    let mut found = Vec::new();
    let half = prompt.len() / 2;
    let mixed = [&prompt[..half], &other[half..]].concat();
    let crowd: [(&[u32], usize); 4] = [(&mixed, 8), (&other[..half], 5), (prompt, 2), (&other[..4], 8)];
    for (others, put_backs) in [(&[][..], false), (&[(other, 3)], false), (&crowd, false), (&crowd, true)] {
        if put_backs {
            batch = engine.batch(&tight)?;
            batch.try_put_backs(3);
        }
        for (i, &(tokens, n)) in others.iter().enumerate() {
            batch.submit(job(tokens, n, 10 + i as u64))?;
        }
        let id = batch.submit(job(prompt, 8, 1))?;
        found.push((alone.clone(), run(&mut batch, id)?));
        batch = engine.batch(&options)?;
    }
    Ok(found)
}

/// The logits of `prompt`, computed in two parts between which another session computes.
fn two_sessions(engine: &Engine, room: usize, prompt: &[u32], other: &[u32], half: usize) -> Result<Vec<f32>> {
    let (mut a, mut b): (Session, Session) = (engine.session(room)?, engine.session(room)?);
    a.sync(&prompt[..half])?;
    b.sync(other)?;
    a.sync(prompt)?;
    b.step(other[0])?;
    a.logits()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::cpu::{self, Cpu},
        engine::Options,
        files::{ModelFiles, Startup},
        ops::Act,
    };
    use half::bf16;

    /// Logits of a prompt of 150 tokens in these parts, and of 5 steps after it, by an engine of its own.
    fn logits<A: Act>(instructions: &str, threads: usize, parts: &[usize]) -> Vec<u32> {
        let (b, files) = (Cpu::<A>::on(instructions, threads).unwrap(), ModelFiles::open("demo").unwrap());
        let options = Options { context: Some(160), ..Options::default() };
        let engine = Engine::load_on(b, files, |_| Ok(None), &options, &Startup::begin(), &mut |_, _| {}).unwrap();
        let (mut session, prompt) = (engine.session(160).unwrap(), bench::tokens(150, engine.config().vocab, 1));
        let mut found = Vec::new();
        for &n in parts {
            session.sync(&prompt[..n]).unwrap();
        }
        found.extend(session.logits().unwrap());
        for token in 0..5 {
            session.step(token).unwrap();
            found.extend(session.logits().unwrap());
        }
        found.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn a_prompt_beyond_the_context_is_refused_before_it_is_made() {
        let options = Options { device: crate::Device::Cpu, context: Some(64), ..Options::default() };
        let engine = Engine::open("demo", &options).unwrap();
        for (n, needed) in [(52, 65), (1_000_000_000_000, 1_000_000_000_013), (usize::MAX, usize::MAX)] {
            let found = invariance(&engine, n);
            assert!(matches!(found, Err(Error::Context { needed: n, max: 64 }) if n == needed), "{n}: {found:?}");
        }
    }

    /// What the CPU promises: instructions, threads and the division of a prompt do not change any bit.
    fn on_the_cpu_nothing_matters<A: Act>() {
        let best = cpu::instructions().last().unwrap();
        let want = logits::<A>(best, 2, &[150]);
        for instructions in cpu::instructions() {
            assert!(logits::<A>(instructions, 1, &[150]) == want, "{instructions}, one thread");
            assert!(logits::<A>(instructions, 3, &[1, 18, 21, 150]) == want, "{instructions}, three threads, in parts");
        }
        let ones: Vec<usize> = (1..=150).collect();
        assert!(logits::<A>(best, 2, &ones) == want, "one by one");
    }

    #[test]
    fn on_the_cpu_nothing_matters_in_bf16() {
        on_the_cpu_nothing_matters::<bf16>();
    }

    #[test]
    fn on_the_cpu_nothing_matters_in_f32() {
        on_the_cpu_nothing_matters::<f32>();
    }
}
