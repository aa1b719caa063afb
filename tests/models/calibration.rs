//! Quantizing with a calibration text: predictions come nearer to those of the model in bf16, on another text than that one. What it
//! does for a larger model is in docs/formats.md, measured by scripts/quantize-table.

use aoji::{
    Device, Engine, ModelFiles, Options, calibration, divergence,
    quantize::{self, Inputs},
};
use std::{fs, path::Path};

fn files(model: &str) -> ModelFiles {
    ModelFiles::open(model).unwrap()
}

/// Mean divergences of a model in this format from itself in bf16 on `text`: quantized without inputs, and with them.
fn divergences(model: &str, format: &str, inputs: &Inputs, text: &str) -> [f64; 2] {
    let open = |quantize| {
        let options = Options { device: Device::Cpu, context: Some(512), quantize, ..Options::default() };
        Engine::load(files(model), &options, &mut |_, _| {}).unwrap()
    };
    let base = open(None);
    let tokens = files(model).tokenizer.unwrap().encode(text, true).unwrap();
    let of = |inputs: &Inputs| {
        let options = quantize::Options { inputs: inputs.clone(), ..format.parse().unwrap() };
        let engine = open(Some(options));
        divergence::divergence(&engine, &base, &tokens, 512, &mut |_, _| true).unwrap().unwrap().mean_kl
    };
    let found = [of(&Inputs::default()), of(inputs)];
    println!("{model}: {format}: {:.5} without, {:.5} with inputs of {} tokens", found[0], found[1], tokens.len());
    found
}

/// Questions and answers that the demo model knows: every second one to calibrate with, others to compare on.
#[test]
fn the_demo_comes_nearer_with_a_calibration() {
    let lines = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo/questions.jsonl")).unwrap();
    let part = |odd: usize| {
        let lines = lines.lines().enumerate().filter(|(i, _)| i % 8 == odd).map(|(_, line)| line);
        lines.take(40).collect::<Vec<_>>().join("\n")
    };
    let inputs = calibration::calibrate(&files("demo"), &[part(1)], Device::Cpu, None, &mut |_, _| {}).unwrap();
    let [without, with] = divergences("demo", "q4_k", &inputs, &part(4));
    assert!(with < without, "{with}, and {without} without a calibration");
}
