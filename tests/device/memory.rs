//! Batches of more jobs than there is memory for, and of more than a step has rows: each job gets what it gets alone, bit for bit.

use crate::{
    batch::{Heard, OPTIONS, Turns, alone, drawn, greedy, job},
    tiny::{EVERYTHING, engines, engines_of, prompt},
};
use aoji::{Batch, BatchOptions, Engine, GenerateOptions, Job, JobEvent, JobId, Sampling, Speculate};

/// Pages of 64 tokens.
const PAGE: usize = 64;

fn batch(engine: &Engine, sequences: usize, pages: usize) -> Batch {
    engine.batch(&BatchOptions { sequences, cache_tokens: Some(pages * PAGE), ..OPTIONS }).unwrap()
}

/// Submits what these make.
fn submit(batch: &mut Batch, jobs: &[&dyn Fn() -> Job]) -> Vec<JobId> {
    jobs.iter().map(|job| batch.submit(job()).unwrap()).collect()
}

/// What each job has alone.
fn each_alone(engine: &Engine, jobs: &[&dyn Fn() -> Job]) -> Vec<Vec<(u32, Vec<u32>)>> {
    jobs.iter().map(|job| alone(engine, job())).collect()
}

/// Each job has what it has alone, and was told that once.
fn same_as_alone(engine: &Engine, heard: &Heard, ids: &[JobId], alone: &[Vec<(u32, Vec<u32>)>]) {
    for (id, want) in ids.iter().zip(alone) {
        assert_eq!(heard.bits(*id), *want, "{id:?} on {}", engine.device());
        assert_eq!(heard.finish(*id).timings.tokens, want.len());
    }
}

#[test]
fn what_is_put_back_goes_on_with_the_same_bits() {
    // on the emulated device it would take minutes until two pages are full; `verify --invariance` puts jobs back there too
    let all = engines().into_iter().chain(engines_of(EVERYTHING));
    for engine in all.filter(|e| !e.is_gpu()) {
        // two pages each soon, three in the end, and five in all: both begin, one has to give way
        let (first, second) = (|| greedy(prompt(60, 1), 75), || job(prompt(61, 2), 75, drawn(3), None));
        let jobs: [&dyn Fn() -> Job; 2] = [&first, &second];
        let mut batch = batch(&engine, 4, 5);
        let ids = submit(&mut batch, &jobs);
        let mut heard = Heard::default();
        while batch.load().put_back == 0 {
            heard.steps(&mut batch, 1);
            assert!(batch.load().running + batch.load().waiting > 0, "both have ended");
        }
        assert_eq!((batch.load().running, batch.load().waiting), (1, 1));
        let told = [heard.tokens(ids[0]).len(), heard.tokens(ids[1]).len()];
        assert!(told.iter().all(|n| (40..75).contains(n)), "{told:?}");
        heard.steps(&mut batch, usize::MAX);
        assert_eq!(batch.load(), aoji::Load { running: 0, waiting: 0, tokens: 0, capacity: 5 * PAGE, put_back: 1 });
        same_as_alone(&engine, &heard, &ids, &each_alone(&engine, &jobs));
    }
}

/// Jobs of every kind with memory for two or three of them.
#[test]
fn every_kind_of_job_can_be_put_back() {
    let engine = engines().remove(0);
    let speculate = |prompt: Vec<u32>, n| {
        let options = GenerateOptions {
            max_tokens: Some(n),
            ignore_eos: true,
            speculate: Speculate::Ngram,
            prediction: prompt.repeat(2),
            ..GenerateOptions::default()
        };
        Job { prompt, options, ..Job::default() }
    };
    let prefix = prompt(100, 9);
    let with = |salt| [&prefix[..], &prompt(20, salt)].concat();
    let turns = || Turns((0..90).map(|i| vec![i, i + 90, 300 - i]).collect(), 0);
    let jobs: [&dyn Fn() -> Job; 9] = [
        &|| job(with(1), 70, drawn(1), Some(2)),
        &|| greedy(prompt(5, 2), 130),
        &|| job(with(3), 75, drawn(2), None),
        &|| speculate(prompt(50, 4), 100),
        &|| Job { constraint: Some(Box::new(turns())), ..job(prompt(40, 5), 90, drawn(5), None) },
        &|| Job { prompt_logprobs: Some(1), ..job(with(6), 60, drawn(4), None) },
        &|| job(prompt(60, 7), 80, Sampling { min_tokens: 9, ..drawn(8) }, Some(0)),
        &|| greedy(with(1), 70),
        &|| speculate(with(8), 70),
    ];
    let (mut put_back, wants) = (0, each_alone(&engine, &jobs));
    for pages in 4..=10 {
        for trial in 0..2 {
            let mut batch = batch(&engine, 9, pages);
            // others beside them, which are cancelled while they wait, run or were put back
            let mut heard = Heard::default();
            let first = batch.submit(greedy(prompt(30, 20), 150)).unwrap();
            heard.steps(&mut batch, trial * 30);
            let ids = submit(&mut batch, &jobs);
            let last = batch.submit(greedy(prompt(130, 21), 50)).unwrap();
            for steps in [20, 90, 60] {
                heard.steps(&mut batch, steps);
                let load = batch.load();
                assert!(load.tokens <= load.capacity && load.capacity == pages * PAGE, "{load:?}");
                batch.cancel([last, first][steps / 60 % 2]);
            }
            heard.steps(&mut batch, usize::MAX);
            same_as_alone(&engine, &heard, &ids, &wants);
            let prompts =
                heard.0[&ids[5]].iter().filter(|e| matches!(e, JobEvent::Prompt(scores) if scores.len() == 119));
            assert_eq!(prompts.count(), 1, "its prompt's scores are told once");
            let load = batch.load();
            assert_eq!((load.running, load.waiting, load.tokens), (0, 0, 0), "{load:?}");
            put_back += load.put_back;
        }
    }
    assert!(put_back > 0, "{put_back} were put back");
}

