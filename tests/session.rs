//! Sessions on a tiny random model: what a caller may rely on, the same on the CPU and on the device (emulated without a GPU).

#[path = "common/ptx.rs"]
mod ptx;
#[path = "common/tiny.rs"]
mod tiny;

use aoji::{Device, Engine, Error, Event, FinishReason, GenerateOptions, Options, Sampling, Session};
use tiny::{CONFIG, engines, prompt};

fn tokens(session: &mut Session, prompt: &[u32], n: usize, sampling: &Sampling) -> Vec<u32> {
    let options = GenerateOptions {
        sampling: sampling.clone(),
        max_tokens: Some(n),
        ignore_eos: true,
        ..GenerateOptions::default()
    };
    let events = session.generate(prompt, &options).unwrap().map(|e| e.unwrap());
    events.filter_map(|e| if let Event::Token(t) = e { Some(t) } else { None }).collect()
}

/// Largest distance, in units of the logits' standard deviation.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    let mean = b.iter().sum::<f32>() / b.len() as f32;
    let deviation = (b.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / b.len() as f32).sqrt();
    assert!(a.iter().chain(b).all(|x| x.is_finite()), "logits are not finite");
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / deviation
}

/// bf16 logits of two orders of summation: about 1% of their spread after two layers.
const CLOSE: f32 = 0.06;

#[test]
fn prefill_and_decode_agree_on_every_backend() {
    let engines = engines();
    let all = prompt(75, 1); // more than a tile of keys and of queries
    let mut logits = Vec::new();
    for engine in &engines {
        let mut s = engine.session(200).unwrap();
        s.sync(&all).unwrap();
        let at_once = s.logits().unwrap();
        let mut s = engine.session(200).unwrap();
        s.sync(&all[..60]).unwrap();
        all[60..].iter().for_each(|t| s.step(*t).unwrap());
        let one_by_one = s.logits().unwrap();
        let d = distance(&one_by_one, &at_once);
        assert!(d < CLOSE, "{}: prefill and decode differ by {d}", engine.device());
        logits.push(at_once);
    }
    for (engine, l) in engines.iter().zip(&logits).skip(1) {
        let d = distance(l, &logits[0]);
        assert!(d < CLOSE, "{} differs from the reference by {d}", engine.device());
    }
}

#[test]
fn sync_keeps_the_common_prefix_and_nothing_else() {
    for engine in engines() {
        let mut s = engine.session(128).unwrap();
        let (a, b) = (prompt(40, 1), [prompt(30, 1), prompt(20, 9)].concat());
        assert_eq!(s.sync(&a).unwrap(), 0);
        assert_eq!(s.sync(&a).unwrap(), 40, "nothing to do");
        let reused = s.sync(&b).unwrap();
        assert!((30..40).contains(&reused), "{reused}");
        let kept = s.logits().unwrap();
        let mut fresh = engine.session(128).unwrap();
        fresh.sync(&b).unwrap();
        let d = distance(&kept, &fresh.logits().unwrap());
        assert!(d < CLOSE, "{}: a reused prefix changes the logits by {d}", engine.device());
        assert_eq!(s.sync(&b[..10]).unwrap(), 9, "the last token's logits are computed");
        assert_eq!(s.tokens(), &b[..10]);
    }
}

#[test]
fn decoding_equals_stepping_by_hand() {
    for engine in engines() {
        let start = prompt(12, 3);
        let got = tokens(&mut engine.session(64).unwrap(), &start, 20, &Sampling::default());
        assert_eq!(got.len(), 20);
        let (mut s, mut all) = (engine.session(64).unwrap(), start.clone());
        for t in &got {
            s.sync(&all).unwrap();
            assert_eq!(aoji::verify::argmax(&s.logits().unwrap()), *t, "{}", engine.device());
            all.push(*t);
        }
    }
}

