//! Models with fewer bits: written, run, and compared with the models from which they were made.

use super::{aoji, generate, short};
use std::{fs, path::Path};

#[test]
fn quantized_models_answer_and_are_compared() {
    let (place, (question, answer)) = (tempfile::tempdir().unwrap(), short(20));
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    let demo = demo.to_str().unwrap();
    let text = place.path().join("text.txt");
    fs::write(&text, format!("{question} {answer}").repeat(3)).unwrap();
    let mut kls = Vec::new();
    for (format, name, more) in [
        ("q8_0", "m-q8.gguf", &[][..]),
        ("q4_0", "m-q4.gguf", &["--ignore", "down_proj"]),
        ("int4", "m-int4", &["--group", "64"]),
        ("fp8", "m-fp8", &[]),
    ] {
        let out = place.path().join(name);
        let out = out.to_str().unwrap();
        let run = |force: &[&str]| aoji(&[&["quantize", demo, out, "--format", format], more, force].concat());
        assert_eq!(run(&[]).ok(), format!("{out}\n"));
        run(&[]).fails(1, &[if format.starts_with('q') { "is there already" } else { "is not empty" }]);
        let report = run(&["--force", "--json"]).json();
        assert_eq!(report["matrices"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum::<u64>(), 22);
        if format == "q8_0" {
            assert_eq!(generate(&["-m", out, &question]).ok(), format!("{answer}\n"));
        }
        let against = ["verify", out, "--device", "cpu", "--against", "demo", "--text", text.to_str().unwrap()];
        let found = aoji(&[&against[..], &["--json", "--window", "64"]].concat()).json();
        assert!(found["same_top"].as_f64() > Some(0.5) && found["tokens"].as_u64() > Some(50), "{format}: {found}");
        assert!(found["mean_kl"].as_f64() <= found["p99_kl"].as_f64(), "{found}");
        kls.push(found["mean_kl"].as_f64().unwrap());
        if format == "fp8" {
            let said = aoji(&against).ok();
            for word in ["m-fp8 against demo", "divergence", "99th percentile", "most likely one", "perplexity"] {
                assert!(said.contains(word), "no {word:?} in: {said}");
            }
        }
    }
    assert!(kls[0] < kls[1] && kls[3] < kls[2] && kls[0] > 0.0, "8 bits are nearer than 4: {kls:?}");
    let mut left: Vec<_> = fs::read_dir(place.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["m-fp8", "m-int4", "m-q4.gguf", "m-q8.gguf", "text.txt"]);
}

/// Keys and values of fewer bits: the demo still knows its answer, no bit depends on what it must not, and what is lost is measured.
#[test]
fn a_cache_of_fp8() {
    let (place, (question, answer)) = (tempfile::tempdir().unwrap(), short(20));
    assert_eq!(generate(&["--kv", "fp8", &question]).ok(), format!("{answer}\n"));
    let invariant = ["verify", "demo", "--device", "cpu", "--kv", "fp8", "--invariance", "--prompt", "40", "--json"];
    assert_eq!(aoji(&invariant).json()["passed"].as_bool(), Some(true));
    let text = place.path().join("text.txt");
    fs::write(&text, format!("{question} {answer}").repeat(3)).unwrap();
    let text = text.to_str().unwrap();
    let against = ["verify", "demo", "--device", "cpu", "--against", "demo", "--text", text, "--json"];
    let kl = |more: &[&str]| aoji(&[&against[..], more].concat()).json()["mean_kl"].as_f64().unwrap();
    let (same, fp8) = (kl(&[]), kl(&["--kv", "fp8"]));
    assert!(same == 0.0 && fp8 > 0.0 && fp8 < 0.02, "{same} and {fp8}");
}

/// A calibration text in both forms gives the same file, another one than without.
#[test]
fn a_calibration_text() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_str().unwrap().to_string();
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    let demo = assets.to_str().unwrap();
    let questions = fs::read_to_string(assets.join("questions.jsonl")).unwrap();
    let part = questions.lines().step_by(9).take(40).collect::<Vec<_>>().join("\n");
    fs::write(path("text.txt"), &part).unwrap();
    fs::write(path("text.jsonl"), format!("{}\n\n", serde_json::json!({"text": part}))).unwrap();
    let run = |out: &str, more: &[&str]| {
        let out = path(out);
        let args = ["quantize", demo, &out, "--format", "q4_0", "--json"];
        aoji(&[&args[..], more].concat()).json();
        fs::read(out).unwrap()
    };
    let (text, jsonl) = (path("text.txt"), path("text.jsonl"));
    let plain = run("plain.gguf", &[]);
    let calibrated = run("text.gguf", &["--calibration", &text, "--device", "cpu"]);
    let lines = run("jsonl.gguf", &["--calibration", &jsonl, "--jsonl", "--device", "cpu", "--threads", "1"]);
    assert!(calibrated == lines, "the same text, another file");
    assert!(calibrated.len() == plain.len() && calibrated != plain, "the text changes nothing, or the size");
    let ids = ["--tokens", "5,6,7", "--max-tokens", "4", "-m"];
    assert_eq!(
        generate(&[&ids[..], &[&path("text.gguf"), "--json"]].concat()).json()["token_ids"].as_array().unwrap().len(),
        4
    );

    fs::write(path("short.txt"), "하늘은 왜 파란가?").unwrap();
    fs::write(path("empty.txt"), "").unwrap();
    let out = path("m.gguf");
    let quantize = |model: &str, more: &[&str]| aoji(&[&["quantize", model, &out, "--format", "q4_0"], more].concat());
    let fails =
        |text: &str, words: &[&str]| quantize(demo, &["--device", "cpu", "--calibration", &path(text)]).fails(1, words);
    fails("short.txt", &["tokens: at least 256"]);
    fails("empty.txt", &["tokens: at least 256"]);
    fails("none.txt", &["none.txt"]);
    quantize(demo, &["--device", "cpu", "--jsonl", "--calibration", &text]).fails(1, &["line 1", "\"text\""]);
    quantize(&path("plain.gguf"), &["--calibration", &text]).fails(1, &["is a GGUF file", "made from"]);
    quantize(demo, &["--device", "cpu"]).fails(2, &["--calibration"]);
    assert!(!Path::new(&out).exists());
}

#[test]
fn what_quantize_is_told_wrongly() {
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name).to_str().unwrap().to_string();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    let quantize = |out: &str, more: &[&str]| aoji(&[&["quantize", demo.to_str().unwrap(), out], more].concat());
    quantize(&path("m"), &["--format", "q4_k"]).fails(1, &["--format writes a file: NAME.gguf"]);
    quantize(&path("m.gguf"), &["--format", "int8"]).fails(1, &["--format writes a directory"]);
    quantize(&path("m.gguf"), &["--format", "q5_k_m"]).fails(2, &["expected q8_0, q4_0, q4_k, q6_k, int8, int4, fp8"]);
    quantize(&path("m.gguf"), &["--format", "q4_k", "--group", "32"]).fails(2, &["--group is for int4 and int8"]);
    quantize(&path("m"), &["--format", "int4"]).fails(1, &["multiples of 128", "704 columns"]);
    aoji(&["verify", "demo", "--against", "demo"]).fails(2, &["--text"]);
    aoji(&["verify", "demo", "--text", "x"]).fails(2, &["--against"]);
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
}
