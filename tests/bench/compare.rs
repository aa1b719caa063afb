//! `aoji bench --compare` of made-up results.

use super::{aoji, failure, output, parse};
use serde_json::{Value, json};
use std::{fs, path::Path};

fn run(gpu: &str, commit: &str, times: &[f64]) -> Value {
    let times = json!({"n": 640, "min_ms": 1.0, "p50_ms": times[0], "p99_ms": 9.0, "medians_ms": times});
    let row = |tokens: u64| {
        let mut row = times.clone();
        row["tokens"] = tokens.into();
        row
    };
    json!({"aoji": "0.1.0", "commit": commit, "date": "2026-01-01T00:00:00Z", "device": gpu, "driver": "13.0",
        "board": {"driver_version": "580.1", "ecc": "Enabled", "power_limit_w": 700.0}, "emulated": false,
        "model": {"name": gpu, "dim": 4096}, "peak": {"read_gb_per_s": 4000.0},
        "prefill": [row(128)], "decode": [row(0), row(512)]})
}

fn compare(dir: &Path, a: &Value, b: &Value) -> (Value, String) {
    let file = |name: &str, v: &Value| {
        let path = dir.join(name);
        fs::write(&path, v.to_string()).unwrap();
        path.to_str().unwrap().to_string()
    };
    let (a, b) = (file("a.json", a), file("b.json", b));
    let args = ["bench", "--compare", &a, &b];
    (parse(&output(aoji(&[&args[..], &["--json"]].concat()))), output(aoji(&args)))
}

#[test]
fn changes_with_their_noise() {
    let dir = tempfile::tempdir().unwrap();
    let old = run("NVIDIA X", "aaaa", &[4.0, 4.01, 3.99, 4.02, 3.98]);
    let mut new = run("NVIDIA X", "bbbb", &[3.8, 3.81, 3.79, 3.82, 3.78]);
    new["decode"][1] = old["decode"][1].clone();
    let mut deeper = new["decode"][0].clone();
    deeper["tokens"] = json!(2048);
    new["decode"].as_array_mut().unwrap().push(deeper);
    new["peak"]["read_gb_per_s"] = json!(4100.0);
    let (report, text) = compare(dir.path(), &old, &new);
    let rows = report["rows"].as_array().unwrap();
    let row = |name: &str| rows.iter().find(|r| r["name"] == name).unwrap_or_else(|| panic!("{name}: {report}"));
    let change = row("decode at 0");
    assert_eq!((&change["verdict"], &change["runs"]), (&json!("faster"), &json!([5, 5])));
    let number = |key: &str| change[key].as_f64().unwrap();
    assert!((number("change") + 0.05).abs() < 1e-3 && number("low") < number("change"), "{change}");
    assert!(number("change") < number("high") && number("high") < 0.0, "{change}");
    assert_eq!(row("decode at 512")["verdict"], "within_noise");
    assert_eq!((&report["only_a"], &report["only_b"]), (&json!([]), &json!(["decode at 2048"])));
    let differs: Vec<&str> =
        report["differences"].as_array().unwrap().iter().map(|d| d["what"].as_str().unwrap()).collect();
    assert_eq!(differs, ["commit", "read bandwidth in GB/s", "date"]);
    assert!(text.contains("differs: commit: aaaa | bbbb") && text.contains("within noise"), "{text}");
    assert!(text.contains("-5.00%") && text.contains("only in B: decode at 2048"), "{text}");
}

#[test]
fn kernels_compare_too_and_conditions_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let kernels = |gpu: &str, ms: f64| {
        let mut r = run(gpu, "aaaa", &[ms]);
        let times = r["decode"][0].clone();
        let o = r.as_object_mut().unwrap();
        ["prefill", "decode", "model"].iter().for_each(|k| drop(o.remove(*k)));
        let case = |name: &str, variant: Option<&str>, times: &Value| json!({"op": "gemv", "case": name, "variant": variant, "times": times});
        let mut slow = times.clone();
        slow["medians_ms"] = json!([2.0 * ms]);
        r["cases"] = json!([
            case("Gemv { n: 1 }", None, &times),
            case("Gemv { n: 1 }", Some("deep"), &slow),
            case("bad", None, &Value::Null)
        ]);
        r
    };
    let (a, mut b) = (kernels("NVIDIA X", 1.0), kernels("NVIDIA Y", 1.1));
    b["board"]["driver_version"] = json!("580.2");
    b["emulated"] = json!(true);
    let (report, text) = compare(dir.path(), &a, &b);
    assert_eq!(
        (&report["rows"][0]["name"], &report["rows"][0]["verdict"]),
        (&json!("Gemv { n: 1 }"), &json!("too_few_runs"))
    );
    let variant = &report["rows"][1];
    assert_eq!(variant["name"], "Gemv { n: 1 } deep");
    assert!((variant["change"].as_f64().unwrap() - 0.1).abs() < 1e-9, "with itself: {variant}");
    for line in ["device: NVIDIA X | NVIDIA Y", "driver: 580.1 | 580.2", "emulated: no | yes: its times mean nothing"] {
        assert!(text.contains(&format!("differs: {line}")), "{line}: {text}");
    }

    let path = dir.path().join("a.json");
    let says = |b: &str, expected: &str| {
        let (code, text) = failure(aoji(&["bench", "--compare", path.to_str().unwrap(), b]));
        assert!(code == 1 && text.contains(expected), "{text}");
    };
    says("/nowhere.json", "/nowhere.json");
    let other = dir.path().join("other.json");
    fs::write(&other, run("NVIDIA X", "aaaa", &[1.0]).to_string()).unwrap();
    says(other.to_str().unwrap(), "nothing to compare");
    fs::write(&other, "{}").unwrap();
    says(other.to_str().unwrap(), "other.json: is not an output of `aoji bench --json`");
}