#[test]
fn a_session_goes_on_after_a_cancelled_generation() {
    for engine in engines() {
        let start = prompt(12, 5);
        let want = tokens(&mut engine.session(64).unwrap(), &start, 12, &Sampling::default());
        let mut s = engine.session(64).unwrap();
        let options = GenerateOptions { ignore_eos: true, ..GenerateOptions::default() };
        let taken = s.generate(&start, &options).unwrap().take(5).count(); // dropped while steps are under way
        assert_eq!(taken, 5);
        let so_far = s.tokens().to_vec();
        assert_eq!(so_far[12..], want[..so_far.len() - 12]);
        let rest = tokens(&mut s, &so_far, 24 - so_far.len(), &Sampling::default());
        assert_eq!([&so_far[12..], &rest].concat(), want, "{}", engine.device());
    }
}

#[test]
fn the_same_seed_gives_the_same_tokens() {
    let sampling = |seed| Sampling {
        temperature: 1.5,
        top_p: 0.95,
        top_k: 50,
        repetition_penalty: 1.1,
        frequency_penalty: 0.2,
        seed,
        ..Sampling::default()
    };
    for engine in engines() {
        let start = prompt(9, 2);
        let mut s = engine.session(64).unwrap();
        let a = tokens(&mut s, &start, 24, &sampling(1));
        tokens(&mut s, &prompt(20, 8), 3, &sampling(5)); // something else in between
        assert_eq!(a, tokens(&mut s, &start, 24, &sampling(1)), "{}", engine.device());
        assert_ne!(a, tokens(&mut s, &start, 24, &sampling(2)), "{}", engine.device());
    }
}

#[test]
fn the_context_ends_with_a_reason() {
    for engine in engines() {
        let mut s = engine.session(24).unwrap();
        let options = GenerateOptions { ignore_eos: true, ..GenerateOptions::default() };
        let events: Vec<Event> = s.generate(&prompt(20, 1), &options).unwrap().map(|e| e.unwrap()).collect();
        let Some(Event::Finish(reason, timings)) = events.last() else { panic!("{events:?}") };
        assert_eq!((*reason, timings.tokens), (FinishReason::Length, 4), "{}", engine.device());
        assert_eq!(s.tokens().len(), 24);
        assert!(matches!(s.generate(&prompt(24, 1), &options).err(), Some(Error::Context { needed: 25, max: 24 })));
        assert!(matches!(s.sync(&prompt(25, 1)), Err(Error::Context { needed: 25, max: 24 })));
        assert!(matches!(s.sync(&[320]), Err(Error::Input(_))));
        assert!(matches!(s.sync(&[]), Err(Error::Input(_))));
        assert!(matches!(engine.session(257), Err(Error::Context { needed: 257, max: 256 })));
    }
}

#[test]
fn logits_of_gives_the_logits_of_each_token() {
    for engine in engines() {
        let all = prompt(37, 4);
        let (mut s, mut rows) = (engine.session(64).unwrap(), Vec::new());
        s.logits_of(&all, 5, &mut |i, logits| rows.push((i, logits.to_vec()))).unwrap();
        assert_eq!(rows.iter().map(|(i, _)| *i).collect::<Vec<_>>(), (5..37).collect::<Vec<_>>());
        for i in [5, 20, 36] {
            let mut s = engine.session(64).unwrap();
            s.sync(&all[..=i]).unwrap();
            let d = distance(&rows[i - 5].1, &s.logits().unwrap());
            assert!(d < CLOSE, "{}: token {i}: {d}", engine.device());
        }
    }
}

