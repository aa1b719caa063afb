//! KoBEST: requests, token ids, picks and accuracies are those of lm-evaluation-harness.

use aoji::{
    Activations, Device, Engine, Options, Tokenizer,
    eval::{self, Document, Task, TaskResult},
    score::Request,
};
use flate2::read::GzDecoder;
use rayon::prelude::*;
use serde::{Deserialize, de::DeserializeOwned};
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

fn kobest() -> Option<PathBuf> {
    crate::common::data("kobest_v1")
}

/// The objects of a `.jsonl.gz`.
fn lines<T: DeserializeOwned>(path: &Path) -> Vec<T> {
    let file = fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let lines = BufReader::new(GzDecoder::new(file)).lines();
    lines.map(|l| serde_json::from_str(&l.unwrap()).unwrap()).collect()
}

fn json<T: DeserializeOwned>(path: &Path) -> T {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn open(model: &str) -> Option<Engine> {
    let dir = crate::common::model(model)?;
    let options = Options { device: Device::Cpu, activations: Activations::F32, ..Options::default() };
    Some(Engine::open(dir.to_str().unwrap(), &options).unwrap())
}

/// Every request of all tasks, at 0 and at 5 shots, character for character.
#[test]
fn requests_are_those_of_the_harness() {
    #[derive(Deserialize)]
    struct Stored {
        doc_id: usize,
        context: String,
        continuations: Vec<String>,
    }
    let Some(data) = kobest() else { return };
    for (task, n) in Task::ALL.into_iter().zip([1404, 1000, 500, 397, 1260]) {
        let gold: Vec<usize> = json(&data.join(format!("lmeval_requests/{task}.gold.json")));
        for shots in [0, 5] {
            let stored: Vec<Stored> = lines(&data.join(format!("lmeval_requests/{task}.{shots}shot.jsonl.gz")));
            let documents = eval::documents(&data, task, shots, None, 1234).unwrap();
            assert_eq!((documents.len(), stored.len()), (n, n), "{task}");
            for ((d, s), gold) in documents.iter().zip(&stored).zip(&gold) {
                assert_eq!((d.doc_id, &d.context), (s.doc_id, &s.context), "{task}, {shots} shots");
                assert_eq!(d.continuations(), s.continuations, "{task} {}", d.doc_id);
                assert_eq!(d.gold, *gold, "{task} {}", d.doc_id);
            }
        }
    }
}

/// Token ids of contexts and continuations with the tokenizer of Llama 3, which merges where SmolLM2's does not.
#[test]
fn token_boundaries_are_those_of_the_harness() {
    #[derive(Deserialize)]
    struct Stored {
        context_ids: Vec<u32>,
        continuation_ids: Vec<Vec<u32>>,
    }
    let (Some(data), Some(dir)) = (kobest(), crate::common::data("llama3-tokenizer")) else { return };
    let tokenizer = Tokenizer::from_dir(&dir).unwrap().unwrap();
    for task in Task::ALL {
        for (shots, every) in [(0, 1), (5, 8)] {
            let path = data.join(format!("lmeval_requests/{task}.{shots}shot.llama3_ids.jsonl.gz"));
            let stored: Vec<Stored> = lines(&path);
            let documents = eval::documents(&data, task, shots, None, 1234).unwrap();
            let both: Vec<(&Document, &Stored)> = documents.iter().zip(&stored).step_by(every).collect();
            both.into_par_iter().for_each(|(d, s)| {
                let r = Request::encode(&tokenizer, &d.context, &d.continuations(), false, 128000).unwrap();
                assert_eq!(
                    (&r.context, &r.continuations),
                    (&s.context_ids, &s.continuation_ids),
                    "{task} {}",
                    d.doc_id
                );
            });
        }
    }
}

fn run(engine: &Engine, documents: &[Document], cut: bool) -> Vec<eval::Sample> {
    let mut samples = Vec::new();
    let keep = &mut |_, sample| {
        samples.push(sample);
        Ok(true)
    };
    eval::run(engine, documents, false, cut, keep).unwrap_or_else(|e| panic!("{e}"));
    samples.sort_by_key(|s| (s.task.name(), s.doc_id));
    samples
}

/// SmolLM2 without examples: every log-probability and pick is that of HF in float32.
#[test]
fn smollm2_scores_as_hf() {
    smollm2(8);
}

/// The same for all documents, and therefore for accuracies, standard errors and F1.
#[test]
#[ignore = "takes minutes"]
fn smollm2_is_as_accurate_as_hf() {
    smollm2(100);
}

fn smollm2(n: usize) {
    #[derive(Deserialize)]
    struct Golden {
        tasks: BTreeMap<String, Stored>,
    }
    #[derive(Deserialize)]
    struct Stored {
        acc: f64,
        acc_stderr: f64,
        f1_macro: f64,
        docs: Vec<Doc>,
    }
    #[derive(Deserialize)]
    struct Doc {
        context_ids: Vec<u32>,
        continuation_ids: Vec<Vec<u32>>,
        loglikelihoods: Vec<f64>,
        is_greedy: Vec<bool>,
        pred: usize,
        pred_norm: usize,
    }
    let (Some(data), Some(engine)) = (kobest(), open("smollm2-135m")) else { return };
    let Some(golden) = crate::common::data("smollm2-135m/golden_kobest_0shot.json") else { return };
    for (name, stored) in json::<Golden>(&golden).tasks {
        let task: Task = name.parse().unwrap();
        let documents = eval::documents(&data, task, 0, Some(n), 1234).unwrap();
        let samples = run(&engine, &documents, false);
        assert_eq!(samples.len(), n, "{task}");
        for ((s, want), d) in samples.iter().zip(&stored.docs).zip(&documents) {
            let r = Request::encode(engine.tokenizer().unwrap(), &d.context, &d.continuations(), false, 1).unwrap();
            assert_eq!((&r.context, &r.continuations), (&want.context_ids, &want.continuation_ids), "{task}");
            for (ours, theirs) in s.logprobs.iter().zip(&want.loglikelihoods) {
                assert!((ours - theirs).abs() < 1e-5 * theirs.abs(), "{task} {}: {ours}, HF {theirs}", s.doc_id);
            }
            let (ours, theirs) = ((s.pred, s.pred_norm, &s.greedy), (want.pred, want.pred_norm, &want.is_greedy));
            assert_eq!(ours, theirs, "{task} {}", s.doc_id);
        }
        if n < stored.docs.len() {
            continue;
        }
        let result = TaskResult::of(task, &samples);
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{task}: {a}, the harness {b}");
        close(result.acc, stored.acc);
        close(result.acc_stderr.unwrap(), stored.acc_stderr);
        close(result.f1, stored.f1_macro);
    }
}

/// stories260K, with and without examples, against what `scripts/lm-eval hf` stored: contexts are cut on the left to its 512
/// tokens as the harness cuts them.
#[test]
fn stories260k_picks_as_the_harness() {
    #[derive(Deserialize)]
    struct Stored {
        shots: usize,
        tasks: BTreeMap<String, Scores>,
    }
    #[derive(Deserialize)]
    struct Scores {
        acc: f64,
        acc_stderr: f64,
        f1: f64,
        acc_norm: Option<f64>,
        acc_norm_stderr: Option<f64>,
        logprobs: Vec<Vec<f64>>,
    }
    let (Some(data), Some(engine)) = (kobest(), open("stories260K")) else { return };
    let stored: Vec<Stored> = serde_json::from_str(include_str!("kobest_stories260k.json")).unwrap();
    assert_eq!(stored.iter().map(|s| s.shots).collect::<Vec<_>>(), [0, 5]);
    for s in stored {
        assert_eq!(s.tasks.len(), 5);
        for (name, want) in s.tasks {
            let task: Task = name.parse().unwrap();
            let documents = eval::documents(&data, task, s.shots, Some(want.logprobs.len()), 1234).unwrap();
            let samples = run(&engine, &documents, true);
            let mut ties = 0;
            for (sample, theirs) in samples.iter().zip(&want.logprobs) {
                for (ours, theirs) in sample.logprobs.iter().zip(theirs) {
                    assert!((ours - theirs).abs() < 1e-4 * theirs.abs(), "{task} {}: {ours}, {theirs}", sample.doc_id);
                }
                let mut order = theirs.clone();
                order.sort_by(|a, b| b.total_cmp(a));
                let pick = theirs.iter().position(|x| *x == order[0]).unwrap();
                ties += usize::from(order[0] == order[1]);
                assert_eq!(sample.pred, pick, "{task} {}, {} shots: {theirs:?}", sample.doc_id, s.shots);
            }
            assert_eq!(ties, 0, "{task}: the picks of ties prove nothing");
            let ours = TaskResult::of(task, &samples);
            let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{task}, {} shots: {a}, {b}", s.shots);
            close(ours.acc, want.acc);
            close(ours.acc_stderr.unwrap(), want.acc_stderr);
            close(ours.f1, want.f1);
            assert_eq!(ours.acc_norm.is_some(), want.acc_norm.is_some());
            close(ours.acc_norm.unwrap_or(0.0), want.acc_norm.unwrap_or(0.0));
            close(ours.acc_norm_stderr.unwrap_or(0.0), want.acc_norm_stderr.unwrap_or(0.0));
        }
    }
}
