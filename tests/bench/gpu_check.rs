//! `scripts/gpu-check` without a GPU: the emulated device takes its place.

use super::{MODULES, failure, output, parse};
use serde_json::json;
use std::{fs, path::Path, process::Command};

/// Runs `scripts/gpu-check run` on the emulated device, from `dir/carried` into `dir/out`: of one part, the steps with
/// these names.
fn gpu_check(dir: &Path, part: &str, only: &str) -> Command {
    let from = dir.join("carried");
    fs::create_dir_all(from.join("tests")).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_aoji"), from.join("aoji")).unwrap();
    fs::write(from.join("commit"), "abc1234\n").unwrap();
    let mut c = Command::new("bash");
    c.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/gpu-check"));
    c.args(["run", "--emulated", "--part", part]).arg("--from").arg(&from).arg("--out").arg(dir.join("out"));
    if !only.is_empty() {
        c.args(["--only", only]);
    }
    c.env_remove("OUT").env("LD_LIBRARY_PATH", cuda_emulator::library_dir());
    c
}

/// Part 1 with a wrong kernel planted in place of an op's: the report names the op, and everything else is still in it.
#[test]
fn gpu_check_names_a_kernel_that_is_wrong_or_hangs() {
    if MODULES.is_empty() {
        return println!("skipped: built without kernels");
    }
    let others = ["doctor", "check swiglu", "check embed"];
    for (op, plant, state, why, fine) in [
        (
            "rms_norm",
            "rms_norm_bf16=rms_norm_bf16__biased",
            "failed",
            "first RmsNorm { rows: 1",
            &["check stream_read"][..],
        ),
        ("stream_read", "stream_read_u32=endless", "timed out", "", &["check rms_norm", "tiny lockstep"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let only = if state == "failed" { "doctor|check" } else { "doctor|check|tiny" };
        let mut c = gpu_check(dir.path(), "1", only);
        c.env("CUDA_EMULATOR_PLANT", plant);
        let (code, said) = failure(c);
        assert_eq!(code, 1, "{plant}: {said}");
        let check = parse(&fs::read_to_string(dir.path().join("out/check.json")).unwrap());
        let steps = check["steps"].as_array().unwrap();
        let step = |name: &str| steps.iter().find(|s| s["step"] == name).unwrap_or_else(|| panic!("no step {name}"));
        let wrong = step(&format!("check {op}"));
        assert!(wrong["state"] == state && wrong["end"].to_string().contains(why), "{wrong}");
        for name in others.iter().chain(fine) {
            assert_eq!(step(name)["state"], "passed", "{plant}: {}", step(name));
        }
        let table = fs::read_to_string(dir.path().join("out/check.md")).unwrap();
        assert!(table.contains(&format!("| 1 | check {op} | {state}")), "{table}");
    }
}

/// Steps of the part of ten minutes, while the report cannot be written: each step still runs and is recorded.
#[test]
fn gpu_check_goes_on_without_a_report() {
    if MODULES.is_empty() {
        return println!("skipped: built without kernels");
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    fs::create_dir_all(out.join("check.md")).unwrap(); // where a file should be
    fs::write(dir.path().join("out/hf.json"), r#"{"aoji": {"places": 3}}"#).unwrap(); // of another form
    let (code, said) = failure(gpu_check(dir.path(), "0", "doctor|8B|overlap|bench"));
    assert!(code == 1 && said.contains("the report was not written"), "{said}");
    let steps = parse(&fs::read_to_string(out.join("steps-0.json")).unwrap());
    let passed = |name: &str| steps.as_array().unwrap().iter().any(|s| s["step"] == name && s["state"] == "passed");
    assert!(["doctor", "synth 8B", "overlap", "bench"].into_iter().all(passed), "{steps}");
    assert!(out.join("bench.json").exists());

    // once it can be, nothing is lost
    fs::remove_dir(out.join("check.md")).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/gpu-check");
    let mut c = Command::new("bash");
    c.arg(script).arg("report").arg(&out);
    let text = output(c);
    assert!(
        text.contains("| 0 | overlap | passed")
            && text.contains("against_transformers: a result cannot be read: KeyError"),
        "{text}"
    );
    let check = parse(&fs::read_to_string(out.join("check.json")).unwrap());
    assert_eq!(
        check["steps"],
        serde_json::Value::Array(steps.as_array().unwrap().iter().map(|s| with(s, "part", json!(0))).collect())
    );
}

fn with(object: &serde_json::Value, key: &str, value: serde_json::Value) -> serde_json::Value {
    let mut object = object.clone();
    object[key] = value;
    object
}

/// All of `scripts/gpu-check run`, as far as it goes without a GPU: each step is recorded, and none stops the others.
#[test]
fn gpu_check_runs_dry() {
    if MODULES.is_empty() {
        return println!("skipped: built without kernels");
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let text = output(gpu_check(dir.path(), "all", ""));
    let check = parse(&fs::read_to_string(out.join("check.json")).unwrap());
    assert_eq!((&check["emulated"], &check["commit"]), (&json!(true), &json!("abc1234")));
    let steps = check["steps"].as_array().unwrap();
    let state = |name: &str| {
        let step = steps.iter().find(|s| s["step"] == name).unwrap_or_else(|| panic!("no step {name}: {text}"));
        step["state"].as_str().unwrap().to_string()
    };
    let passed = [
        &[
            "doctor",
            "check rms_norm",
            "check swiglu",
            "check embed",
            "tiny lockstep",
            "kernels",
            "lab",
            "synth 1B",
            "lockstep",
            "synth 8B",
            "bench",
            "timeline",
            "start",
            "fp8 cache",
            "invariance",
        ][..],
        &["overlap", "decode: shipped", "decode: no overlap", "decode: short rings", "decode: trigger 6"],
        &["decode: evict-first", "decode: 256 bytes", "decode: x past L1", "tune: speed"],
    ];
    for name in passed.concat() {
        assert_eq!(state(name), "passed", "{name}: {text}");
    }
    let skipped = [
        &["tests of ops", "memcheck", "racecheck", "speculation", "peers", "invariance fp8", "evaluation"][..],
        &["tune: bits", "tune: peers"],
    ];
    for name in skipped.concat() {
        assert_eq!(state(name), "skipped", "{name}: {text}");
    }
    assert_ne!(state("Hugging Face"), "failed", "{text}");
    assert_eq!(parse(&fs::read_to_string(out.join("bench.json")).unwrap())["emulated"], true);
    assert!(out.join("step.json.gz").exists() && out.join("step.svg").exists());
    let table = fs::read_to_string(out.join("check.md")).unwrap();
    assert!(table.contains("nothing here was measured on a GPU") && text.contains(&table), "{table}");

    // what is missing is said at once
    let mut c = Command::new("bash");
    c.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/gpu-check"))
        .args(["run", "--part", "1", "--from", "/nowhere"]);
    let (code, said) = failure(c);
    assert!(code == 2 && said.contains("scripts/gpu-check build"), "{said}");
    let (code, said) = failure(gpu_check(tempfile::tempdir().unwrap().path(), "1", "no such step"));
    assert!(code == 2 && said.contains("no step of part 1 is named as --only has it: no such step"), "{said}");
}