#[test]
fn min_tokens_holds_the_end_back() {
    for engine in engines() {
        let mut s = engine.session(64).unwrap();
        let eos = engine.config().eos[0];
        let likely = |min_tokens| GenerateOptions {
            sampling: Sampling { logit_bias: vec![(eos, 50.0)], min_tokens, ..Sampling::default() },
            ..GenerateOptions::default()
        };
        for (min_tokens, want) in [(0, 1), (6, 7)] {
            let events = s.generate(&prompt(8, 1), &likely(min_tokens)).unwrap().map(|e| e.unwrap());
            let Some(Event::Finish(reason, t)) = events.last() else { panic!("no end") };
            assert_eq!((reason, t.tokens), (FinishReason::Stop, want), "{}", engine.device());
        }
    }
}

/// Log-probabilities of bf16 logits by two orders of summation: a few rows take other kernels than many. Measured: 0.053.
const NEAR: f64 = 0.1;

/// Scores of continuations that share a prefix and beginnings are those of each sequence by itself.
#[test]
fn continuations_are_scored_as_if_alone() {
    let engines = engines();
    for (engine, branches) in engines.iter().flat_map(|e| [1, 2, 3, 8].map(|n| (e, n))) {
        let name = format!("{}, {branches} branches a pass", engine.device());
        let prefix = prompt(70, 1);
        let mut s = engine.session(120).unwrap();
        s.sync(&prefix).unwrap();
        let likely = aoji::verify::argmax(&s.logits().unwrap());
        let long: Vec<u32> = [vec![likely, 6], prompt(30, 4)].concat(); // more rows than are scored at once
        let wide = (100..120).map(|t| vec![t]); // more targets of one row than one call takes
        let mut conts =
            vec![long.clone(), vec![likely, 9], vec![11], [&long[..4], &[7, 3]].concat(), vec![], vec![likely]];
        conts.extend(wide);
        conts.extend([
            vec![200, 201, 202, 203],
            vec![200, 201, 250, 251, 252],
            [&long[..4], &[7, 3, 5, 6, 9]].concat(),
        ]);
        let mut s = engine.session_with_branches(120, branches).unwrap();
        let scores = s.score(&prefix, &conts).unwrap();
        // the prefix, the first continuation but for its last token, and of the last three what it does not begin with
        assert_eq!(scores.computed, 70 + 31 + 3 + 4 + 4, "{name}");
        for (c, got) in conts.iter().zip(&scores.continuations) {
            assert_eq!(got.0.len(), c.len());
            let (all, mut sum) = ([prefix.as_slice(), c].concat(), 0.0);
            let mut alone = engine.session(120).unwrap();
            let each = &mut |i: usize, logits: &[f32]| {
                let (Some(&next), Some(t)) = (all.get(i + 1), got.0.get(i + 1 - prefix.len())) else { return };
                let want = aoji::verify::log_softmax(logits, next);
                assert!((f64::from(t.logprob) - want).abs() < NEAR, "{name}: {c:?}: {t:?}, alone {want}");
                let best = logits[aoji::verify::argmax(logits) as usize];
                let close = best - logits[next as usize];
                assert!(
                    t.greedy == (close == 0.0) || f64::from(close) < NEAR,
                    "{name}: {c:?}: {t:?}, {close} below the best"
                );
                sum += want;
            };
            alone.logits_of(&all, prefix.len() - 1, each).unwrap();
            assert!((got.sum() - sum).abs() < NEAR * (1.0 + sum.abs()), "{name}: {} {sum}", got.sum());
        }
        assert!(
            scores.continuations[5].greedy() && scores.continuations[4].greedy() && !scores.continuations[1].greedy()
        );
        // what the session holds is not computed again, but for the token whose logits are wanted
        let again = s.score(&prefix, &conts[2..3]).unwrap();
        assert_eq!(s.tokens(), prefix);
        assert_eq!(again.computed, 1, "{name}");
        let d = again.continuations[0].sum() - scores.continuations[2].sum();
        assert!(d.abs() < NEAR, "{name}: {d}");
        let own = engine.score(&prefix, &conts[2..3]).unwrap();
        assert_eq!(own.computed, 70);

        let needed = s.score(&prompt(100, 1), &[prompt(22, 2)]).map(drop);
        assert!(matches!(needed, Err(Error::Context { needed: 121, max: 120 })), "{needed:?}");
        assert!(s.score(&prompt(100, 1), &[prompt(21, 2)]).is_ok(), "the last token is not an input");
        assert!(matches!(s.score(&prefix, &[[320]]), Err(Error::Input(_))));
        assert!(matches!(s.score(&[], &[[1]]), Err(Error::Input(_))));
    }
}

