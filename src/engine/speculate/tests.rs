//! Whatever is guessed, the text is the same as without guesses.

use super::Speculate;
use crate::{
    Batch, BatchOptions, Constraint, Device, Engine, Finish, GenerateOptions, Job, JobEvent, Options, Sampling,
};
use proptest::prelude::*;
use std::{ops::Range, sync::OnceLock};

const SEQUENCES: usize = 3;
const TOKENS: usize = 20;

fn open(draft: Option<Engine>) -> Engine {
    Engine::open("demo", &Options { device: Device::Cpu, draft, ..Options::default() }).unwrap()
}

/// Guesses of its smaller model, which is the same one, are mostly right: prompts are divided otherwise.
fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| open(Some(open(None))))
}

/// Guesses of its smaller model, of random weights and with a short context, are wrong.
fn engine_with_random_draft() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| open(Some(random(engine().config().vocab, 64))))
}

fn random(vocab: usize, context: usize) -> Engine {
    let config = format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": {vocab},
        "max_position_embeddings": {context}, "rms_norm_eps": 1e-5, "hidden_act": "silu"}}"#
    );
    let dir = tempfile::tempdir().unwrap();
    crate::synth::write(&config, 1, crate::Dtype::Bf16, 1 << 30, dir.path(), |_, _| {}).unwrap();
    let options = Options { device: Device::Cpu, ..Options::default() };
    Engine::open(dir.path().to_str().unwrap(), &options).unwrap()
}

fn batch(trial: Option<u64>) -> Batch {
    batch_of(engine(), trial)
}

fn batch_of(engine: &Engine, trial: Option<u64>) -> Batch {
    let mut batch =
        engine.batch(&BatchOptions { sequences: SEQUENCES, max_tokens: 128, cache_tokens: None, chunk: 64 }).unwrap();
    trial.into_iter().for_each(|seed| batch.try_drafts(seed));
    batch
}

/// A toy model of this test: after a token comes one of the next few ids that are no multiples of seven.
struct Near(u32);

impl Constraint for Near {
    fn allowed(&mut self, mask: &mut [u32]) -> Result<(), String> {
        let ids = (self.0..self.0 + 300).map(|id| id % engine().config().vocab as u32);
        ids.filter(|id| id % 7 > 0).for_each(|id| mask[id as usize / 32] |= 1 << (id % 32));
        Ok(())
    }
    fn accept(&mut self, token: u32) -> Result<(), String> {
        self.0 = token;
        Ok(())
    }
    /// What comes to mind, allowed or not.
    fn expected(&mut self) -> Vec<u32> {
        (self.0..self.0 + self.0 % 3).collect()
    }
    fn allows(&mut self, tokens: &[u32]) -> usize {
        tokens.len() / 2
    }
}

/// The settings for one text.
#[derive(Debug, Clone)]
struct Asked {
    prompt: Vec<u32>,
    options: GenerateOptions,
    constrained: bool,
}

impl Asked {
    fn job(&self, speculate: Speculate, prediction: &[u32]) -> Job {
        Job {
            prompt: self.prompt.clone(),
            options: GenerateOptions { speculate, prediction: prediction.to_vec(), ..self.options.clone() },
            logprobs: Some(2),
            constraint: self.constrained.then(|| Box::new(Near(self.prompt[0])) as _),
            ..Job::default()
        }
    }
}

/// Everything that jobs reported except times; also the tokens, and the ends.
fn run(batch: &mut Batch, jobs: Vec<Job>) -> Vec<(Vec<String>, Vec<u32>, Option<Finish>)> {
    let mut told: Vec<_> = jobs.iter().map(|_| (Vec::new(), Vec::new(), None)).collect();
    let first = jobs.into_iter().map(|job| batch.submit(job).unwrap().0).min().unwrap();
    let mut each = |id: crate::JobId, event: JobEvent| {
        let (events, tokens, finish) = &mut told[(id.0 - first) as usize];
        match event {
            JobEvent::Finish(f) => {
                events.push(format!("{:?} {:?} {}", f.reason, f.by, f.timings.tokens));
                *finish = Some(f);
            }
            other => {
                if let JobEvent::Token(token, _) = other {
                    tokens.push(token);
                }
                events.push(format!("{other:?}"));
            }
        }
    };
    while batch.step(&mut each).unwrap() {}
    told
}

fn sampling() -> impl Strategy<Value = Sampling> {
    let temperature = prop::sample::select(vec![0.0f32, 0.7, 1.5]);
    let penalties = (prop::sample::select(vec![1.0f32, 1.2]), prop::sample::select(vec![0.0f32, 0.5]));
    (temperature, penalties, 0.5..1.0f32, 0..40u32, any::<u64>(), 0..6u32).prop_map(
        |(temperature, (repetition_penalty, frequency_penalty), top_p, top_k, seed, min_tokens)| Sampling {
            temperature,
            repetition_penalty,
            frequency_penalty,
            top_p,
            top_k,
            seed,
            min_tokens,
            ..Sampling::default()
        },
    )
}

