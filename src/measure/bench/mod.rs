//! Measures how fast a model and each kernel run, and what this machine could do at best.
//!
//! The machine's own rates are measured in the same run (reading and copying much memory, a large matrix product), and every result
//! is also given as a share of them.

#[cfg(feature = "cuda")]
mod case;
#[cfg(feature = "cuda")]
mod kernels;
#[cfg(feature = "cuda")]
mod lab;
mod peak;
#[cfg(feature = "cuda")]
mod ratio;
mod smi;
mod speculate;
#[cfg(feature = "cuda")]
mod timeline;
mod tune;

#[cfg(feature = "cuda")]
pub use case::{Bench, Check, KernelOptions, KernelResult};
#[cfg(feature = "cuda")]
pub use kernels::kernels;
pub use peak::Peak;
#[cfg(feature = "cuda")]
pub use ratio::Ratio;
pub use smi::{Board, Running};
pub use speculate::{Kind, Prompt, Speculation, speculate};
#[cfg(feature = "cuda")]
pub use timeline::{Sm, TIMELINE_STEPS, Timed, Timeline, timeline};
pub use tune::{Speed, tune};

use crate::{
    BatchOptions, Engine, GenerateOptions, Job, JobEvent, Sampling,
    error::{Error, Result},
    files::config::Config,
    model::kv::Kv,
    ops::KvDtype,
};
use serde::{Deserialize, Serialize};
use std::{
    hint::black_box,
    time::{Duration, Instant},
};

/// Tokens decoded before the clock starts: they load the kernels and record the step.
pub const WARM_UP: usize = 8;

/// Most groups that [`Times::new`] makes of its runs.
const GROUPS: usize = 10;

/// Times of repeated runs of the same thing, in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// Runs.
    pub n: usize,
    /// The fastest.
    pub min_ms: f64,
    /// Median.
    pub p50_ms: f64,
    /// 99th percentile; the slowest of fewer than 100.
    pub p99_ms: f64,
    /// Medians of groups of runs that followed each other, in order: how much the median itself varies.
    pub medians_ms: Vec<f64>,
}

impl Times {
    /// From at least one run, in the order in which they ran. They make ten groups, or one for each run if there are
    /// fewer.
    pub fn new(ms: Vec<f64>) -> Times {
        let groups = GROUPS.min(ms.len());
        let group = |i| ms[i * ms.len() / groups..(i + 1) * ms.len() / groups].to_vec();
        Times::of_groups((0..groups).map(group).collect())
    }

    /// From groups of at least one run each.
    pub fn of_groups(groups: Vec<Vec<f64>>) -> Times {
        let medians_ms = groups.iter().map(|g| median(&mut g.clone())).collect();
        let mut ms = groups.concat();
        let (n, p50_ms) = (ms.len(), median(&mut ms));
        Times { n, min_ms: ms[0], p50_ms, p99_ms: ms[(n * 99 / 100).min(n - 1)], medians_ms }
    }
}

/// The median of at least one value; sorts them.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
}

/// `n` token ids spread over the vocabulary; different ones for each `seed`.
pub fn tokens(n: usize, vocab: usize, seed: u64) -> Vec<u32> {
    crate::ops::noise_ids(n, vocab, seed)
}

