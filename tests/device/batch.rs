//! Several sequences at once on a tiny random model: the result of a job does not depend on the others, bit for bit, on the CPU and
//! on the device (emulated without a GPU).

use crate::tiny::{engines, prompt};
use aoji::{
    Batch, BatchOptions, Constraint, Device, Engine, Error, Finish, FinishReason, GenerateOptions, Job, JobEvent,
    JobId, Options, Sampling, StoppedBy, TokenLogprobs,
};
use std::collections::BTreeMap;

pub const OPTIONS: BatchOptions = BatchOptions { sequences: 4, max_tokens: 200, cache_tokens: None, chunk: 34 };

pub fn job(prompt: Vec<u32>, n: usize, sampling: Sampling, logprobs: Option<usize>) -> Job {
    let options = GenerateOptions { sampling, max_tokens: Some(n), ignore_eos: true, ..GenerateOptions::default() };
    Job { prompt, options, logprobs, ..Job::default() }
}

pub fn greedy(prompt: Vec<u32>, n: usize) -> Job {
    job(prompt, n, Sampling::default(), None)
}

pub fn drawn(seed: u64) -> Sampling {
    Sampling {
        temperature: 1.0,
        top_p: 0.95,
        repetition_penalty: 1.2,
        frequency_penalty: 0.1,
        seed,
        ..Sampling::default()
    }
}

/// The events that the jobs of a batch have yielded.
#[derive(Default)]
pub struct Heard(pub BTreeMap<JobId, Vec<JobEvent>>);

impl Heard {
    /// Does up to `steps` pieces of work.
    pub fn steps(&mut self, batch: &mut Batch, steps: usize) {
        for _ in 0..steps {
            if !batch.step(&mut |id, event| self.0.entry(id).or_default().push(event)).unwrap() {
                return;
            }
        }
    }

    pub fn all(batch: &mut Batch) -> Heard {
        let mut heard = Heard::default();
        heard.steps(batch, usize::MAX);
        heard
    }

    pub fn tokens(&self, id: JobId) -> Vec<u32> {
        let token = |e: &JobEvent| if let JobEvent::Token(t, _) = e { Some(*t) } else { None };
        self.0[&id].iter().filter_map(token).collect()
    }

    /// Tokens and the bits of their log-probabilities.
    pub fn bits(&self, id: JobId) -> Vec<(u32, Vec<u32>)> {
        let bits = |l: &TokenLogprobs| l.top.iter().map(|(_, p)| p.to_bits()).chain([l.logprob.to_bits()]).collect();
        let token = |e: &JobEvent| match e {
            JobEvent::Token(t, l) => Some((*t, l.as_ref().map_or(Vec::new(), bits))),
            _ => None,
        };
        self.0[&id].iter().filter_map(token).collect()
    }

    pub fn finish(&self, id: JobId) -> &Finish {
        match self.0[&id].last() {
            Some(JobEvent::Finish(finish)) => finish,
            other => panic!("{id:?} ended with {other:?}"),
        }
    }
}

/// Runs the job alone in a new batch.
pub fn alone(engine: &Engine, job: Job) -> Vec<(u32, Vec<u32>)> {
    let mut batch = engine.batch(&OPTIONS).unwrap();
    let id = batch.submit(job).unwrap();
    Heard::all(&mut batch).bits(id)
}