fn asked() -> impl Strategy<Value = Asked> {
    let length = |n: Range<usize>| prop::collection::vec(0..40u32, n); // few ids, so that there is something to repeat
    (length(1..60), sampling(), 1..TOKENS, any::<bool>(), prop::option::of(0..4000u32), any::<bool>()).prop_map(
        |(prompt, sampling, tokens, ignore_eos, stop, constrained)| Asked {
            prompt,
            options: GenerateOptions {
                sampling: Sampling { min_tokens: sampling.min_tokens.min(tokens as u32), ..sampling },
                max_tokens: Some(tokens),
                ignore_eos,
                stop_ids: stop.into_iter().collect(),
                stop: vec!["습니다".into()],
                ..GenerateOptions::default()
            },
            constrained,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Several texts at once, each with its own answer as a prediction, but with a wrong token at every `every`-th place; in
    /// batches that hold their prompts already, and in a session; or guessed by a model, a good one or a bad one.
    #[test]
    fn a_text_is_the_same_with_any_guesses(
        all in prop::collection::vec(asked(), 1..=SEQUENCES), seed in any::<u64>(), every in 1..9usize,
    ) {
        let expected = run(&mut batch(None), all.iter().map(|asked| asked.job(Speculate::Off, &[])).collect());
        let changed = |tokens: &Vec<u32>| tokens.iter().enumerate().map(|(i, t)| if i % every == every - 1 { 5 } else { *t }).collect();
        let predictions: Vec<Vec<u32>> = expected.iter().map(|(_, tokens, _)| changed(tokens)).collect();
        let by_model: Vec<Vec<u32>> = vec![Vec::new(); all.len()];
        for (engine, speculate, predictions) in [
            (engine(), Speculate::Ngram, &predictions),
            (engine(), Speculate::Model, &by_model),
            (engine_with_random_draft(), Speculate::Model, &by_model),
        ] {
            let mut batch = batch_of(engine, Some(seed));
            for _ in 0..2 {
                let jobs = all.iter().zip(predictions).map(|(asked, prediction)| asked.job(speculate, prediction));
                for (found, expected) in run(&mut batch, jobs.collect()).iter().zip(&expected) {
                    prop_assert_eq!(&found.0, &expected.0);
                }
            }
        }
        for (asked, prediction) in all.iter().zip(&predictions).filter(|(asked, _)| !asked.constrained) {
            let tokens = |options: &GenerateOptions, trial: Option<u64>| -> Vec<crate::Event> {
                let mut session = engine().session(128).unwrap();
                trial.into_iter().for_each(|seed| session.try_drafts(seed));
                let events = session.generate(&asked.prompt, options).unwrap().map(Result::unwrap);
                events.filter(|e| !matches!(e, crate::Event::Finish(..))).collect()
            };
            let expected = tokens(&asked.options, None);
            for (speculate, prediction) in [(Speculate::Ngram, prediction.clone()), (Speculate::Model, Vec::new())] {
                let guessed = GenerateOptions { speculate, prediction, ..asked.options.clone() };
                prop_assert_eq!(&tokens(&guessed, Some(seed)), &expected);
            }
        }
    }
}

#[test]
fn guesses_that_are_right_are_accepted_and_counted() {
    let options = GenerateOptions { max_tokens: Some(TOKENS), ignore_eos: true, ..GenerateOptions::default() };
    let asked = Asked { prompt: (1..50).collect(), options, constrained: false };
    let plain = run(&mut batch(None), vec![asked.job(Speculate::Off, &[])]).swap_remove(0);
    assert_eq!(plain.2.unwrap().timings.drafted_tokens, 0);
    let guessed = run(&mut batch(Some(1)), vec![asked.job(Speculate::Off, &plain.1)]).swap_remove(0);
    let timings = guessed.2.unwrap().timings;
    assert_eq!((guessed.1, timings.tokens), (plain.1, TOKENS));
    assert!(timings.drafted_tokens > 0, "{timings:?}");
    assert_eq!(timings.accepted_tokens, timings.drafted_tokens, "the prediction is the answer");
}

#[test]
fn a_model_that_guesses_is_followed_as_far_as_it_is_right() {
    let options = GenerateOptions { max_tokens: Some(TOKENS), ignore_eos: true, ..GenerateOptions::default() };
    let asked = Asked { prompt: (1..50).collect(), options, constrained: false };
    let counts = |engine: &Engine| {
        let (_, tokens, finish) = run(&mut batch_of(engine, Some(1)), vec![asked.job(Speculate::Model, &[])]).remove(0);
        (tokens, finish.unwrap().timings)
    };
    let ((tokens, own), (same, bad)) = (counts(engine()), counts(engine_with_random_draft()));
    assert_eq!(tokens, same);
    assert!(own.drafted_tokens > 0 && own.accepted_tokens * 2 > own.drafted_tokens, "{own:?}");
    assert!(bad.drafted_tokens > 0 && bad.accepted_tokens * 2 < bad.drafted_tokens, "{bad:?}");
    let without = open(None);
    let options = GenerateOptions { speculate: Speculate::Model, ..GenerateOptions::default() };
    let error = without.session(64).unwrap().generate(&[1], &options).map(drop).unwrap_err().to_string();
    assert!(error.contains("Options::draft"), "{error}");
}

#[test]
fn a_model_of_another_vocabulary_does_not_guess() {
    let options = Options { device: Device::Cpu, draft: Some(random(300, 64)), ..Options::default() };
    let error = Engine::open("demo", &options).map(drop).unwrap_err().to_string();
    assert!(error.contains("another vocabulary: 300 tokens, the model has"), "{error}");
}

#[test]
fn a_prediction_is_checked() {
    let session = &mut engine().session(64).unwrap();
    let vocab = engine().config().vocab as u32;
    for (prediction, expected) in [(vec![1, vocab], "token"), (vec![1; engine().max_context() + 1], "a prediction of")]
    {
        let options = GenerateOptions { prediction, ..GenerateOptions::default() };
        let error = session.generate(&[1], &options).map(drop).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
