//! Training, compared with torch and PEFT, and with itself.

#[path = "../common/mod.rs"]
mod common;

use aoji::{
    Activations, Device, Engine, ModelFiles, Options, Result,
    train::{Line, TuneConfig, TuneEvent, Tuner},
};
use serde_json::{Value, json};
use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/train/golden").join(name)
}

/// A run on the tiny model of the goldens, with the rows in their order.
fn tiny(out: &Path, change: &Value) -> Value {
    let mut config = json!({
        "base_model": golden("tiny"), "adapter": "lora", "lora_model_dir": golden("begin"), "lora_r": 4, "lora_alpha": 8,
        "lora_target_linear": true, "datasets": [{ "path": golden("rows.jsonl") }], "sequence_len": 32, "curriculum_sampling": true,
        "learning_rate": 0.01, "gradient_accumulation_steps": 2, "micro_batch_size": 2, "output_dir": out,
    });
    change.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
    config
}

fn open(config: &Value) -> Result<Tuner> {
    Tuner::open(TuneConfig::new(Path::new("run.yml"), config.as_object().unwrap().clone())?)
}

/// A run on this many threads, to the end; returns the lines of its log without times, and the bytes of its adapter.
fn run(config: &Value, threads: usize) -> Result<(Vec<Line>, Vec<u8>)> {
    let outcome = open(config)?.run(NonZeroUsize::new(threads), &mut |_| true)?;
    assert!(outcome.finished);
    Ok(result(&outcome.dir))
}

fn result(dir: &Path) -> (Vec<Line>, Vec<u8>) {
    let text = fs::read_to_string(dir.join("train.jsonl")).unwrap();
    let line = |l| Line { seconds: 0.0, ..serde_json::from_str(l).unwrap() };
    (text.lines().map(line).collect(), fs::read(dir.join("adapter_model.safetensors")).unwrap())
}

fn numbers(v: &Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn close(name: &str, got: Option<f64>, want: &Value, relative: f64) {
    let (got, want) = (got.unwrap(), want.as_f64().unwrap());
    assert!((got - want).abs() <= relative * want.abs(), "{name}: {got}, torch has {want}");
}

/// Checks that the loss is within 1e-5 of torch's, and the length of the gradient within 1e-4.
fn against(steps: &Value, lines: &[Line], name: &str) {
    assert_eq!(lines.len(), steps.as_array().unwrap().len(), "{name}");
    for (i, (line, want)) in lines.iter().zip(steps.as_array().unwrap()).enumerate() {
        close(&format!("{name}, loss of step {i}"), line.loss, &want["loss"], 1e-5);
        close(&format!("{name}, gradient of step {i}"), line.grad_norm, &want["grad_norm"], 1e-4);
        close(&format!("{name}, rate of step {i}"), line.learning_rate, &want["learning_rate"], 1e-12);
    }
}

/// The factors of an adapter's file by half and number of the matrix, as the goldens name them.
fn factors(bytes: &[u8]) -> Vec<(String, Vec<f64>)> {
    const TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
    let factor = |(name, tensor): (String, safetensors::tensor::TensorView<'_>)| {
        let parts: Vec<&str> = name.split('.').collect();
        let layer: usize = parts[4].parse().unwrap();
        let half = if name.contains("lora_A") { "A" } else { "B" };
        let target = TARGETS.iter().position(|t| *t == parts[6]).unwrap();
        let values = tensor.data().chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())));
        (format!("{half}{}", layer * 7 + target), values.collect())
    };
    let mut factors: Vec<_> = file.tensors().into_iter().map(factor).collect();
    factors.sort_by(|a, b| a.0.cmp(&b.0));
    factors
}

