//! The commands that look at the machine: doctor, bench, synth and verify, on the CPU and on the emulated device.
#![cfg(all(feature = "cli", feature = "cuda"))]

mod compare;
mod gpu_check;
mod readme;
mod start;
mod step;
mod timeline;

use ::aoji::{
    Activations, Device, Engine, Options,
    cuda::kernels::{IMAGES, MODULES},
};
use serde_json::{Value, json};
use std::{fs, path::Path, process::Command};

/// The command, without a GPU.
fn aoji(args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_aoji"));
    c.args(args).env("CUDA_VISIBLE_DEVICES", "").env_remove("AOJI_MODEL").env("AOJI_COMMIT", "abc1234");
    c
}

/// The command on the emulated device.
fn emulated(args: &[&str]) -> Command {
    let mut c = aoji(args);
    c.env_remove("CUDA_VISIBLE_DEVICES").env("LD_LIBRARY_PATH", cuda_emulator::library_dir());
    c
}

/// What it prints, when it succeeds.
fn output(mut c: Command) -> String {
    let o = c.output().unwrap();
    let [stdout, stderr] = [&o.stdout, &o.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(o.status.success(), "{c:?}: {stdout}{stderr}");
    stdout.into_owned()
}

/// Its exit code and its message, when it fails.
fn failure(mut c: Command) -> (i32, String) {
    let o = c.output().unwrap();
    assert!(!o.status.success(), "{c:?} succeeded: {}", String::from_utf8_lossy(&o.stdout));
    (o.status.code().unwrap(), String::from_utf8(o.stderr).unwrap())
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn doctor_without_a_gpu() {
    let report = parse(&output(aoji(&["doctor", "--json"])));
    assert_eq!(report["runs_on"], "cpu");
    assert_eq!(report["commit"], "abc1234");
    assert_eq!(report["gpus"], json!([]));
    assert!(report["cpu_threads"].as_u64().unwrap() > 0);
    assert_eq!(report["kernels"]["files"], MODULES.len());
    let problems = report["problems"].as_array().unwrap();
    assert!(!problems.is_empty(), "no GPU is a problem that must be named");
    assert!(problems.iter().all(|p| p["mend"].as_str().is_some_and(|m| !m.is_empty())), "{problems:?}");
    let text = output(aoji(&["doctor"]));
    assert!(text.contains("runs on   cpu") && text.contains("fix: "), "{text}");
}

#[test]
fn doctor_on_the_emulated_device() {
    let report = parse(&output(emulated(&["doctor", "--json"])));
    assert_eq!(report["gpus"][0]["name"], "CUDA emulator");
    assert_eq!(report["gpus"][0]["capability"], "9.0");
    if MODULES.is_empty() {
        return println!("skipped: built without kernels");
    }
    assert_eq!(report["runs_on"], "cuda", "{report}");
    assert!(report["kernels"]["functions"].as_u64().unwrap() >= MODULES.len() as u64);
    assert!(report["gpus"][0]["image"].is_string(), "{report}");
}

#[test]
#[cfg(feature = "server")]
fn bench_of_the_server() {
    let args = ["bench", "--server", "--device", "cpu", "--depth", "5", "--tokens", "4", "--repeat", "2"];
    let run = |extra: &[&str]| output(aoji(&[&args[..], &["--context", "40"], extra].concat()));
    let report = parse(&run(&["--streams", "1,10", "--json"]));
    assert_eq!((&report["prompt_tokens"], &report["tokens"]), (&json!(5), &json!(4)));
    for (row, streams) in report["streams"].as_array().unwrap().iter().zip([1, 10]) {
        assert_eq!((&row["streams"], &row["requests"]), (&json!(streams), &json!(2 * streams)));
        for side in ["http", "engine"] {
            let number = |key: &str| row[side][key].as_f64().unwrap_or_else(|| panic!("{key}: {row}"));
            assert!(0.0 < number("ttft_ms_p50") && number("ttft_ms_p50") <= number("ttft_ms_p99"), "{row}");
            assert!(number("total_ms_p50") >= number("ttft_ms_p50") && number("ms_per_token_p99") > 0.0, "{row}");
        }
        assert!(row["overhead_us_per_token"].is_f64() && row["outside_us_per_token"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["tokens_per_s"].as_f64().unwrap() > 0.0);
    }
    assert!(run(&["--streams", "2"]).contains("HTTP us/token"));
}

#[test]
fn bench_of_a_model_on_the_cpu() {
    let args = ["bench", "--device", "cpu", "--prefill", "1,20,999999", "--depth", "0,9,999999", "--tokens", "3"];
    let run = |extra: &[&str]| output(aoji(&[&args[..], &["--repeat", "2", "--context", "40"], extra].concat()));
    let report = parse(&run(&["--json", "--sequences", "2,3"]));
    assert_eq!((&report["model"]["name"], &report["model"]["context"]), (&json!("demo"), &json!(40)));
    assert_eq!(report["model"]["kv"], "auto");
    assert_eq!((&report["commit"], &report["emulated"]), (&json!("abc1234"), &json!(false)));
    for rate in ["read_gb_per_s", "copy_gb_per_s"] {
        assert!(report["peak"][rate].as_f64().unwrap() > 0.1, "{report}");
    }
    let tokens = |kind: &str| -> Vec<u64> {
        report[kind].as_array().unwrap().iter().map(|r| r["tokens"].as_u64().unwrap()).collect()
    };
    assert_eq!(tokens("prefill"), [1, 20], "what does not fit is left out");
    assert_eq!(tokens("decode"), [0, 9, 40 - 8 - 3], "what does not fit is moved");
    assert_eq!(tokens("together"), [0, 9, 0, 9], "what does not fit is left out");
    assert_eq!([0, 3].map(|i| &report["together"][i]["sequences"]), [2, 3]);
    for (kind, n) in [("prefill", 2), ("decode", 2 * 3), ("together", 2 * 3)] {
        for row in report[kind].as_array().unwrap() {
            let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key}: {row}"));
            assert_eq!(number("n"), f64::from(n));
            assert!(0.0 < number("min_ms") && number("min_ms") <= number("p50_ms"), "{row}");
            assert!(number("p50_ms") <= number("p99_ms") && number("tokens_per_s") > 0.0, "{row}");
            assert!((number("share") * number("p50_ms") / number("floor_ms") - 1.0).abs() < 1e-9, "{row}");
            assert!(number("bytes") > 0.0 && number("flops") > 0.0);
            let over = (number("p50_ms") - number("floor_ms")) * 1e3 / report["model"]["n_layers"].as_f64().unwrap();
            assert!((number("over_floor_us_per_layer") - over).abs() < 1e-6, "{row}");
            assert_eq!(row["medians_ms"].as_array().unwrap().len(), 2, "one of each run: {row}");
            assert_eq!(row.get("host_us"), None, "the CPU is the device");
        }
    }
    let text = run(&[]);
    let starts = |start: &str| text.lines().any(|l| l.starts_with(start));
    assert!(starts("prefill of") && starts("20 ") && starts("decode at") && starts("9 "), "{text}");
}

#[test]
fn bench_of_a_model_on_the_emulated_device() {
    if MODULES.is_empty() {
        return println!("skipped: built without kernels");
    }
    let (_dir, model) = tiny();
    let args = ["bench", "--model", &model, "--prefill", "9", "--depth", "1", "--tokens", "2", "--repeat", "2"];
    let report = parse(&output(emulated(&[&args[..], &["--json"]].concat())));
    assert_eq!((&report["emulated"], &report["peak"]), (&json!(true), &Value::Null), "its rates mean nothing");
    let row = &report["decode"][0];
    assert_eq!((&row["n"], &row["tokens"]), (&json!(4), &json!(1)));
    assert!(row["host_us"].as_f64().is_some_and(|us| us > 0.0 && us < 1e3 * row["p99_ms"].as_f64().unwrap()), "{row}");
    assert!(output(emulated(&args)).contains("THE EMULATED DEVICE: these times mean nothing"));
}

/// The rates of the emulated device mean nothing, but the code that measures them must run.
#[test]
fn peaks_are_measured() {
    if MODULES.is_empty() {
        return println!("skipped: built without kernels");
    }
    cuda_emulator::install();
    let cuda = aoji::cuda::Cuda::open(0).unwrap();
    let peak = aoji::bench::Peak::measure(&cuda).unwrap();
    assert!(peak.read_gb_per_s > 0.0 && peak.copy_gb_per_s > 0.0, "{peak:?}");
    let cost = aoji::ops::Cost { read: 3_000_000, write: 1_000_000, flops: 5_000_000 };
    let floor = |matmul_tflops| aoji::bench::Peak { read_gb_per_s: 4.0, matmul_tflops, ..peak }.floor_ms(cost);
    assert_eq!([floor(None), floor(Some(1.0)), floor(Some(0.001))], [1.0, 1.0, 5.0]);
    assert_eq!(cuda_emulator::last_fault(), None);
}

#[test]
fn bench_says_what_is_wrong() {
    let says = |args: &[&str], expected: &str| {
        let (_, text) = failure(aoji(args));
        assert!(text.contains(expected), "{args:?}: {text}");
    };
    says(&["bench", "--device", "cpu", "--depth", "0", "--prefill", "4", "--repeat", "0"], "--repeat is 0");
    says(&["bench", "--device", "cpu", "--depth", "0", "--prefill", "none", "--tokens", "0"], "--tokens is 0");
    says(&["bench", "--device", "cpu", "--prefill", ""], "or none");
    says(&["bench", "--kernels", "--device", "cpu"], "kernels run on a GPU");
    says(&["bench", "--kernels"], if MODULES.is_empty() { "" } else { "GPU" });
    says(&["bench", "--small"], "--kernels");
}

#[test]
fn kernels_on_the_emulated_device_and_their_ledger() {
    if MODULES.is_empty() {
        return println!("skipped: built without kernels");
    }
    let (_, text) = failure(emulated(&["bench", "--kernels", "nonsense"]));
    assert!(text.contains("no op \"nonsense\"") && text.contains("rms_norm"), "{text}");

    let out = output(emulated(&["bench", "--kernels", "rms_norm", "--json"]));
    let report = parse(&out);
    assert_eq!((&report["emulated"], &report["peak"]), (&json!(true), &Value::Null));
    let cases = report["cases"].as_array().unwrap();
    assert!(cases.len() >= 3);
    for case in cases {
        assert_eq!((&case["op"], &case["check"]), (&json!("rms_norm"), &json!("passed")), "{case}");
        assert!(case["times"]["p50_ms"].as_f64().is_some_and(|ms| ms >= 0.0), "{case}");
    }
    let kernel = &report["kernels"][0];
    let module = MODULES.iter().find(|m| m.stem == "rms_norm").unwrap();
    assert_eq!((&kernel["source"], &kernel["passed"]), (&json!(module.hash), &json!(true)));
    assert_eq!(kernel["checked"], cases.len());
    assert!(kernel["usage"].as_array().unwrap().iter().all(|u| u["spills"] == 0), "{kernel}");
    let text = output(emulated(&["bench", "--kernels", "rms_norm"]));
    assert!(text.contains("THE EMULATED DEVICE") && text.contains("RmsNorm { rows: 1"), "{text}");

    // the ledger: what was emulated does not count; the version decides; a failure outweighs
    let dir = tempfile::tempdir().unwrap();
    let ledger = || -> Value {
        let results = dir.path().to_str().unwrap();
        let all = parse(&output(aoji(&["bench", "--ledger", "--json", "--results", results])));
        all.as_array().unwrap().iter().find(|e| e["kernel"] == "rms_norm").unwrap().clone()
    };
    let mut save = {
        let mut number = 0;
        let dir = dir.path().to_path_buf();
        move |change: &[(&str, Value)]| {
            let mut r = report.clone();
            for (pointer, value) in change {
                *r.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = value.clone();
            }
            number += 1;
            let place = dir.join(format!("gpu{number}"));
            fs::create_dir_all(&place).unwrap();
            fs::write(place.join("kernels.json"), r.to_string()).unwrap();
        }
    };
    assert_eq!(ledger()["state"]["state"], "never_run");
    save(&[]);
    assert_eq!(ledger()["state"]["state"], "never_run");
    let real = |date: &str| vec![("/emulated", json!(false)), ("/device", json!("NVIDIA X")), ("/date", json!(date))];
    save(&[&real("2026-01-01T00:00:00Z")[..], &[("/kernels/0/source", json!("0123456789abcdef"))]].concat());
    assert_eq!(ledger()["state"]["state"], "changed");
    save(&real("2026-01-02T00:00:00Z"));
    let passed = ledger()["state"].clone();
    assert_eq!((&passed["state"], &passed["on"][0]["gpu"]), (&json!("passed"), &json!("NVIDIA X")));
    assert_eq!(passed["on"].as_array().unwrap().len(), 1);
    let text = output(aoji(&["bench", "--ledger", "--results", dir.path().to_str().unwrap()]));
    assert!(text.contains(&format!("| `rms_norm` | `{}` | NVIDIA X on 2026-01-02 |", &module.hash[..8])), "{text}");
    save(&[&real("2026-01-03T00:00:00Z")[..], &[("/kernels/0/passed", json!(false))]].concat());
    assert_eq!(ledger()["state"]["state"], "failed");
    fs::write(dir.path().join("kernels.json"), "{}").unwrap();
    let (code, text) = failure(aoji(&["bench", "--ledger", "--results", dir.path().to_str().unwrap()]));
    assert!(code == 1 && text.contains("kernels.json: is not an output of"), "{text}");
}

/// The table's columns, the picture, and the variants of the lab: the commands of docs/kernel-lab.md, on the emulated device.
#[test]
fn kernels_and_their_variants() {
    if MODULES.is_empty() {
        return println!("skipped: built without kernels");
    }
    let dir = tempfile::tempdir().unwrap();
    let page = include_str!("../../docs/kernel-lab.md");
    let commands = page.lines().filter(|l| l.contains(" -- bench --kernels")).collect::<Vec<_>>();
    assert_eq!(commands.len(), 2, "{commands:?}");
    for command in commands {
        let args = command.split_once(" -- ").expect("filtered").1.split(' ').collect::<Vec<_>>();
        let mut c = emulated(&args);
        c.current_dir(dir.path());
        let text = output(c);
        assert!(text.contains("THE EMULATED DEVICE") && text.contains("\n  onepass "), "{command}: {text}");
        for column in
            ["us p50", "of floor", "flop/B", "roof", "registers", "shared B", "blocks/SM", "occupancy", "limit"]
        {
            assert!(text.contains(column), "{column}: {text}");
        }
        for verdict in ["faster", "slower", "no difference"] {
            assert!(!text.contains(verdict), "times of the emulated device are no reason for {verdict:?}: {text}");
        }
    }
    let picture = fs::read_to_string(dir.path().join("roofline.svg")).unwrap();
    assert!(picture.starts_with("<svg") && picture.contains("THE EMULATED DEVICE"), "{picture}");
    assert!(picture.contains("<title>RmsNorm { rows: 1, first: 0, dim: 8, eps: 1e-5 } onepass: "), "{picture}");

    let report = parse(&output(emulated(&["bench", "--kernels", "--lab", "rms_norm_onepass", "--json"])));
    let variant = &report["lab"][0];
    assert_eq!((&variant["op"], &variant["variant"]), (&json!("rms_norm"), &json!("onepass")));
    assert_eq!((&variant["passed"], report["kernels"].as_array().unwrap().len()), (&json!(true), 1));
    let cases = report["cases"].as_array().unwrap();
    let (shipped, variants): (Vec<_>, Vec<_>) = cases.iter().partition(|c| c["variant"].is_null());
    assert_eq!(shipped.len(), variants.len());
    assert_eq!((&report["kernels"][0]["checked"], &variant["checked"]), (&json!(shipped.len()), &json!(shipped.len())));
    for (shipped, variant) in shipped.into_iter().zip(variants) {
        assert_eq!(shipped["case"], variant["case"]);
        let launch = |case: &Value| case["launches"].as_array().unwrap()[0].clone();
        assert_eq!(launch(shipped)["kernel"], "rms_norm_bf16");
        assert_eq!(launch(variant)["kernel"], "rms_norm_bf16__onepass");
        assert_eq!(launch(shipped)["threads"], aoji::tiles::NORM_THREADS);
        assert!(shipped["ratio"].is_null() && variant["ratio"]["p50"].as_f64().is_some_and(|r| r > 0.0), "{variant}");
        assert!(shipped["intensity"].as_f64().is_some_and(|i| 0.3 < i && i < 1.0), "{shipped}");
        assert!(shipped["roof"].is_null(), "no roof was measured: {shipped}");
        if IMAGES.split(',').any(|i| i == "90") {
            assert!(launch(variant)["blocks_per_sm"].as_u64().is_some_and(|n| (1..=8).contains(&n)), "{variant}");
            assert!(launch(variant)["occupancy"].as_f64().is_some_and(|o| 0.0 < o && o <= 1.0), "{variant}");
        }
    }

    let says = |args: &[&str], expected: &str| {
        let (_, text) = failure(emulated(&[&["bench"], args].concat()));
        assert!(text.contains(expected), "{args:?}: {text}");
    };
    says(&["--kernels", "rms_norm", "--lab", "nonsense"], "no variant \"nonsense\" of rms_norm: kernels/lab holds ");
    says(&["--kernels", "embed", "--lab"], "no variant of embed");
    says(&["--lab"], "--kernels");
    says(&["--svg", "x.svg"], "--kernels");
    says(&["--kernels", "rms_norm", "--svg", "/nonexistent/x.svg"], "/nonexistent/x.svg");
}

/// `AOJI_LAB` puts variants in the place of shipped kernels, and says so; `bench --kernels` ignores it.
#[test]
fn a_model_runs_with_a_variant() {
    if MODULES.is_empty() {
        return println!("skipped: built without kernels");
    }
    let run = |args: &[&str], variants: &str| {
        let mut c = emulated(args);
        c.env("AOJI_LAB", variants);
        let o = c.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (o.status.success(), text(o.stdout), text(o.stderr))
    };
    let generate = ["generate", "--device", "cuda", "--prompt", "가", "--max-tokens", "2", "--context", "16"];
    let (ok, shipped, said) = run(&generate, "");
    assert!(ok && !said.contains("AOJI_LAB"), "{said}");
    let (ok, text, said) = run(&generate, "rms_norm_onepass");
    assert!(ok && said.contains("kernels/lab/rms_norm_onepass.cu replaces"), "{said}");
    assert_eq!(text, shipped, "it sums in the same order");
    let (ok, _, said) = run(&generate, "rms_norm_onepass,nonsense");
    assert!(!ok && said.contains("no variant \"nonsense\""), "{said}");
    let (ok, text, _) = run(&["bench", "--kernels", "rms_norm", "--json"], "rms_norm_onepass");
    assert!(ok && !text.contains("onepass"), "{text}");
}

const TINY: &str = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 100, "torch_dtype": "bfloat16",
    "tie_word_embeddings": false, "max_position_embeddings": 64}"#;

/// A model of these sizes, for as long as its directory exists.
fn tiny() -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let (config, out) = (dir.path().join("config.json"), dir.path().join("model"));
    fs::write(&config, TINY).unwrap();
    output(synth(&config, &out, &[]));
    let model = out.to_str().unwrap().to_string();
    (dir, model)
}