#[test]
fn a_job_gets_the_same_bits_whatever_else_runs() {
    for engine in engines() {
        let watched = |logprobs| job(prompt(85, 1), 10, drawn(5), logprobs);
        // the emulated device is slow
        for logprobs in if engine.is_gpu() { &[None][..] } else { &[None, Some(3)] }.iter().copied() {
            let want = alone(&engine, watched(logprobs));
            assert_eq!(want.len(), 10);
            let same = |what: &str, heard: &Heard, id| {
                assert_eq!(heard.bits(id), want, "{what}, logprobs {logprobs:?}, on {}", engine.device());
            };

            // beside more jobs than there are sequences, before it and after it, of many lengths
            let mut batch = engine.batch(&OPTIONS).unwrap();
            let (mut heard, mut id) = (Heard::default(), None);
            for (i, len) in [30, 3, 50, 9, 40].into_iter().enumerate() {
                if i == 2 {
                    id = Some(batch.submit(watched(logprobs)).unwrap());
                }
                let other = job(prompt(len, 10 + i as u32), 4 + i * 2, drawn(i as u64), (i % 3 == 0).then_some(1));
                batch.submit(other).unwrap();
                heard.steps(&mut batch, 2);
            }
            heard.steps(&mut batch, usize::MAX);
            same("beside others", &heard, id.unwrap());

            // beside as many as a step takes
            let mut batch = engine.batch(&BatchOptions { sequences: 16, ..OPTIONS }).unwrap();
            let others: Vec<_> =
                (0..15).map(|i| batch.submit(job(prompt(2 + i, i as u32), 40, drawn(1), None)).unwrap()).collect();
            let mut all = Heard::default();
            while !others.iter().all(|o| all.0.contains_key(o)) {
                all.steps(&mut batch, 1);
            }
            let last = batch.submit(watched(logprobs)).unwrap();
            all.steps(&mut batch, usize::MAX);
            same("beside fifteen others", &all, last);

            // again in the same batch, and again: its prompt is then in the cache of an idle sequence
            let [_, again] = [(); 2].map(|()| {
                let again = batch.submit(watched(logprobs)).unwrap();
                heard.steps(&mut batch, usize::MAX);
                same("again", &heard, again);
                again
            });
            assert_eq!(heard.finish(again).timings.reused_tokens, 85 - 17);

            // twice at once: the second copies from the first, which is busy
            let mut batch = engine.batch(&OPTIONS).unwrap();
            let ids = [(); 2].map(|()| batch.submit(watched(logprobs)).unwrap());
            let heard = Heard::all(&mut batch);
            ids.iter().for_each(|id| same("twice at once", &heard, *id));
            assert_eq!(heard.finish(ids[1]).timings.reused_tokens, 85 - 17);

            // after a part of it was computed for others, one of which was cancelled while it ran
            let mut batch = engine.batch(&OPTIONS).unwrap();
            let half = [&prompt(85, 1)[..40], &prompt(9, 3)[..]].concat();
            let (cancelled, kept) =
                (batch.submit(greedy(half.clone(), 50)).unwrap(), batch.submit(greedy(half, 9)).unwrap());
            let mut heard = Heard::default();
            heard.steps(&mut batch, 9);
            let id = batch.submit(watched(logprobs)).unwrap();
            heard.steps(&mut batch, 2);
            batch.cancel(cancelled);
            let told = heard.0[&cancelled].len();
            heard.steps(&mut batch, usize::MAX);
            same("beside a cancelled one", &heard, id);
            assert_eq!(heard.0[&cancelled].len(), told, "nothing of a cancelled job follows");
            assert_eq!(heard.tokens(kept).len(), 9);
            assert!(heard.finish(id).timings.reused_tokens >= 32);

            // in other parts
            for chunk in [40, 60] {
                let mut batch = engine.batch(&BatchOptions { chunk, ..OPTIONS }).unwrap();
                batch.submit(greedy(prompt(4, 6), 20)).unwrap(); // while none runs, parts are large
                let id = batch.submit(watched(logprobs)).unwrap();
                same("in other parts", &Heard::all(&mut batch), id);
            }
        }
    }
}

#[test]
fn a_greedy_job_gets_what_a_session_generates() {
    for engine in engines() {
        let n = if engine.is_gpu() { 6 } else { 12 }; // the emulated device is slow
        let options = GenerateOptions { max_tokens: Some(n), ignore_eos: true, ..GenerateOptions::default() };
        for len in [1, 16, 17, 40] {
            let mut session = engine.session(100).unwrap();
            let events = session.generate(&prompt(len, 2), &options).unwrap().map(|e| e.unwrap());
            let token = |e| if let aoji::Event::Token(t) = e { Some(t) } else { None };
            let want: Vec<u32> = events.filter_map(token).collect();
            let mut batch = engine.batch(&OPTIONS).unwrap();
            let jobs = [(len, 2), (30, 4), (5, 7)];
            let ids = jobs.map(|(len, salt)| batch.submit(greedy(prompt(len, salt), n)).unwrap());
            let heard = Heard::all(&mut batch);
            assert_eq!(heard.tokens(ids[0]), want, "{len} tokens beside others on {}", engine.device());
            let got: Vec<u32> = alone(&engine, greedy(prompt(len, 2), n)).into_iter().map(|(t, _)| t).collect();
            assert_eq!(got, want, "{len} tokens alone on {}", engine.device());
        }
    }
}