#[test]
fn three_steps_are_those_of_torch_and_peft() {
    let goldens: Value = serde_json::from_str(&fs::read_to_string(golden("tiny.json")).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (name, case) in goldens.as_object().unwrap() {
        let (lines, adapter) = run(&tiny(&dir.path().join(name), &case["config"]), 2).unwrap();
        against(&case["steps"], &lines, name);
        let factors = factors(&adapter);
        assert_eq!(factors.len(), case["adapter"].as_object().unwrap().len());
        for (factor, got) in factors {
            let want = numbers(&case["adapter"][&factor]);
            let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
            let off = norm(&mut got.iter().zip(&want).map(|(g, w)| g - w));
            let size = norm(&mut want.iter().copied());
            assert!(off < 1e-4 * size, "{name}: {factor} is {off} from torch's of length {size}");
        }
    }
}

#[test]
fn smollm2_trains_as_with_torch_and_peft() {
    let Some(model) = common::model("smollm2-135m") else { return };
    let golden: Value = serde_json::from_str(&fs::read_to_string(golden("smollm2.json")).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let rows: Vec<String> = golden["rows"].as_array().unwrap().iter().map(|r| r.to_string()).collect();
    fs::write(dir.path().join("rows.jsonl"), rows.join("\n")).unwrap();
    let mut config = tiny(&dir.path().join("out"), &golden["config"]);
    let own = json!({ "base_model": model, "lora_model_dir": null, "lora_r": 16, "lora_alpha": 32, "sequence_len": 128,
        "datasets": [{ "path": dir.path().join("rows.jsonl") }] });
    own.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
    let (lines, adapter) = run(&config, 2).unwrap();
    against(&golden["steps"], &lines, "SmolLM2");
    for (name, values) in factors(&adapter) {
        let norm = values.iter().map(|x| x * x).sum::<f64>().sqrt();
        // B began at 0: where its gradient is near AdamW's epsilon, an update is as large as that of any other, and of either sign
        close(&name, Some(norm), &golden["norms"][&name], 1e-3);
    }
}

#[test]
fn the_same_bits_on_any_threads_and_whether_kept_or_computed_again() {
    let dir = tempfile::tempdir().unwrap();
    for (bf16, dropout) in [(false, 0.2), (true, 0.1)] {
        let of = |name: &str, threads, recompute: bool| {
            let change = json!({ "bf16": bf16, "lora_dropout": dropout, "gradient_checkpointing": recompute });
            run(&tiny(&dir.path().join(format!("{name}{bf16}")), &change), threads).unwrap()
        };
        let one = of("one", 1, false);
        assert_eq!(one, of("three", 3, false));
        assert_eq!(one, of("again", 2, true));
    }
}

#[test]
fn bf16_is_near_f32() {
    let dir = tempfile::tempdir().unwrap();
    let of = |bf16: bool| run(&tiny(&dir.path().join(bf16.to_string()), &json!({ "bf16": bf16 })), 2).unwrap().0;
    for (a, b) in of(true).iter().zip(of(false)) {
        let (a, b) = (a.loss.unwrap(), b.loss.unwrap());
        assert!(a != b && (a - b).abs() < 0.02 * b, "{a} {b}");
    }
}

/// One step of twelve rows: in micro-batches of one row, of two, of all, and packed.
#[test]
fn accumulated_together_and_packed_are_the_same_step() {
    let dir = tempfile::tempdir().unwrap();
    let of = |rows: usize, parts: usize, packing: bool| {
        let change =
            json!({ "micro_batch_size": rows, "gradient_accumulation_steps": parts, "sample_packing": packing });
        let (lines, adapter) = run(&tiny(&dir.path().join(format!("{rows} {parts} {packing}")), &change), 2).unwrap();
        assert_eq!(lines.len(), 1);
        (lines[0].loss.unwrap(), lines[0].grad_norm.unwrap(), factors(&adapter))
    };
    let (loss, norm, one) = of(1, 12, false);
    for (rows, parts, packing) in [(2, 6, false), (12, 1, false), (12, 1, true), (2, 12, true)] {
        let (l, n, other) = of(rows, parts, packing);
        assert!(
            (l / loss - 1.0).abs() < 1e-5 && (n / norm - 1.0).abs() < 1e-5,
            "{rows} x {parts}: {l} {n}, {loss} {norm}"
        );
        for ((name, a), (_, b)) in one.iter().zip(&other) {
            // the first update of Adam is the sign of the gradient: it may differ where that is nearly 0
            let off = a.iter().zip(b).filter(|(a, b)| (*a - *b).abs() > 1e-3).count();
            assert!(off <= a.len() / 50, "{name}: {off} of {} differ, {rows} x {parts}", a.len());
        }
    }
}

#[test]
fn a_run_that_stops_and_goes_on_has_the_bits_of_one_that_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let change = |extra: Value| {
        let mut change = json!({ "num_epochs": 3, "gradient_accumulation_steps": 4, "curriculum_sampling": false, "lora_dropout": 0.1,
            "logging_steps": 2, "lora_model_dir": null, "val_set_size": 2, "eval_steps": 3, "warmup_ratio": 0.2 });
        extra.as_object().unwrap().iter().for_each(|(key, value)| change[key] = value.clone());
        change
    };
    let whole = run(&tiny(&dir.path().join("whole"), &change(json!({}))), 2).unwrap();
    let out = dir.path().join("parts");
    for stop in [1, 3, 4] {
        let resume = change(json!({ "resume_from_checkpoint": stop > 1, "save_steps": 2 }));
        let mut saved = Vec::new();
        let event = &mut |event: TuneEvent<'_>| {
            if let TuneEvent::Saved(dir) = event {
                saved.push(dir.to_path_buf());
            }
            !matches!(event, TuneEvent::Step(step, _) if step >= stop)
        };
        let outcome = open(&tiny(&out, &resume)).unwrap().run(None, event).unwrap();
        assert!(!outcome.finished && outcome.step == stop && saved.contains(&out.join(format!("checkpoint-{stop}"))));
    }
    // what a killed process leaves does not count
    fs::create_dir(out.join("checkpoint-5")).unwrap();
    fs::write(out.join("checkpoint-5/optimizer.safetensors.incomplete"), "half").unwrap();
    let resumed = run(&tiny(&out, &change(json!({ "resume_from_checkpoint": true }))), 1).unwrap();
    assert_eq!(resumed.0, whole.0);
    assert!(resumed.1 == whole.1, "the adapters differ");

    let error =
        |extra| open(&tiny(&out, &change(extra))).and_then(|t| t.run(None, &mut |_| true)).unwrap_err().to_string();
    assert!(error(json!({})).contains("has a run already"));
    let other = error(json!({ "resume_from_checkpoint": true, "learning_rate": 0.02 }));
    assert!(other.contains("learning_rate was 0.01 and is now 0.02"), "{other}");
}