/// What `aoji verify --invariance` finds on a model of two layers: nothing depends on what it must not.
#[test]
fn bits_depend_on_the_division_of_the_prompt_at_most() {
    for engine in engines() {
        let report = aoji::invariance::invariance(&engine, 24).unwrap();
        report.verdict().unwrap_or_else(|e| panic!("{e}\n{report}"));
        assert!(report.findings.iter().all(|f| f.values >= 24 && (f.differing == 0) == f.equal), "{report}");
    }
}

/// What the kernels do not take is refused before anything is loaded.
#[test]
#[cfg(feature = "cuda")]
fn a_model_that_the_kernels_do_not_take_is_refused_at_once() {
    cuda_emulator::install();
    let dir = tempfile::tempdir().unwrap();
    let config = CONFIG.replace("\"head_dim\": 64", "\"head_dim\": 32");
    aoji::synth::write(&config, 7, aoji::Dtype::Bf16, 1 << 30, dir.path(), |_, _| {}).unwrap();
    let open = |device| Engine::open(dir.path().to_str().unwrap(), &Options { device, ..Options::default() });
    assert!(open(Device::Cpu).is_ok());
    let said = open(Device::Cuda(0)).err().expect("no kernel for 32").to_string();
    assert!(said.contains("the kernel has head_dim 64 and 128; others run on the CPU only"), "{said}");
}

/// One recording a step does not catch what the other enqueues, and each gets its own tokens.
#[test]
fn sessions_of_several_threads_do_not_meet() {
    for engine in engines() {
        let run =
            |salt| tokens(&mut engine.session(64).unwrap(), &prompt(9 + salt as usize, salt), 12, &Sampling::default());
        let alone: Vec<_> = (0..3).map(run).collect();
        let together: Vec<_> = std::thread::scope(|s| {
            let threads: Vec<_> = (0..3)
                .map(|salt| {
                    s.spawn({
                        let run = &run;
                        move || run(salt)
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(together, alone, "{}", engine.device());
    }
}

/// Greedy and drawn tokens of the device, and its logits after a prompt.
fn of_the_device() -> (Vec<u32>, Vec<u32>, Vec<f32>) {
    let engines = engines();
    let mut s = engines[1].session(200).unwrap();
    let greedy = tokens(&mut s, &prompt(75, 1), 12, &Sampling { temperature: 0.0, ..Sampling::default() });
    let drawn = tokens(&mut s, &prompt(40, 2), 12, &Sampling { temperature: 0.9, seed: 3, ..Sampling::default() });
    s.sync(&prompt(70, 3)).unwrap();
    (greedy, drawn, s.logits().unwrap())
}

/// A whole model by the kernels' source and by what nvcc made of it: the same tokens, and logits that differ by a rounding of
/// `rsqrt.approx` at most.
#[test]
fn compiled_kernels_give_the_tokens_of_their_source() {
    let source = of_the_device();
    // an engine opens its device in a thread of its own, which sees the capability that the process has
    ptx::with_ptx(90, || {
        let compiled = of_the_device();
        assert_eq!((&compiled.0, &compiled.1), (&source.0, &source.1));
        let d = distance(&compiled.2, &source.2);
        assert!(d < CLOSE, "logits differ by {d}");
    });
}

#[test]
fn compiled_kernels_hold_what_a_session_promises() {
    ptx::with_ptx(90, || {
        prefill_and_decode_agree_on_every_backend();
        the_same_seed_gives_the_same_tokens();
    });
}
