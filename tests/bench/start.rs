//! `aoji bench --startup`.

use super::{aoji, emulated, failure, output, parse};
use ::aoji::cuda::kernels::MODULES;
use serde_json::json;
use std::process::Command;

#[test]
fn the_start_is_measured_in_processes_of_its_own() {
    let run = |c: Command, emulated: bool| {
        let report = parse(&output(c));
        let runs = report["runs"].as_array().unwrap();
        assert_eq!((runs.len(), &report["model"], &report["emulated"]), (3, &json!("demo"), &json!(emulated)));
        let mut seconds: Vec<f64> = runs.iter().map(|r| r["seconds"].as_f64().unwrap()).collect();
        seconds.sort_by(f64::total_cmp);
        assert_eq!(report["median_seconds"].as_f64().unwrap(), seconds[1]);
        for run in runs {
            let phases = run["startup"]["phases"].as_array().unwrap();
            assert_eq!(phases.last().unwrap()["name"], "first token");
            assert_eq!(phases.iter().any(|p| p["name"] == "kernels"), emulated, "{phases:?}");
            let (all, own) = (run["seconds"].as_f64().unwrap(), run["startup"]["seconds"].as_f64().unwrap());
            assert!(0.0 < own && own < all, "the process took {all} s, what it says of itself {own} s");
        }
    };
    let args = ["bench", "--startup", "--repeat", "3", "--context", "64", "--json"];
    run(aoji(&[&args[..], &["--device", "cpu"]].concat()), false);
    if !MODULES.is_empty() {
        run(emulated(&args), true);
    }
    let text = output(aoji(&["bench", "--startup", "--repeat", "1", "--device", "cpu", "--context", "64"]));
    for part in ["process start to first token", "from disk", "process", "tokenizer", "first token"] {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
    let fails = |args: &[&str], expected: &str| {
        let (_, said) = failure(aoji(&[&["bench", "--startup"], args].concat()));
        assert!(said.contains(expected), "{args:?}: {said}");
    };
    fails(&["--repeat", "0"], "--repeat is 0");
    fails(&["--model", "/nowhere"], "/nowhere");
    fails(&["--kernels"], "--kernels");
}
