//! Sessions on a tiny random model: what a caller may rely on, the same on the CPU and on the device (emulated without a GPU).

use crate::{
    ptx,
    tiny::{self, CONFIG, EVERYTHING, engines, engines_of, engines_with, prompt},
};
use aoji::{Device, Engine, Error, Event, FinishReason, GenerateOptions, KvDtype, Options, Sampling, Session};

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

/// Limit for bf16 logits by two orders of summation: they differ by about 1% of their spread after two layers.
const CLOSE: f32 = 0.06;

#[test]
fn prefill_and_decode_agree_on_every_backend() {
    all_agree(&engines());
}

/// A prompt at once and its last tokens one by one give the same logits, on each engine those of the first.
pub fn all_agree(engines: &[Engine]) {
    let all = prompt(75, 1); // more than a tile of keys and of queries
    let mut logits = Vec::new();
    for engine in engines {
        let run = |first: usize| {
            let mut s = engine.session(200).unwrap();
            s.sync(&all[..first]).unwrap();
            all[first..].iter().for_each(|t| s.step(*t).unwrap());
            s.logits().unwrap()
        };
        let (at_once, one_by_one) = (run(75), run(60));
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

/// Limit for log-probabilities of bf16 logits by two orders of summation, since few rows are computed by other kernels
/// than many. Measured: 0.053.
const NEAR: f64 = 0.1;

/// Continuations that share a prefix and beginnings get the same scores as each sequence by itself.
#[test]
fn continuations_are_scored_as_if_alone() {
    for engine in engines() {
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
        // of each token by itself: its log-probability, and how far its logit is below the best
        let alone = |c: &Vec<u32>| {
            let (all, mut found) = ([prefix.as_slice(), c].concat(), Vec::new());
            let each = &mut |i: usize, logits: &[f32]| {
                let Some(&next) = all.get(i + 1) else { return };
                let best = logits[aoji::verify::argmax(logits) as usize];
                found.push((aoji::verify::log_softmax(logits, next), best - logits[next as usize]));
            };
            engine.session(120).unwrap().logits_of(&all, prefix.len() - 1, each).unwrap();
            found
        };
        let alone: Vec<Vec<(f64, f32)>> = conts.iter().map(alone).collect();
        // the emulated device is slow
        for &branches in if engine.is_gpu() { &[1, 8][..] } else { &[1, 2, 3, 8] } {
            scored_as_alone(&engine, branches, &prefix, &conts, &alone);
        }
    }
}

fn scored_as_alone(engine: &Engine, branches: usize, prefix: &[u32], conts: &[Vec<u32>], alone: &[Vec<(f64, f32)>]) {
    let name = format!("{}, {branches} branches a pass", engine.device());
    let mut s = engine.session_with_branches(120, branches).unwrap();
    let scores = s.score(prefix, conts).unwrap();
    // the prefix, the first continuation but for its last token, and of the last three what it does not begin with
    assert_eq!(scores.computed, 70 + 31 + 3 + 4 + 4, "{name}");
    for ((c, got), alone) in conts.iter().zip(&scores.continuations).zip(alone) {
        assert_eq!((got.0.len(), alone.len()), (c.len(), c.len()));
        for (t, (want, close)) in got.0.iter().zip(alone) {
            assert!((f64::from(t.logprob) - want).abs() < NEAR, "{name}: {c:?}: {t:?}, alone {want}");
            assert!(
                t.greedy == (*close == 0.0) || f64::from(*close) < NEAR,
                "{name}: {c:?}: {t:?}, {close} below the best"
            );
        }
        let sum: f64 = alone.iter().map(|(want, _)| want).sum();
        assert!((got.sum() - sum).abs() < NEAR * (1.0 + sum.abs()), "{name}: {} {sum}", got.sum());
    }
    assert!(scores.continuations[5].greedy() && scores.continuations[4].greedy() && !scores.continuations[1].greedy());
    // what the session holds is not computed again, but for the token whose logits are wanted
    let again = s.score(prefix, &conts[2..3]).unwrap();
    assert_eq!(s.tokens(), prefix);
    assert_eq!(again.computed, 1, "{name}");
    let d = again.continuations[0].sum() - scores.continuations[2].sum();
    assert!(d.abs() < NEAR, "{name}: {d}");
    let own = engine.score(prefix, &conts[2..3]).unwrap();
    assert_eq!(own.computed, 70);

    let needed = s.score(&prompt(100, 1), &[prompt(22, 2)]).map(drop);
    assert!(matches!(needed, Err(Error::Context { needed: 121, max: 120 })), "{needed:?}");
    assert!(s.score(&prompt(100, 1), &[prompt(21, 2)]).is_ok(), "the last token is not an input");
    assert!(matches!(s.score(prefix, &[[320]]), Err(Error::Input(_))));
    assert!(matches!(s.score(&[], &[[1]]), Err(Error::Input(_))));
}

/// A model whose sizes the kernels do not take is refused before anything is loaded.
#[test]
fn a_model_that_the_kernels_do_not_take_is_refused_at_once() {
    cuda_emulator::install();
    let dir = tempfile::tempdir().unwrap();
    let config = CONFIG.replace("\"head_dim\": 64", "\"head_dim\": 32");
    aoji::synth::write(&config, 7, aoji::Dtype::Bf16, 1 << 30, dir.path(), |_, _| {}).unwrap();
    let open = |device| Engine::open(dir.path().to_str().unwrap(), &Options { device, ..Options::default() });
    assert!(open(Device::Cpu).is_ok());
    let said = open(Device::Cuda(0)).expect_err("no kernel for 32").to_string();
    assert!(said.contains("the kernel has head_dim 64, 80, 96 and 128; others run on the CPU only"), "{said}");
}

/// While one session records a step, work that another enqueues does not get into it, and each gets its own tokens.
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

/// Greedy and drawn tokens as the device chooses them, and its logits after a prompt.
fn of_the_device() -> (Vec<u32>, Vec<u32>, Vec<f32>) {
    let engines = engines();
    let mut s = engines[1].session(200).unwrap();
    let greedy = tokens(&mut s, &prompt(75, 1), 12, &Sampling { temperature: 0.0, ..Sampling::default() });
    let drawn = tokens(&mut s, &prompt(40, 2), 12, &Sampling { temperature: 0.9, seed: 3, ..Sampling::default() });
    s.sync(&prompt(70, 3)).unwrap();
    (greedy, drawn, s.logits().unwrap())
}

/// A whole model, computed by the kernels' source and by the PTX that nvcc made of it: the same tokens, and logits that
/// differ at most by a rounding of `rsqrt.approx`.
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

/// A saved session goes on with the same bits in another engine, whatever room it has.
#[test]
fn a_saved_session_goes_on_with_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.session");
    let of_both =
        || KvDtype::ALL.into_iter().flat_map(|kv| engines_with(CONFIG, &Options { kv, ..Options::default() }));
    for (engine, again) in of_both().zip(of_both()) {
        let (begun, all) = (prompt(40, 1), prompt(52, 1));
        let mut s = engine.session(128).unwrap();
        s.sync(&begun).unwrap();
        s.save(&path, "a \"note\"\n").unwrap();
        let mut other = again.session(60).unwrap();
        other.sync(&prompt(20, 3)).unwrap(); // of which nothing is left
        assert_eq!(other.load(&path).unwrap(), "a \"note\"\n");
        assert_eq!(other.tokens(), begun);
        let run = |s: &mut Session| {
            let reused = s.sync(&all).unwrap();
            (reused, s.logits().unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>())
        };
        assert_eq!(run(&mut other), run(&mut s), "{}, {}", engine.device(), engine.plan().kv_dtype);
        let bytes = std::fs::metadata(&path).unwrap().len() as usize;
        let rows = 2 * 2 * 40; // of two layers, keys and values
        let kept = rows * engine.plan().kv_dtype.row_bytes(64, 2);
        assert!((kept..kept + 1000).contains(&bytes), "{bytes} bytes, {kept} of keys and values");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing unfinished is left");
    }
}

#[test]
fn a_file_that_is_no_session_of_this_model_is_refused() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = dir.path().join("a.session");
    let engine = engines().remove(0);
    let mut s = engine.session(64).unwrap();
    let nothing = s.save(&path, "").unwrap_err().to_string();
    assert!(nothing.contains("nothing is computed"), "{nothing}");
    s.sync(&prompt(30, 1)).unwrap();
    s.save(&path, "").unwrap();
    let whole = std::fs::read(&path).unwrap();
    let logits = s.logits().unwrap();

    let mut refused = |bytes: &[u8], words: &[&str]| {
        std::fs::write(&path, bytes).unwrap();
        let error = s.load(&path).unwrap_err().to_string();
        assert!(error.contains("a.session") && words.iter().all(|w| error.contains(w)), "{error:?} lacks {words:?}");
    };
    refused(&whole[..whole.len() - 1], &["truncated"]);
    refused(&whole[..100], &["truncated"]);
    refused(b"", &["empty"]);
    refused(b"not a session", &["not a safetensors file"]);
    let with = |from: &str, to: &str| {
        let at = whole.windows(from.len()).position(|w| w == from.as_bytes()).unwrap_or_else(|| panic!("no {from}"));
        [&whole[..at], to.as_bytes(), &whole[at + from.len()..]].concat()
    };
    refused(&with(r#""session":"1""#, r#""session":"2""#), &["another format version: 2, and this is 1"]);
    refused(&with(r#""device":"CPU""#, r#""device":"GPU""#), &["another device: GPU"]);
    refused(&with(r#""kv":"auto""#, r#""kv":"fp8 ""#), &["another format of keys and values: fp8 , and this is auto"]);
    let ours = format!(r#""aoji":"{}""#, env!("CARGO_PKG_VERSION"));
    refused(&with(&ours, &ours.replace('0', "9")), &["another aoji"]);
    refused(&with(r#""note""#, r#""nota""#), &["no session of aoji"]);
    refused(&with(r#"[2,2,1,30,64]"#, r#"[2,2,1,64,30]"#), &["keys_values", "[2, 2, 1, 30, 64]"]);
    assert_eq!(s.logits().unwrap(), logits, "the session is as it was");

    std::fs::write(&path, &whole).unwrap();
    let small = engine.session(29).unwrap().load(&path).unwrap_err();
    assert!(matches!(small, Error::Context { needed: 30, max: 29 }), "{small}");
    aoji::synth::write(CONFIG, 8, aoji::Dtype::Bf16, 1 << 30, other.path(), |_, _| {}).unwrap();
    let options = Options { device: Device::Cpu, ..Options::default() };
    let stranger = Engine::open(other.path().to_str().unwrap(), &options).unwrap();
    let error = stranger.session(64).unwrap().load(&path).unwrap_err().to_string();
    assert!(error.contains("another model"), "{error}");
}

/// Biases in the feed-forward network, which no Qwen has.
fn llama_with_biases() -> String {
    CONFIG.replacen('{', r#"{"attention_bias": true, "mlp_bias": true,"#, 1)
}

/// On every backend, and each backend keeps its promises: as `aoji verify --invariance` finds, nothing depends on what it must not
/// depend on. (Of the model without biases tests/device/batch.rs shows it.)
fn agrees_everywhere(config: &str) {
    let engines = engines_of(config);
    for engine in &engines {
        let report = aoji::invariance::invariance(engine, 18).unwrap();
        report.verdict().unwrap_or_else(|e| panic!("{e}\n{report}"));
        assert!(report.findings.iter().all(|f| f.values >= 24 && (f.differing == 0) == f.equal), "{report}");
    }
    all_agree(&engines);
}

#[test]
fn a_model_with_biases_normed_heads_and_windows_agrees_on_every_backend() {
    agrees_everywhere(EVERYTHING);
}

#[test]
fn a_model_with_biases_in_every_product_agrees_on_every_backend() {
    agrees_everywhere(&llama_with_biases());
}

/// Op by op: the kernels of a prompt, and the fused ones of steps.
#[cfg(feature = "cuda")]
#[test]
fn every_op_of_models_with_biases_normed_heads_and_windows_agrees() {
    for config in [EVERYTHING.to_string(), llama_with_biases()] {
        drop(engines()); // the emulated device is there
        let dir = tempfile::tempdir().unwrap();
        tiny::write_of(&config, dir.path());
        let files = aoji::ModelFiles::open(dir.path().to_str().unwrap()).unwrap();
        aoji::verify::lockstep(files, 0, aoji::KvDtype::Auto, 40, 6).unwrap_or_else(|e| panic!("{e}"));
    }
}