/// A model with the adapter added to its weights says what the adapter was trained to say beside them.
#[test]
fn merged_is_the_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let change = json!({ "val_set_size": 1, "num_epochs": 4, "seed": 9 });
    let tuner = open(&tiny(&out, &change)).unwrap();
    let row = tuner.eval.examples[0].clone();
    tuner.run(None, &mut |_| true).unwrap();
    let loss = result(&out).0.iter().rev().find_map(|l| l.eval_loss).unwrap();
    let mut files = ModelFiles::open(golden("tiny").to_str().unwrap()).unwrap();
    files.add_lora(&out.to_str().unwrap().parse().unwrap()).unwrap();
    let options = Options { device: Device::Cpu, activations: Activations::F32, ..Options::default() };
    let engine = Engine::load(files, &options, &mut |_, _| {}).unwrap();
    let first = row.learned.iter().position(|l| *l).unwrap();
    let score = engine.score(&row.ids[..first], &[&row.ids[first..]]).unwrap();
    let merged = -score.continuations[0].sum() / (row.ids.len() - first) as f64;
    assert!((merged / loss - 1.0).abs() < 1e-5, "merged {merged}, beside the weights {loss}");
}

/// Tokens after the last label change nothing, and the loss of learned rows goes down.
#[test]
fn only_what_leads_to_a_label_counts() {
    let dir = tempfile::tempdir().unwrap();
    let of = |last: u32, steps: usize| {
        let file = dir.path().join(format!("{last}.jsonl"));
        fs::write(&file, json!({ "input_ids": [5, 6, 7, last], "labels": [-100, 6, 7, -100] }).to_string()).unwrap();
        let change = json!({ "datasets": [{ "path": file }], "max_steps": steps });
        run(&tiny(&dir.path().join(format!("{last} {steps}")), &change), 2).unwrap()
    };
    assert_eq!(of(8, 1).1, of(9, 1).1);
    let lines = of(8, 20).0;
    assert!(lines[19].loss.unwrap() < 0.1 * lines[0].loss.unwrap(), "{lines:?}");
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let rows = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        json!({ "datasets": [{ "path": path }] })
    };
    let fails = |change: Value, want: &str| {
        let error = run(&tiny(&dir.path().join("out"), &change), 1).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
        assert!(!dir.path().join("out/adapter_model.safetensors").exists());
    };
    fails(rows("empty", "\n"), "there is nothing to learn: the files have no rows");
    fails(rows("masked", r#"{"input_ids": [5, 6], "labels": [-100, -100]}"#), "no token of it is learned");
    fails(rows("short", r#"{"input_ids": [5], "labels": [5]}"#), "too few");
    fails(rows("beyond", r#"{"input_ids": [5, 64], "labels": [5, 64]}"#), "line 1: token 64 is none of the model's 64");
    fails(rows("text", "{\"input_ids\": [5, 6], \"labels\": [5, 6]}\nhello"), "line 2 is no JSON");
    fails(json!({ "sequence_len": 65 }), "the model was made for 64");
    fails(json!({ "lora_r": 8 }), "has rank 4");
    fails(json!({ "datasets": [{ "path": golden("rows.jsonl"), "type": "alpaca" }] }), "no tokenizer.json");
    let broken = dir.path().join("broken");
    fs::create_dir(&broken).unwrap();
    fs::copy(golden("begin/adapter_config.json"), broken.join("adapter_config.json")).unwrap();
    let mut bytes = fs::read(golden("begin/adapter_model.safetensors")).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(broken.join("adapter_model.safetensors"), bytes).unwrap();
    fails(
        json!({ "lora_model_dir": broken }),
        "the loss is NaN in step 1: the first number that is not finite is in layer 1",
    );
}
