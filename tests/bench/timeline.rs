//! `aoji bench --timeline` on the emulated device, whose clock only counts: the order is real, the times are not.

use super::{aoji, emulated, failure, output, parse, tiny};
use ::aoji::cuda::kernels::MODULES;
use serde_json::{Value, json};
use std::{collections::BTreeMap, fs};

#[test]
fn a_step_as_the_device_saw_it() {
    if MODULES.is_empty() {
        return println!("skipped: built without kernels");
    }
    let (dir, model) = tiny();
    let out = dir.path().join("step");
    let run = |extra: &[&str]| {
        let args = ["bench", "--timeline", out.to_str().unwrap(), "--model", &model, "--depth", "5"];
        output(emulated(&[&args[..], extra].concat()))
    };
    let report = parse(&run(&["--json"]));
    assert_eq!((&report["emulated"], &report["depth"], &report["n_layers"]), (&json!(true), &json!(5), &json!(3)));
    let launches = report["launches"].as_array().unwrap();
    let names: Vec<&str> = launches.iter().map(|l| l["kernel"].as_str().unwrap()).collect();
    // one step and no more: it ends with the only choice of a token
    assert_eq!(names.iter().position(|n| *n == "norm_head_argmax_bf16_r1_deep"), Some(names.len() - 1), "{names:?}");
    assert!(names.len() > 3, "at least a kernel of each layer: {names:?}");

    let number = |v: &Value, key: &str| v[key].as_f64().unwrap_or_else(|| panic!("{key}: {v}"));
    let (mut done, mut sum) = (0.0, 0.0);
    for l in launches {
        let at = |key| number(l, key);
        assert!(0.0 <= at("begin_us") && at("begin_us") <= at("ready_us") && at("ready_us") < at("end_us"), "{l}");
        assert!(at("ready_us") >= done, "each needs what the one before wrote: {l}");
        assert!(at("bytes") > 0.0 && at("gb_per_s") > 0.0 && at("blocks") >= 1.0, "{l}");
        done = at("end_us");
        sum += at("gap_us") + at("run_us");
    }
    assert!((sum - number(&report, "step_us")).abs() < 1e-6, "gaps and runs add up to the step: {sum}");
    assert_eq!(report["clock_ns"], 32, "the emulated clock");
    let sms = report["sms"].as_array().unwrap();
    assert_eq!(sms.len(), 4);
    assert!(sms.iter().all(|sm| (0.0..=1.0).contains(&number(sm, "busy"))) && number(&sms[0], "busy") > 0.0);

    // the trace: every block of every launch on the track of its multiprocessor, no overlap in a track
    let trace: Value = parse(&fs::read_to_string(dir.path().join("step.json")).unwrap());
    let events = trace["traceEvents"].as_array().unwrap();
    let of = |pid: u64| events.iter().filter(move |e| e["ph"] == "X" && e["pid"] == pid);
    assert_eq!(of(1).count(), launches.len());
    let blocks: u64 = launches.iter().map(|l| l["blocks"].as_u64().unwrap()).sum();
    assert_eq!(of(2).count() as u64, blocks);
    let mut tracks: BTreeMap<(u64, u64), Vec<(f64, f64)>> = BTreeMap::new();
    for e in of(1).chain(of(2)) {
        let (begin, end) = (number(e, "ts"), number(e, "ts") + number(e, "dur"));
        assert!(end <= number(&report, "step_us") + 1e-6, "{e}");
        tracks.entry((e["pid"].as_u64().unwrap(), e["tid"].as_u64().unwrap())).or_default().push((begin, end));
    }
    for (track, mut slices) in tracks {
        slices.sort_by(|a, b| a.0.total_cmp(&b.0));
        assert!(slices.windows(2).all(|w| w[0].1 <= w[1].0 + 1e-9), "{track:?}: {slices:?}");
    }
    assert_eq!(trace["otherData"]["header"]["emulated"], true);

    let svg = fs::read_to_string(dir.path().join("step.svg")).unwrap();
    let svg = roxmltree::Document::parse(&svg).unwrap();
    assert_eq!(svg.root_element().tag_name().name(), "svg");
    let text: Vec<&str> = svg.descendants().filter_map(|n| n.text()).collect();
    let has = |what: &str| text.iter().any(|t| t.contains(what));
    assert!(
        has("THE EMULATED DEVICE: these times mean nothing")
            && has("SM 3: busy ")
            && has("norm_head_argmax_bf16_r1_deep "),
        "{text:?}"
    );

    let text = run(&[]);
    assert!(text.contains("THE EMULATED DEVICE") && text.contains("us a layer") && text.contains("step.svg"), "{text}");
    assert!(text.lines().any(|l| l.starts_with("norm_head_argmax_bf16_r1_deep ")), "{text}");
}

#[test]
fn a_timeline_needs_a_gpu_and_a_place() {
    let (_, text) = failure(aoji(&["bench", "--timeline", "/nowhere/x", "--device", "cpu"]));
    assert!(text.contains("a timeline shows kernels on a GPU"), "{text}");
    if !MODULES.is_empty() {
        let (_, text) = failure(emulated(&["bench", "--timeline", "/nowhere/x", "--context", "200"]));
        assert!(text.contains("/nowhere/x.json"), "{text}");
    }
}
