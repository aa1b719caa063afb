//! Jobs of every kind that are put back again and again: they get what they get alone, and are told it once.

use crate::{
    Batch, BatchOptions, Constraint, Device, Engine, Error, GenerateOptions, Job, JobEvent, JobId, Options, Pooling,
    Sampling, Speculate,
};
use std::collections::BTreeMap;

const SIZES: BatchOptions = BatchOptions { sequences: 20, max_tokens: 160, cache_tokens: None, chunk: 40 };

fn prompt(len: usize, salt: u32) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 37 + salt * 11 + i * i) % 2000).collect()
}

/// Allows every third id or so, by the token before.
struct Thirds(u32);

impl Constraint for Thirds {
    fn allowed(&mut self, mask: &mut [u32]) -> Result<(), String> {
        (0..2000u32)
            .filter(|id| (id + self.0).is_multiple_of(3))
            .for_each(|id| mask[id as usize / 32] |= 1 << (id % 32));
        Ok(())
    }
    fn accept(&mut self, token: u32) -> Result<(), String> {
        assert_eq!((token + self.0) % 3, 0, "a token that was not allowed");
        self.0 = token;
        Ok(())
    }
}

fn job(i: u32) -> Job {
    let sampling = Sampling {
        temperature: if i.is_multiple_of(3) { 0.0 } else { 1.0 },
        seed: i.into(),
        repetition_penalty: if i.is_multiple_of(2) { 1.3 } else { 1.0 },
        frequency_penalty: if i.is_multiple_of(4) { 0.2 } else { 0.0 },
        min_tokens: if i == 19 { 0 } else { i % 5 * 3 },
        logit_bias: if i.is_multiple_of(6) { vec![(5, 2.0)] } else { Vec::new() },
        ..Sampling::default()
    };
    let prompt = match i % 4 {
        0 => prompt(5 + i as usize, i),
        1 => prompt(64, i),
        _ => [prompt(70, 1), prompt(i as usize, i)].concat(), // that begin alike
    };
    let options = GenerateOptions {
        sampling,
        max_tokens: Some(if i == 19 { 0 } else { 20 + i as usize }),
        ignore_eos: i % 5 != 1,
        speculate: [Speculate::Off, Speculate::Ngram, Speculate::Model][i as usize % 3],
        prediction: if i.is_multiple_of(7) { prompt.clone() } else { Vec::new() },
        ..GenerateOptions::default()
    };
    Job {
        prompt,
        options,
        logprobs: i.is_multiple_of(5).then_some(i as usize % 3),
        prompt_logprobs: (i % 8 == 3).then_some(1),
        embed: [None, None, None, Some(Pooling::Mean), Some(Pooling::Last)][i as usize % 5],
        constraint: (i % 6 == 5).then(|| Box::new(Thirds(i)) as Box<dyn Constraint>),
    }
}

/// What each job was told, but for times and counts.
fn told(batch: &mut Batch, jobs: impl Iterator<Item = Job>) -> Vec<Vec<String>> {
    let ids: Vec<JobId> = jobs.map(|job| batch.submit(job).unwrap()).collect();
    let mut told: BTreeMap<JobId, Vec<String>> = BTreeMap::new();
    let mut each = |id, event| {
        let event = match event {
            JobEvent::Finish(finish) => format!("{:?} {:?} {}", finish.reason, finish.by, finish.timings.tokens),
            event => format!("{event:?}"),
        };
        told.entry(id).or_default().push(event);
    };
    while batch.step(&mut each).unwrap() {}
    ids.iter().map(|id| told.remove(id).unwrap_or_default()).collect()
}