fn synth(config: &Path, out: &Path, extra: &[&str]) -> Command {
    let (config, out) = (config.to_str().unwrap(), out.to_str().unwrap());
    aoji(&[&["synth", "--like", config, "--seed", "7", out], extra].concat())
}

#[test]
fn synth_writes_a_model_that_runs() {
    let dir = tempfile::tempdir().unwrap();
    let (config, out) = (dir.path().join("config.json"), dir.path().join("model"));
    fs::write(&config, TINY).unwrap();
    let printed = output(synth(&config, &out, &["--layers", "2", "--shard-size", "20K"]));
    assert_eq!(printed.trim(), out.to_str().unwrap());
    assert!(out.join("model.safetensors.index.json").exists());
    let read = |name: &str| fs::read(out.join(name)).unwrap();
    assert_eq!(parse(&String::from_utf8(read("config.json")).unwrap())["num_hidden_layers"], 2);

    let (code, text) = failure(synth(&config, &out, &[]));
    assert!(code == 1 && text.contains("not empty"), "{text}");
    output(synth(&config, &out, &["--force"]));
    assert!(!out.join("model.safetensors.index.json").exists(), "the old model is gone");
    assert_eq!(parse(&String::from_utf8(read("config.json")).unwrap())["num_hidden_layers"], 3);
    fs::write(out.join("notes.txt"), "mine").unwrap();
    assert!(failure(synth(&config, &out, &["--force"])).1.contains("is not a file of a model"));
    assert!(out.join("notes.txt").exists(), "--force removes only a model's files");

    let like = |like: &str| failure(synth(Path::new(like), &dir.path().join("new"), &[])).1;
    assert!(like("gpt2").contains("neither one of llama3-8b"));
    fs::write(&config, "[]").unwrap();
    assert!(!like(config.to_str().unwrap()).is_empty());
    assert_eq!(failure(synth(&config, &out, &["--shard-size", "0"])).0, 2);
}

