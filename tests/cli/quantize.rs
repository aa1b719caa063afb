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