#[test]
fn jobs_interleave_and_wait_their_turn() {
    for engine in engines() {
        let mut batch = engine.batch(&BatchOptions { sequences: 2, ..OPTIONS }).unwrap();
        let ids = [30, 60, 20].map(|len| batch.submit(greedy(prompt(len, len as u32), 12)).unwrap());
        assert_eq!(batch.load().waiting, 3);
        let mut order = Vec::new();
        while batch.step(&mut |id, event| order.extend(matches!(event, JobEvent::Token(..)).then_some(id))).unwrap() {}
        // the first one goes on while the second one's prompt is computed, the third one waits for a sequence
        let first_of = |id| order.iter().position(|o| *o == id).unwrap();
        let last_of = |id| order.iter().rposition(|o| *o == id).unwrap();
        let before = order[..first_of(ids[1])].len();
        assert!((2..12).contains(&before), "{before} tokens before the second one's first");
        assert!(last_of(ids[0]) > first_of(ids[1]), "they run side by side");
        assert!(first_of(ids[2]) > last_of(ids[0]).min(last_of(ids[1])));
        assert_eq!(order.len(), 36);
        assert_eq!(batch.load(), aoji::Load { running: 0, waiting: 0, tokens: 0, capacity: 512, put_back: 0 });
    }
}

#[test]
fn a_cancelled_job_leaves_its_sequence_wherever_it_was() {
    for engine in engines() {
        let want = alone(&engine, greedy(prompt(30, 9), 10));
        let mut batch = engine.batch(&BatchOptions { sequences: 2, ..OPTIONS }).unwrap();
        let other = batch.submit(greedy(prompt(9, 4), 60)).unwrap();
        let running = batch.submit(greedy(prompt(20, 1), 100)).unwrap();
        let waiting = batch.submit(greedy(prompt(20, 2), 100)).unwrap();
        let mut heard = Heard::default();
        heard.steps(&mut batch, 6);
        assert!(!heard.tokens(running).is_empty());
        batch.cancel(waiting);
        batch.cancel(running);
        let filling = batch.submit(greedy(prompt(150, 3), 50)).unwrap();
        heard.steps(&mut batch, 3); // of five parts
        assert_eq!(batch.load().running, 2);
        batch.cancel(filling);
        assert_eq!(batch.load().running, 1);
        let id = batch.submit(greedy(prompt(30, 9), 10)).unwrap();
        heard.steps(&mut batch, usize::MAX);
        assert_eq!(heard.bits(id), want);
        assert!(!heard.0.contains_key(&waiting) && !heard.0.contains_key(&filling));
        assert_eq!(heard.tokens(other).len(), 60);
        batch.cancel(JobId(77)); // there is none
    }
}

#[test]
fn log_probabilities_of_a_prompt_are_those_of_score() {
    for engine in engines() {
        let all = prompt(40, 4);
        let scored = engine.score(&all[..1], &[&all[1..]]).unwrap();
        let mut batch = engine.batch(&OPTIONS).unwrap();
        let job = Job { prompt_logprobs: Some(2), ..job(all.clone(), 0, Sampling::default(), None) };
        let id = batch.submit(job).unwrap();
        let heard = Heard::all(&mut batch);
        let [JobEvent::Prompt(scores), JobEvent::Finish(finish)] = &heard.0[&id][..] else {
            panic!("{:?}", heard.0[&id])
        };
        assert_eq!((finish.reason, finish.timings.tokens), (FinishReason::Length, 0));
        assert_eq!(scores.len(), 39);
        for ((got, want), token) in scores.iter().zip(&scored.continuations[0].0).zip(&all[1..]) {
            assert_eq!((got.token, got.top.len()), (*token, 2));
            assert!((got.logprob - want.logprob).abs() < 0.03, "{got:?}, {want:?}"); // bf16, other kernels
            assert!(got.top[0].1 >= got.logprob && got.top[0].1 >= got.top[1].1);
            assert_eq!(got.top[0].0 == *token, want.greedy || got.top[0].1 == got.logprob);
        }
        // with a token: the same one as without
        let with = Job { prompt_logprobs: Some(0), ..greedy(all.clone(), 1) };
        let id = batch.submit(with).unwrap();
        let got = Heard::all(&mut batch).bits(id);
        assert_eq!(got, alone(&engine, greedy(all, 1)));
    }
}

/// Allows the ids of a list in turn, then fails.
pub struct Turns(pub Vec<Vec<u32>>, pub usize);

impl Constraint for Turns {
    fn allowed(&mut self, mask: &mut [u32]) -> Result<(), String> {
        assert!(mask.iter().all(|w| *w == 0));
        let ids = self.0.get(self.1).ok_or("no turn is left")?;
        ids.iter().for_each(|id| mask[*id as usize / 32] |= 1 << (id % 32));
        Ok(())
    }
    fn accept(&mut self, token: u32) -> Result<(), String> {
        assert!(self.0[self.1].contains(&token));
        self.1 += 1;
        Ok(())
    }
}

