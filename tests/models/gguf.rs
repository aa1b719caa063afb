//! The GGUF file that SmolLM2's test data is made from, and others made from it, against Hugging Face directories of their weights.
//!
//! `scripts/test-data` puts `NAME.gguf` and `NAME/`, its dequantized f32 weights as the package `gguf` has them, into
//! `target/test-data/smollm2-135m-gguf`.

use aoji::{Activations, Device, Engine, Message, ModelFiles, Options, Tokenizer};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Every GGUF file and the directory of its weights.
fn pairs() -> Vec<(PathBuf, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-data/smollm2-135m-gguf");
    let files = fs::read_dir(&root).into_iter().flatten().flatten().map(|e| e.path());
    let files = files.filter(|p| p.extension().is_some_and(|e| e == "gguf"));
    let pairs: Vec<_> = files.map(|p| (p.clone(), p.with_extension(""))).filter(|(_, hf)| hf.is_dir()).collect();
    if pairs.is_empty() {
        println!("skipped: no {} (scripts/test-data makes it)", root.display());
    }
    pairs
}

fn logits(path: &Path, tokens: &[u32]) -> Vec<f32> {
    let options = Options { device: Device::Cpu, activations: Activations::F32, ..Options::default() };
    let engine = Engine::open(path.to_str().unwrap(), &options).unwrap_or_else(|e| panic!("{e}"));
    let mut session = engine.session(tokens.len() + 1).unwrap();
    session.sync(tokens).unwrap();
    session.logits().unwrap().to_vec()
}

#[test]
fn logits_are_those_of_the_dequantized_weights() {
    for (gguf, hf) in pairs() {
        let files = ModelFiles::open(gguf.to_str().unwrap()).unwrap();
        let tokens = files.tokenizer.unwrap().encode("The capital of South Korea is", true).unwrap();
        let (ours, theirs) = (logits(&gguf, &tokens), logits(&hf, &tokens));
        let worst = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        println!("{}: logits differ by at most {worst:e}", gguf.display());
        assert!(worst <= 1e-4, "{}: {worst:e}", gguf.display());
    }
}

#[test]
fn tokens_and_template_are_hugging_faces() {
    let Some(hf) = crate::common::model("smollm2-135m") else { return };
    let theirs = ModelFiles::open(hf.to_str().unwrap()).unwrap();
    let texts: Vec<String> = ["golden.json", "golden_kobest_0shot.json"]
        .iter()
        .filter_map(|name| crate::common::data(&format!("smollm2-135m/{name}")))
        .flat_map(|path| {
            let mut texts = Vec::new();
            strings(&serde_json::from_slice(&fs::read(path).unwrap()).unwrap(), &mut texts);
            texts
        })
        .collect();
    for (gguf, _) in pairs() {
        let ours = ModelFiles::open(gguf.to_str().unwrap()).unwrap();
        assert_eq!((ours.config.bos, &ours.config.eos), (theirs.config.bos, &theirs.config.eos));
        let (a, b): (&Tokenizer, &Tokenizer) = (ours.tokenizer.as_ref().unwrap(), theirs.tokenizer.as_ref().unwrap());
        assert_eq!((a.vocab(), a.bos()), (b.vocab(), b.bos()));
        for text in &texts {
            assert_eq!(a.encode(text, true).unwrap(), b.encode(text, true).unwrap(), "{text:?}");
        }
        let messages = [Message::new("user", "2 + 2?")];
        assert_eq!(ours.template.render(&messages, None).unwrap(), theirs.template.render(&messages, None).unwrap());
    }
}

/// Every string in a JSON value.
fn strings(value: &Value, out: &mut Vec<String>) {
    match value {
        Value::String(text) => out.push(text.clone()),
        Value::Array(list) => list.iter().for_each(|v| strings(v, out)),
        Value::Object(map) => map.values().for_each(|v| strings(v, out)),
        _ => {}
    }
}
