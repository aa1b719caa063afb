//! Real models, compared with Hugging Face transformers in float32.
//!
//! The expected values are in `golden.json` of the test data, made by HF in float32. The comparison is teacher-forced (each step gets HF's
//! token): HF's own bf16 and f32 texts differ on half of the prompts within 64 tokens, so free-running text proves nothing.
//! `aoji::verify::Limits` says how each limit was found.

use aoji::{
    Activations, Device, Engine, GenerateOptions, Options,
    verify::{self, Limits},
};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

fn open(dir: PathBuf, activations: Activations) -> Engine {
    let options = Options { device: Device::Cpu, activations, ..Options::default() };
    Engine::open(dir.to_str().expect("a UTF-8 path"), &options).unwrap_or_else(|e| panic!("{e}"))
}

/// The goldens with texts cut to their first `n` tokens: no log-probability depends on the tokens after it.
pub fn cut(golden: &Path, n: usize) -> Value {
    let mut golden: Value = serde_json::from_str(&fs::read_to_string(golden).unwrap()).unwrap();
    for text in golden["scores"].as_array_mut().unwrap() {
        text["ids"].as_array_mut().unwrap().truncate(n);
        let logprobs = text["token_logprobs"].as_array_mut().unwrap();
        if logprobs.len() >= n {
            logprobs.truncate(n - 1);
            let sum: f64 = logprobs.iter().map(|l| l.as_f64().unwrap()).sum();
            text["ppl"] = (-sum / (n - 1) as f64).exp().into();
        }
    }
    golden
}

/// All of the goldens in f32; of a long text in bf16, which is slower, the beginning.
fn compare(model: &str, activations: Activations, limits: Limits) {
    let (Some(dir), Some(mut golden)) =
        (crate::common::model(model), crate::common::data(&format!("{model}/golden.json")))
    else {
        return;
    };
    let short = tempfile::NamedTempFile::new().unwrap();
    if activations == Activations::Bf16 {
        fs::write(&short, cut(&golden, 300).to_string()).unwrap();
        golden = short.path().to_path_buf();
    }
    let report = verify::verify(&open(dir, activations), &golden, &mut |_, _| {}).unwrap_or_else(|e| panic!("{e}"));
    println!("{report}");
    report.verdict(&limits).unwrap_or_else(|e| panic!("{e}\n{report}"));
    assert!(report.steps > 100 && report.scored > 20, "too little was compared");
}

#[test]
fn stories260k_in_f32() {
    compare("stories260K", Activations::F32, Limits::F32);
}

#[test]
fn stories260k_in_bf16() {
    compare("stories260K", Activations::Bf16, Limits::BF16);
}

#[test]
fn smollm2_in_f32() {
    compare("smollm2-135m", Activations::F32, Limits::F32);
}

#[test]
fn smollm2_in_bf16() {
    compare("smollm2-135m", Activations::Bf16, Limits::BF16);
}

/// Free-running greedy text in f32 equals HF's, token for token.
#[test]
fn greedy_tokens_are_those_of_hf() {
    for model in ["stories260K", "smollm2-135m"] {
        let (Some(dir), Some(path)) =
            (crate::common::model(model), crate::common::data(&format!("{model}/golden.json")))
        else {
            return;
        };
        let golden: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        let engine = open(dir, Activations::F32);
        let ids =
            |v: &Value| -> Vec<u32> { v.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect() };
        for case in golden["cases"].as_array().unwrap() {
            let (prompt, want) = (ids(&case["prompt_ids"]), ids(&case["generated_ids"]));
            let mut session = engine.session(prompt.len() + want.len()).unwrap();
            let options = GenerateOptions { max_tokens: Some(want.len()), ignore_eos: true, ..Default::default() };
            let got: Vec<u32> = session
                .generate(&prompt, &options)
                .unwrap()
                .filter_map(|e| match e.unwrap() {
                    aoji::Event::Token(t) => Some(t),
                    _ => None,
                })
                .collect();
            assert_eq!(got, want, "{model}: {}", case["prompt"]);
        }
    }
}