#[test]
fn a_constraint_decides_what_may_come() {
    for engine in engines() {
        let mut batch = engine.batch(&OPTIONS).unwrap();
        let turns = vec![vec![7], vec![8, 300, 301], vec![319], vec![0]];
        let with = |n, sampling| Job {
            constraint: Some(Box::new(Turns(turns.clone(), 0))),
            ..job(prompt(20, 5), n, sampling, None)
        };
        let free = batch.submit(greedy(prompt(30, 6), 12)).unwrap();
        let [plain, random, fails] =
            [(4, Sampling::default()), (4, drawn(3)), (5, drawn(4))].map(|(n, s)| batch.submit(with(n, s)).unwrap());
        let heard = Heard::all(&mut batch);
        for id in [plain, random] {
            let tokens = heard.tokens(id);
            assert!(matches!(tokens[..], [7, 8 | 300 | 301, 319, 0]), "{tokens:?}");
            assert_eq!(heard.finish(id).reason, FinishReason::Length);
        }
        assert_eq!(heard.0[&fails].last(), Some(&JobEvent::Failed("no turn is left".into())));
        assert_eq!(heard.bits(free), alone(&engine, greedy(prompt(30, 6), 12)));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    for engine in engines() {
        let text = |r: aoji::Result<JobId>| r.unwrap_err().to_string();
        let mut batch = engine.batch(&OPTIONS).unwrap();
        assert!(matches!(batch.submit(greedy(prompt(150, 1), 51)), Err(Error::Context { needed: 201, max: 200 })));
        assert!(batch.submit(greedy(prompt(150, 1), 50)).is_ok());
        assert!(text(batch.submit(greedy(vec![], 1))).contains("at least one"));
        assert!(text(batch.submit(greedy(vec![320], 1))).contains("token 320 is not below"));
        let hot = Sampling { temperature: -1.0, ..Sampling::default() };
        assert!(text(batch.submit(job(vec![1], 1, hot, None))).contains("temperature is -1"));
        assert_eq!(Heard::all(&mut batch).tokens(JobId(0)).len(), 50, "up to the last position");
        let full = batch.submit(job(prompt(200, 1), 0, Sampling::default(), None)).unwrap();
        assert_eq!(
            Heard::all(&mut batch).finish(full).reason,
            FinishReason::Length,
            "a prompt that fills the sequence"
        );
        for (wrong, what) in [
            (BatchOptions { sequences: 65, ..OPTIONS }, "sequences 65: allowed is 1 to 64"),
            (
                BatchOptions { cache_tokens: Some(199), ..OPTIONS },
                "a cache of 199 tokens has no room for one sequence of 200",
            ),
            (BatchOptions { sequences: 0, ..OPTIONS }, "sequences 0"),
            (BatchOptions { chunk: 33, ..OPTIONS }, "chunk 33: allowed is 34 to 511"),
        ] {
            let e = engine.batch(&wrong).err().unwrap().to_string();
            assert!(e.contains(what), "{e}");
        }
        let long = BatchOptions { max_tokens: 257, ..OPTIONS };
        assert!(matches!(engine.batch(&long), Err(Error::Context { needed: 257, max: 256 })));
    }
}

#[test]
fn text_ends_at_stop_strings_and_says_which() {
    let engine = Engine::open("demo", &Options { device: Device::Cpu, ..Options::default() }).unwrap();
    let question = [aoji::Message::new("user", "피보나치 수열이 뭐야?")];
    let prompt = engine.template().encode(engine.tokenizer().unwrap(), &question, None).unwrap();
    let run = |options: GenerateOptions| {
        let mut batch = engine.batch(&BatchOptions { max_tokens: 256, ..OPTIONS }).unwrap();
        let id = batch.submit(Job { prompt: prompt.clone(), options, ..Job::default() }).unwrap();
        let heard = Heard::all(&mut batch);
        let text = |e: &JobEvent| if let JobEvent::Text(t) = e { Some(t.clone()) } else { None };
        (heard.0[&id].iter().filter_map(text).collect::<String>(), heard.finish(id).clone())
    };
    let (whole, finish) = run(GenerateOptions::default());
    let eos = engine.config().eos[0];
    assert_eq!((finish.reason, finish.by), (FinishReason::Stop, Some(StoppedBy::Token(eos))));
    let stop: String = whole.chars().skip(5).take(3).collect();
    let (begin, _) = whole.split_once(&stop).unwrap();
    let with =
        |include_stop| GenerateOptions {
            stop: vec!["없다".into(), stop.clone()], include_stop, ..Default::default()
        };
    let (text, finish) = run(with(false));
    assert_eq!((text.as_str(), finish.by), (begin, Some(StoppedBy::Text(stop.clone()))));
    assert_eq!(run(with(true)).0, format!("{begin}{stop}"));
}
