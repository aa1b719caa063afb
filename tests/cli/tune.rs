//! Training and the preparation of its rows.

use super::{Run, aoji, generate};
use serde_json::{Value, json};
use std::{fs, path::Path};

const DEMO: &str = "examples/tune/demo.yml";

/// Tests run in the directory of the package, and the paths of the example are relative to it.
fn tune(args: &[&str]) -> Run {
    aoji(&[&["tune", DEMO], args].concat())
}

#[test]
fn the_example_teaches_the_demo_model_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let set = format!("output_dir={}", out.display());
    let run = tune(&["--set", &set]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert_eq!(run.stdout, format!("{}\n", out.display()));
    assert!(run.stderr.contains("12 rows (0 kept apart, 0 dropped)"), "{}", run.stderr);
    let question = ["--question", "별빛제과는 몇 시에 열어?"];
    let learned = "별빛제과는 아침 일곱 시에 문을 열어요.\n";
    assert_ne!(generate(&question).ok(), learned);
    assert_eq!(generate(&[&question[..], &["--lora", out.to_str().unwrap()]].concat()).ok(), learned);
    let svg = fs::read_to_string(out.join("loss.svg")).unwrap();
    assert!(roxmltree::Document::parse(&svg).is_ok() && svg.contains("Loss by step"), "{svg}");
    let lines: Vec<Value> =
        fs::read_to_string(out.join("train.jsonl")).unwrap().lines().map(|l| l.parse().unwrap()).collect();
    assert!(
        lines.iter().all(|l| l["loss"].is_f64() && l["learning_rate"].is_f64() && l["grad_norm"].is_f64()),
        "{lines:?}"
    );
    tune(&["--set", &set]).fails(1, &["has a run already", "resume_from_checkpoint: true"]);
}

#[test]
fn what_a_run_would_be_and_what_it_cannot() {
    let plan = tune(&["--dry-run"]).ok();
    assert!(plan.contains("40 steps of 1 micro-batches") && plan.contains("memory: weights"), "{plan}");
    let keys = aoji(&["tune", "--keys"]).ok();
    assert!(keys.contains("lora_target_linear") && keys.contains("gradient_accumulation_steps"), "{keys}");
    tune(&["--device", "cuda"]).fails(1, &["a GPU trains in bf16: set bf16: true"]);
    tune(&["--set", "lora_rank=4"]).fails(1, &["lora_rank", "no such key", "--keys"]);
    tune(&["--set", "load_in_4bit=true"]).fails(1, &["load_in_4bit"]);
    tune(&["--set", "lora_r"]).fails(1, &["expected KEY=VALUE"]);
    aoji(&["tune", "examples/tune/absent.yml"]).fails(1, &["absent.yml"]);
}

fn rows(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|l| l.parse().unwrap()).collect()
}

/// Small files of the shapes of the card's three data sets.
#[test]
fn the_cards_data() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let write = |name: &str, rows: Vec<Value>| {
        fs::write(file(name), rows.iter().map(|r| format!("{r}\n")).collect::<String>()).unwrap();
    };
    let koalpaca =
        |i: usize| json!({ "instruction": format!("질문 {i}?"), "output": format!("대답 {i}."), "url": "x" });
    write("koalpaca", (0..40).map(koalpaca).collect());
    write("orca", vec![json!({ "id": "1", "instruction": "짧게 답하라.", "input": "왜?", "output": "그래서." })]);
    let chat = "### Human: 하나?### Assistant: 일.### Human: 둘?### Assistant: 이.";
    write("guanaco", vec![json!({ "text": chat }), json!({ "text": "### Human: 혼자?" })]);
    let card = |out: &str, seed: &str| {
        let (k, o, g) = (file("koalpaca"), file("orca"), file("guanaco"));
        let out = file(out);
        aoji(&["data", "card", "--koalpaca", &k, "--orca", &o, "--guanaco", &g, "-o", &out, "--seed", seed])
    };
    let run = card("out.jsonl", "1");
    assert_eq!((run.code, run.stdout), (Some(0), format!("{}\n", file("out.jsonl"))), "{}", run.stderr);
    assert!(run.stderr.contains("42 of 43 rows") && run.stderr.contains("no answer"), "{}", run.stderr);
    let pairs = rows(Path::new(&file("out.jsonl")));
    let with =
        pairs[..40].iter().filter(|p| p["prompt"].as_str().unwrap().contains("당신은 인공지능 비서입니다.")).count();
    assert!((24..40).contains(&with), "{with} of 40 have the instruction");
    assert_eq!(pairs[40]["prompt"], "### Question:\n왜?\n\n### Instruction:\n짧게 답하라.\n\n### Response:\n");
    assert!(
        pairs[41]["prompt"].as_str().unwrap().starts_with("### Question:\n하나?\n\n### Response:\n일.\n\n"),
        "{}",
        pairs[41]
    );
    assert_eq!(pairs[41]["response"], "이.");
    card("same.jsonl", "1");
    card("other.jsonl", "2");
    let read = |name: &str| fs::read(file(name)).unwrap();
    assert!(read("same.jsonl") == read("out.jsonl") && read("other.jsonl") != read("out.jsonl"));

    let svg = file("lengths.svg");
    let preview = aoji(&["data", "preview", &file("out.jsonl"), "--rows", "1", "--ids", "--svg", &svg]).ok();
    assert!(
        preview.contains("»대답 0.") && preview.contains("<|end_of_text|>«"),
        "BOS, answer and EOS are shown: {preview}"
    );
    assert!(preview.contains("--- lengths") && preview.contains("[2046, "), "{preview}");
    assert!(roxmltree::Document::parse(&fs::read_to_string(svg).unwrap()).is_ok());
    let none = aoji(&["data", "alpaca", &file("guanaco"), "-o", &file("none")]);
    assert!(none.code == Some(1) && none.stderr.contains("error: no row is left"), "{}", none.stderr);
    assert!(!Path::new(&file("none")).exists());
    let yml = aoji(&["data", "preview", DEMO, "--rows", "1"]).ok();
    assert!(yml.contains("»별빛제과는 아침 일곱 시에 문을 열어요.") && yml.contains("micro-batches an epoch"), "{yml}");
}