#[test]
fn verify_says_whether_it_agrees() {
    let dir = tempfile::tempdir().unwrap();
    let (config, out) = (dir.path().join("config.json"), dir.path().join("model"));
    fs::write(&config, TINY).unwrap();
    output(synth(&config, &out, &[]));
    let model = out.to_str().unwrap();
    let options = Options { device: Device::Cpu, activations: Activations::F32, ..Options::default() };
    let engine = Engine::open(model, &options).unwrap();
    let ids = [3u32, 14, 15, 92, 65];
    let mut step = Vec::new();
    let mut session = engine.session(16).unwrap();
    session.logits_of(&ids, 4, &mut |_, logits| step = logits.to_vec()).unwrap();
    let best = aoji::verify::argmax(&step);
    let golden = |logit: f32| {
        json!({"model": "tiny", "cases": [{
            "prompt": "x", "prompt_ids": ids, "generated_ids": [best],
            "steps": [{"top5": [[best, logit]], "margin": 1.0}]}]})
        .to_string()
    };
    let verify = || aoji(&["verify", "--model", model, "--device", "cpu", "--dtype", "f32", "--json"]);
    assert!(failure(verify()).1.contains("golden.json"));
    fs::write(out.join("golden.json"), golden(step[best as usize])).unwrap();
    let report = parse(&output(verify()));
    assert_eq!((&report["passed"], &report["steps"]), (&json!(true), &json!(1)));
    fs::write(out.join("golden.json"), golden(step[best as usize] + 1.0)).unwrap();
    let (code, text) = failure(verify());
    assert!(code == 3 && text.contains("logit error"), "{code} {text}");
    assert!(failure(aoji(&["verify"])).1.contains("--golden"));
}

#[test]
fn lockstep_of_the_emulated_device() {
    if MODULES.is_empty() {
        return println!("skipped: built without kernels");
    }
    let dir = tempfile::tempdir().unwrap();
    let (config, out) = (dir.path().join("config.json"), dir.path().join("model"));
    fs::write(&config, TINY).unwrap();
    output(synth(&config, &out, &[]));
    let args = ["verify", "--lockstep", "--model", out.to_str().unwrap(), "--tokens", "2", "--prompt", "12", "--json"];
    let report = parse(&output(emulated(&[&args[..], &["--layers", "2"]].concat())));
    assert_eq!((&report["passed"], &report["layers"]), (&json!(true), &json!(2)));
    assert_eq!(report["device"], "CUDA emulator");
    assert!(failure(emulated(&[&args[..], &["--prompt", "63"]].concat())).0 == 2, "an option given twice");
    assert!(failure(emulated(&["verify", "--lockstep", "--device", "cpu"])).1.contains("needs a GPU"));
    assert!(failure(aoji(&args)).1.contains("GPU"));
}