#[test]
fn prompts_that_begin_alike_share_memory() {
    for engine in engines() {
        // two pages of the same beginning, and one more for each: with copies there would have to be 24
        let prefix = prompt(128, 1);
        let (n, answer) = if engine.is_gpu() { (3, 10) } else { (8, 25) }; // the emulated device is slow
        let (pages, with) = (2 + n, |i| [&prefix[..], &prompt(22, i)].concat());
        let mut batch = batch(&engine, n, pages);
        let ids: Vec<JobId> = (0..n as u32).map(|i| batch.submit(greedy(with(i), answer)).unwrap()).collect();
        let (mut heard, mut most) = (Heard::default(), 0);
        loop {
            heard.steps(&mut batch, 1);
            let load = batch.load();
            most = load.running.max(most);
            if load.running == 0 {
                assert_eq!(load.put_back, 0);
                break;
            }
        }
        assert_eq!(most, n, "all at once on {}", engine.device());
        for (i, id) in ids.iter().enumerate() {
            assert_eq!(heard.bits(*id), alone(&engine, greedy(with(i as u32), answer)), "{i} on {}", engine.device());
            assert_eq!(heard.finish(*id).timings.reused_tokens >= 128, i > 0);
        }
    }
}

/// A page to copy from is not kept for a job that needs all pages there are: see the same test of the library on the CPU alone.
#[test]
fn a_job_that_needs_all_pages_does_not_wait_for_ever() {
    for engine in engines() {
        let sizes = BatchOptions { sequences: 2, max_tokens: 2 * PAGE, cache_tokens: Some(2 * PAGE), ..OPTIONS };
        let mut batch = engine.batch(&sizes).unwrap();
        let (first, other) =
            (|| greedy(prompt(70, 1), 3), || greedy([&prompt(70, 1)[..9], &prompt(60, 2)].concat(), 3));
        let jobs: [&dyn Fn() -> Job; 3] = [&first, &first, &other];
        let wants = each_alone(&engine, &jobs);
        for (job, want) in jobs.iter().zip(wants) {
            let ids = submit(&mut batch, &[*job]);
            let mut heard = Heard::default();
            heard.steps(&mut batch, usize::MAX);
            assert_eq!((batch.load().waiting, batch.load().tokens), (0, 0), "on {}", engine.device());
            same_as_alone(&engine, &heard, &ids, &[want]);
        }
    }
}

#[test]
fn more_texts_than_rows_take_turns() {
    for engine in engines() {
        // more tokens than the first is told before the last begins, and in the turns that are looked at
        let (is_gpu, sequences, n) = if engine.is_gpu() { (true, 18, 64) } else { (false, 40, 80) };
        let make =
            |i: u32| job(prompt(3 + i as usize, i), n, drawn(i.into()), (i.is_multiple_of(7) && !is_gpu).then_some(1));
        let mut batch = engine
            .batch(&BatchOptions { sequences, max_tokens: 128, cache_tokens: Some(sequences * 128), ..OPTIONS })
            .unwrap();
        let ids: Vec<JobId> = (0..sequences as u32).map(|i| batch.submit(make(i)).unwrap()).collect();
        let mut heard = Heard::default();
        while batch.load().waiting > 0 {
            heard.steps(&mut batch, 1);
        }
        assert_eq!(batch.load().running, sequences);
        let told =
            |heard: &Heard| ids.iter().map(|id| heard.0.get(id).map_or(0, |_| heard.tokens(*id).len())).collect();
        let before: Vec<usize> = told(&heard);
        // turns of eight steps: nobody waits for more than two turns of others, or gets more than a turn more than another
        heard.steps(&mut batch, if is_gpu { 18 } else { 50 });
        let gained: Vec<usize> = told(&heard).iter().zip(&before).map(|(a, b)| a - b).collect();
        let (least, most) = (gained.iter().min().unwrap(), gained.iter().max().unwrap());
        assert!(*least > 0 && most - least <= 16, "{gained:?} on {}", engine.device());
        heard.steps(&mut batch, usize::MAX);
        for (i, id) in ids.iter().enumerate().step_by(if is_gpu { 9 } else { 1 }) {
            assert_eq!(heard.bits(*id), alone(&engine, make(i as u32)), "{i} on {}", engine.device());
        }
        assert!(ids.iter().all(|id| heard.tokens(*id).len() == n));
        assert_eq!(batch.load().put_back, 0);
    }
}

#[test]
fn jobs_wait_for_memory_in_their_order() {
    let engine = engines().remove(0);
    let mut batch = batch(&engine, 5, 4);
    let ids: Vec<JobId> = (0..5).map(|i| batch.submit(greedy(prompt(190, i), 10)).unwrap()).collect();
    let mut order = Vec::new();
    let mut most = 0;
    while batch.step(&mut |id, event| order.extend(matches!(event, JobEvent::Finish(_)).then_some(id))).unwrap() {
        most = batch.load().running.max(most);
    }
    assert_eq!((order, most), (ids, 1));
    let e = engine.batch(&BatchOptions { cache_tokens: Some(0), ..OPTIONS }).err().unwrap().to_string();
    assert!(e.contains("a cache of 0 tokens has no room for one sequence of 200"), "{e}");
}