/// Times a prompt of `n` tokens: from its ids on the host to the logits of its last token on the host. One run is not
/// counted; then come `repeat` runs.
///
/// # Errors
/// `Context` when it does not fit; `Input` when nothing is asked for.
pub fn prefill(engine: &Engine, n: usize, repeat: usize) -> Result<Times> {
    at_least_one("--repeat", repeat)?;
    let mut session = engine.session(n)?;
    let mut ms = Vec::new();
    for run in 0..=repeat {
        let mut tokens = tokens(n, engine.config().vocab, run as u64);
        // nothing of the run before can be reused
        tokens[0] = (run % engine.config().vocab) as u32;
        let begin = Instant::now();
        session.sync(&tokens)?;
        black_box(session.logits()?);
        if run > 0 {
            ms.push(begin.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(Times::new(ms))
}

/// Result of [`decode`].
#[derive(Debug, Clone)]
pub struct Decode {
    /// Times of a step, from one token on the host to the next; a group for each repetition.
    pub times: Times,
    /// On a GPU: microseconds of a step, at the median, that the calling thread does not spend waiting for the device.
    /// This is the time to enqueue a step and to take a token; meanwhile the device works on steps that were enqueued
    /// before.
    pub host_us: Option<f64>,
}

/// Times decode steps after `depth` tokens (0 means the one token that decoding needs to start): `n` greedy steps, in
/// which each token is fed back on the device, and all this `repeat` times from the same depth.
///
/// # Errors
/// `Context` when [`decode_context`] is more than the engine's; `Input` when nothing is asked for.
pub fn decode(engine: &Engine, depth: usize, n: usize, repeat: usize) -> Result<Decode> {
    at_least_one("--tokens", n)?;
    at_least_one("--repeat", repeat)?;
    let mut session = engine.session(decode_context(depth, n))?;
    let (mut groups, mut host_us) = (Vec::new(), Vec::new());
    for _ in 0..repeat {
        session.sync(&tokens(depth.max(1), engine.config().vocab, 1))?;
        let mut steps = session.decode(&Sampling::default(), &[])?;
        for _ in 0..WARM_UP {
            step(&mut steps)?;
        }
        let timed = (0..n).map(|_| step(&mut steps)).collect::<Result<Vec<_>>>()?;
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        host_us.extend(timed.iter().map(|(all, waited)| 1e3 * ms(all.saturating_sub(*waited))));
        groups.push(timed.into_iter().map(|(all, _)| ms(all)).collect());
    }
    let host_us = engine.is_gpu().then(|| median(&mut host_us));
    Ok(Decode { times: Times::of_groups(groups), host_us })
}

/// Time of the next token, and how much of it was spent waiting for the device.
fn step(steps: &mut crate::engine::Decode<'_>) -> Result<(Duration, Duration)> {
    let (begin, waited) = (Instant::now(), steps.waited());
    steps.next().unwrap_or(Err(Error::Input("decoding ended early".into())))?;
    Ok((begin.elapsed(), steps.waited() - waited))
}

/// Times steps of several sequences together, after `depth` tokens each: `n` greedy steps, `repeat` times.
///
/// # Errors
/// As [`decode`]; `Input` for more sequences than a batch takes.
pub fn decode_together(engine: &Engine, sequences: usize, depth: usize, n: usize, repeat: usize) -> Result<Times> {
    at_least_one("--tokens", n)?;
    at_least_one("--repeat", repeat)?;
    let max_tokens = together_context(sequences, depth, n);
    let mut groups = Vec::new();
    for _ in 0..repeat {
        let mut batch = engine.batch(&BatchOptions { sequences, max_tokens, ..BatchOptions::default() })?;
        for seed in 0..sequences {
            let prompt = tokens(depth.max(1), engine.config().vocab, 1 + seed as u64);
            let options = GenerateOptions { ignore_eos: true, ..GenerateOptions::default() };
            batch.submit(Job { prompt, options, ..Job::default() })?;
        }
        let mut told = 0;
        while told < sequences {
            told = 0;
            batch.step(&mut |_, event| told += usize::from(matches!(event, JobEvent::Token(..))))?;
        }
        let mut step = || {
            let begin = Instant::now();
            batch.step(&mut |_, _| {})?;
            Ok(begin.elapsed().as_secs_f64() * 1e3)
        };
        (0..WARM_UP).try_for_each(|_| step().map(drop))?;
        groups.push((0..n).map(|_| step()).collect::<Result<Vec<f64>>>()?);
    }
    Ok(Times::of_groups(groups))
}

/// Tokens of context that [`decode_together`] takes: a sequence decodes while the prompts of others are computed.
pub fn together_context(sequences: usize, depth: usize, n: usize) -> usize {
    decode_context(depth, n) + sequences * (depth.div_ceil(BatchOptions::default().chunk) + 2)
}

/// What a step of this many sequences, after `depth` tokens each, must move and compute at least: each weight once,
/// each cache.
///
/// # Errors
/// `Input` for no sequences.
pub fn floor_together(config: &Config, kv: KvDtype, depth: usize, sequences: usize) -> Result<crate::ops::Cost> {
    let one = floor(config, kv, depth, sequences)?; // of rows that share a cache
    let cache = Kv::<crate::backend::count::Count>::bytes(config, kv, depth) * (sequences as u64 - 1);
    Ok(crate::ops::Cost { read: one.read + cache, ..one })
}

/// Tokens of context that [`decode`] takes.
pub fn decode_context(depth: usize, n: usize) -> usize {
    depth.max(1) + WARM_UP + n
}

fn at_least_one(option: &str, n: usize) -> Result<()> {
    if n > 0 { Ok(()) } else { Err(Error::Input(format!("{option} is 0, expected at least 1"))) }
}

/// What a step over `rows` tokens, after `depth` others, must move and compute at least, counted from its ops.
///
/// # Errors
/// `Input` without rows.
pub fn floor(config: &Config, kv: KvDtype, depth: usize, rows: usize) -> Result<crate::ops::Cost> {
    Ok(crate::backend::count::Count::forward_cost(config, kv, rows, depth + rows)?.total())
}

/// The commit of this binary: `AOJI_COMMIT` in the environment, now or when it was built.
pub fn commit() -> Option<String> {
    std::env::var("AOJI_COMMIT").ok().or(option_env!("AOJI_COMMIT").map(String::from)).filter(|c| !c.is_empty())
}

/// Now, in UTC: `2026-11-22T14:05:09Z`.
pub fn now() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    date(since.as_secs())
}

/// Civil date of seconds since 1970 (Hinnant's algorithm: years begin in March).
fn date(seconds: u64) -> String {
    let (days, s) = (seconds / 86400 + 719_468, seconds % 86400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (d, m) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let y = era * 400 + year + u64::from(m <= 2);
    format!("{y:04}-{m:02}-{d:02}T{:02}:{:02}:{:02}Z", s / 3600, s / 60 % 60, s % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01T00:00:00Z");
        assert_eq!(date(951_826_554), "2000-02-29T12:15:54Z");
        assert_eq!(date(1_795_392_000), "2026-11-23T00:00:00Z");
    }

    #[test]
    fn percentiles() {
        let t = Times::new((1..=200).rev().map(f64::from).collect());
        assert_eq!((t.n, t.min_ms, t.p50_ms, t.p99_ms), (200, 1.0, 100.5, 199.0));
        let t = Times::new(vec![3.0, 1.0]);
        assert_eq!((t.min_ms, t.p50_ms, t.p99_ms), (1.0, 2.0, 3.0));
        assert_eq!(t.medians_ms, [3.0, 1.0]);
    }

    #[test]
    fn groups_are_of_neighbours() {
        let t = Times::new((0..25).map(f64::from).collect());
        assert_eq!(t.medians_ms.len(), 10);
        assert_eq!((t.medians_ms[0], t.medians_ms[9]), (0.5, 23.0));
        let t = Times::of_groups(vec![vec![5.0, 1.0, 2.0], vec![4.0]]);
        assert_eq!((t.n, t.min_ms, t.p50_ms, t.medians_ms), (4, 1.0, 3.0, vec![2.0, 4.0]));
    }

    /// The byte budget of an 8B step, added up by hand in bf16: 32 layers of 436.2 MB and the head's 1051 MB.
    #[test]
    fn floor_of_the_8b() {
        let json = crate::files::synth::preset("llama3-8b").unwrap();
        let config = Config::from_json(std::path::Path::new("config.json"), &json, None).unwrap();
        let at = |depth| floor(&config, KvDtype::Auto, depth, 1).unwrap().read as f64 / 1e9;
        assert!((at(0) - 15.01).abs() < 0.02, "{}", at(0)); // and activations
        assert!((at(8192) - at(0) - 1.074).abs() < 0.02, "131 KB a token of context: {}", at(8192));
        let flops = floor(&config, KvDtype::Auto, 0, 2048).unwrap().flops as f64;
        assert!((flops / 1e12 - 29.7).abs() < 0.3, "{flops}");
        let eight = floor_together(&config, KvDtype::Auto, 1024, 8).unwrap().read
            - floor(&config, KvDtype::Auto, 1024, 8).unwrap().read;
        assert_eq!(eight, 7 * 1024 * 131_072, "the caches of seven more sequences");
    }
}