/// Sums with a client's numbers do not wrap: a text that is longer than its sequence would be written to another's pages.
#[test]
fn numbers_that_would_wrap_are_refused() {
    let engine = Engine::open("demo", &Options { device: Device::Cpu, ..Options::default() }).unwrap();
    let mut batch = engine.batch(&SIZES).unwrap();
    let mut submit = |max_tokens| {
        let options = GenerateOptions { max_tokens: Some(max_tokens), ..GenerateOptions::default() };
        batch.submit(Job { prompt: prompt(100, 1), options, ..Job::default() })
    };
    assert!(submit(60).is_ok());
    for (n, expected) in [(61, 161), (usize::MAX - 99, usize::MAX), (usize::MAX, usize::MAX)] {
        let found = submit(n);
        assert!(matches!(found, Err(Error::Context { needed, max: 160 }) if needed == expected), "{n}: {found:?}");
    }
    for n in [0, 1025, usize::MAX - 63, usize::MAX] {
        let found = engine.batch(&BatchOptions { max_tokens: n, ..SIZES }).err();
        assert!(matches!(found, Some(Error::Context { needed, max: 1024 }) if needed == n), "{n}: {found:?}");
    }
}

#[test]
fn what_is_put_back_is_told_once_and_has_the_same_bits() {
    let open = |draft| Engine::open("demo", &Options { device: Device::Cpu, draft, ..Options::default() }).unwrap();
    let engine = open(Some(open(None)));
    let alone: Vec<_> = (0..20).flat_map(|i| told(&mut engine.batch(&SIZES).unwrap(), [job(i)].into_iter())).collect();
    assert!(alone.iter().all(|events| events.len() > 1));
    // with memory for all, and for one or two; put back when memory is short, and after every so many steps
    for (pages, every, drafts) in [(60, 1, 1), (60, 7, 2), (3, 40, 3), (3, 2, 4), (5, 5, 5), (8, 1000, 6)] {
        let sizes = BatchOptions { cache_tokens: Some(pages * 64), ..SIZES };
        let mut batch = engine.batch(&sizes).unwrap();
        batch.try_put_backs(every);
        batch.try_drafts(drafts);
        for (i, (found, want)) in told(&mut batch, (0..20).map(job)).iter().zip(&alone).enumerate() {
            assert_eq!(found, want, "job {i} with {pages} pages, put back after {every} steps");
        }
        let load = batch.load();
        assert!(load.put_back > 0 || every == 1000, "{load:?}");
        assert_eq!((load.running, load.waiting, load.tokens), (0, 0, 0), "{load:?}");
    }
}

/// In a cache of one context, a prompt that fills it finds a page to copy from which it needs itself: it copies nothing, and does not
/// wait for pages that nobody has.
#[test]
fn a_job_that_needs_all_pages_does_not_wait_for_ever() {
    let engine = Engine::open("demo", &Options { device: Device::Cpu, ..Options::default() }).unwrap();
    let long = |prompt: Vec<u32>| {
        let options = GenerateOptions { max_tokens: Some(4), ignore_eos: true, ..GenerateOptions::default() };
        Job { prompt, options, logprobs: Some(2), ..Job::default() }
    };
    // the same; another that begins with the same token; one that goes on where the first ends; one of few tokens more than a page
    let with_bos = |len, salt| [vec![2046], prompt(len, salt)].concat();
    let first = with_bos(150, 1);
    let grown = [&first[..], &[70, 71, 72]].concat();
    let prompts = [first.clone(), first.clone(), with_bos(154, 2), first, grown, with_bos(70, 3), with_bos(140, 3)];
    let jobs = || prompts.iter().cloned().map(long);
    let alone: Vec<_> = jobs().flat_map(|job| told(&mut engine.batch(&SIZES).unwrap(), [job].into_iter())).collect();
    assert!(alone.iter().all(|events| events.len() > 4));
    for sequences in [1, 2, 20] {
        let sizes = BatchOptions { sequences, cache_tokens: Some(SIZES.max_tokens), ..SIZES };
        // one after the other, and all at once
        let mut batch = engine.batch(&sizes).unwrap();
        assert_eq!(batch.load().capacity, 192);
        let each: Vec<_> = jobs().flat_map(|job| told(&mut batch, [job].into_iter())).collect();
        assert_eq!(each, alone, "one after the other, {sequences} sequences");
        assert_eq!(told(&mut engine.batch(&sizes).unwrap(), jobs()), alone, "at once, {sequences} sequences");
        assert_eq!((batch.load().waiting, batch.load().tokens), (0, 0));
    }
}
