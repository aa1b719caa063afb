//! Makes the README's table of the CPU from what `scripts/peers-cpu` left in the folder `cpu/` of the results.

use crate::common;
use aoji::{Error, Result};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Tokens a second, by the number of tokens of the prompt or before the step.
type PerSecond = BTreeMap<u64, f64>;

/// An output of `scripts/peers-cpu`.
#[derive(Deserialize)]
struct Peers {
    cpu: String,
    threads: usize,
    date: String,
    commit: String,
    model: String,
    read_gb_per_s: f64,
    of_read: f64,
    tokens_per_s: BTreeMap<String, Figures>,
    times_llama_cpp_bf16: BTreeMap<String, f64>,
    /// The same of other formats, by their names.
    #[serde(default)]
    times_llama_cpp: BTreeMap<String, BTreeMap<String, f64>>,
    kobest_copa: Option<Copa>,
}

#[derive(Deserialize)]
struct Figures {
    decode: PerSecond,
    prefill: PerSecond,
}

#[derive(Deserialize)]
struct Copa {
    documents: usize,
    seconds: BTreeMap<String, f64>,
    times_lm_eval: f64,
}

/// A table for each file, in the order of their names.
pub fn tables(results: &Path) -> Result<String> {
    let folder = results.join("cpu");
    let files = fs::read_dir(&folder).map(|entries| entries.filter_map(|e| Some(e.ok()?.path())));
    let mut files: Vec<PathBuf> = files.map_or(Vec::new(), Iterator::collect);
    files.retain(|path| path.extension().is_some_and(|e| e == "json"));
    files.sort();
    let mut text = String::new();
    for path in files {
        let bad = |e| Error::File { path: path.clone(), what: format!("is not an output of scripts/peers-cpu: {e}") };
        text += &table(&serde_json::from_str(&common::read_file(&path)?).map_err(bad)?);
    }
    Ok(text)
}

fn table(p: &Peers) -> String {
    let mut text = format!(
        "**{}**, {} threads, {}, {}, commit {}. In the same run a simple loop read memory at {:.0} GB/s, and decoding read weights at {:.0} GB/s\n\n",
        p.cpu,
        p.threads,
        p.model,
        p.date,
        p.commit,
        p.read_gb_per_s,
        p.of_read * p.read_gb_per_s
    );
    let row = |name: &str, cells: Vec<String>| format!("| {name} | {} |\n", cells.join(" | "));
    let columns = |f: &Figures, name: fn(&str, u64) -> String| -> Vec<String> {
        let of = |kind: &'static str, of: &PerSecond| of.keys().map(|n| name(kind, *n)).collect::<Vec<_>>();
        [of("decode", &f.decode), of("prefill", &f.prefill)].concat()
    };
    let Some(first) = p.tokens_per_s.values().next() else { return text };
    let head = columns(first, |kind, n| format!("{kind} {} {n}", if kind == "decode" { "at depth" } else { "of" }));
    text += &row("tokens a second", head.clone());
    text += &format!("|---|{}\n", "---:|".repeat(head.len()));
    for (name, f) in &p.tokens_per_s {
        let name = if name.starts_with("aoji") { format!("**{name}**") } else { name.clone() };
        text += &row(&name, f.decode.values().chain(f.prefill.values()).map(|x| format!("{x:.0}")).collect());
    }
    let times = columns(first, |kind, n| format!("{kind} {n}"));
    for (format, of) in
        [("bf16", &p.times_llama_cpp_bf16)].into_iter().chain(p.times_llama_cpp.iter().map(|(f, of)| (&**f, of)))
    {
        let times = times.iter().map(|key| of.get(key).map_or("-".into(), |x| format!("{x:.2}")));
        text += &row(&format!("**aoji, times the faster llama.cpp {format}**"), times.collect());
    }
    if let Some(c) = &p.kobest_copa {
        let seconds: Vec<String> = c.seconds.iter().map(|(name, s)| format!("{name} {s:.1} s")).collect();
        let (n, times) = (c.documents, c.times_lm_eval);
        text += &format!("\nKoBEST copa, {n} documents, 0 shots: {}; {times:.1} times as fast\n", seconds.join(", "));
    }
    text + "\n"
}
