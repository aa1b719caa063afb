//! `aoji bench --ledger`: for each kernel, whether the present version of its source has passed on a GPU, and on which.
//!
//! It reads every `kernels.json` (the output of `aoji bench --kernels --json`) in the directory of results. Results of the emulated
//! device do not count.

use super::Args;
use crate::common;
use aoji::{
    Error, Result,
    cuda::kernels::{MODULES, Module},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// The part of a result that matters here.
#[derive(Deserialize)]
struct Run {
    device: String,
    date: String,
    commit: Option<String>,
    #[serde(default)]
    emulated: bool,
    kernels: Vec<Source>,
}

#[derive(Deserialize)]
struct Source {
    op: String,
    source: String,
    checked: usize,
    passed: bool,
}

/// A row of the ledger.
#[derive(Serialize)]
struct Entry {
    kernel: &'static str,
    /// Version of the source in this binary.
    source: &'static str,
    state: State,
}

/// What runs on GPUs have shown about a kernel.
#[derive(Serialize, Debug, PartialEq)]
#[serde(tag = "state", rename_all = "snake_case")]
enum State {
    /// This version passed; its last passing run on each of these GPUs.
    Passed { on: Vec<Place> },
    /// This version failed in its last run.
    Failed { on: Place },
    /// An older version passed.
    Changed { since: Place },
    /// No version has passed.
    NeverRun,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            State::Passed { on } => f.write_str(&on.iter().map(Place::to_string).collect::<Vec<_>>().join(", ")),
            State::Failed { on } => write!(f, "FAILED: {on}"),
            State::Changed { since } => write!(f, "changed since {since}"),
            State::NeverRun => f.write_str("not yet"),
        }
    }
}

#[derive(Serialize, Clone, Debug, PartialEq)]
struct Place {
    gpu: String,
    date: String,
    commit: Option<String>,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} on {}", self.gpu, self.date.split('T').next().unwrap_or(&self.date))
    }
}

/// Reads the results, and prints.
pub fn run(args: &Args) -> Result<()> {
    let entries = entries(&args.results)?;
    if args.json { common::print_json(&entries) } else { common::print(&markdown(&entries)) }
}

/// What the results below a directory say about each kernel of this binary: its stem and a text.
pub fn confirmed(results: &Path) -> Result<Vec<(&'static str, String)>> {
    Ok(entries(results)?.iter().map(|e| (e.kernel, e.state.to_string())).collect())
}

/// What `ptx.json` in a directory of results says about each kernel of this binary: its stem and a text. `tests/ops`
/// writes that file; it has the version of each source whose PTX was executed.
pub fn executed(results: &Path) -> Result<Vec<(&'static str, String)>> {
    let path = results.join("ptx.json");
    if !path.is_file() {
        return Ok(MODULES.iter().map(|m| (m.stem, State::NeverRun.to_string())).collect());
    }
    let bad = |e| Error::File { path: path.clone(), what: format!("is not what tests/ops writes: {e}") };
    let known: BTreeMap<String, String> = serde_json::from_str(&common::read_file(&path)?).map_err(bad)?;
    let said = |m: &Module| match known.get(m.stem) {
        Some(source) if source == m.hash => format!("`{}`", version(source)),
        Some(source) => format!("changed since `{}`", version(source)),
        None => State::NeverRun.to_string(),
    };
    Ok(MODULES.iter().map(|m| (m.stem, said(m))).collect())
}

/// The part of a source's version that is shown.
fn version(source: &str) -> &str {
    source.get(..8).unwrap_or(source)
}

fn entries(dir: &Path) -> Result<Vec<Entry>> {
    if MODULES.is_empty() {
        return Err(Error::Input(
            "this binary was built without kernels (AOJI_SKIP_KERNELS): it knows no versions".into(),
        ));
    }
    let mut runs = Vec::new();
    for path in results(dir, "kernels.json") {
        let text = common::read_file(&path)?;
        let what = |e| format!("is not an output of `aoji bench --kernels --json`: {e}");
        let run: Run = serde_json::from_str(&text).map_err(|e| Error::File { path: path.clone(), what: what(e) })?;
        if !run.emulated {
            runs.push(run);
        }
    }
    runs.sort_by(|a, b| a.date.cmp(&b.date));
    let entry = |stem, source| Entry { kernel: stem, source, state: state(stem, source, &runs) };
    Ok(MODULES.iter().map(|m| entry(m.stem, m.hash)).collect())
}

/// Every file of a name below a directory, sorted; none where there is no directory.
pub fn results(dir: &Path, name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()) {
        match path.is_dir() {
            true => found.extend(results(&path, name)),
            false if path.file_name().is_some_and(|n| n == name) => found.push(path),
            false => {}
        }
    }
    found.sort();
    found
}

/// `runs` from the oldest to the newest.
fn state(stem: &str, source: &str, runs: &[Run]) -> State {
    let place = |r: &Run| Place { gpu: r.device.clone(), date: r.date.clone(), commit: r.commit.clone() };
    let of = |r: &Run| r.kernels.iter().find(|k| k.op == stem && k.checked > 0).map(|k| (k.source == source, k.passed));
    let said: Vec<(bool, bool, Place)> =
        runs.iter().filter_map(|r| of(r).map(|(same, passed)| (same, passed, place(r)))).collect();
    // the last result of each GPU for this version
    let current: BTreeMap<&str, (bool, &Place)> =
        said.iter().filter(|(same, ..)| *same).map(|(_, passed, p)| (p.gpu.as_str(), (*passed, p))).collect();
    if let Some((_, failed)) = current.values().find(|(passed, _)| !passed) {
        return State::Failed { on: (*failed).clone() };
    }
    if !current.is_empty() {
        return State::Passed { on: current.into_values().map(|(_, p)| p.clone()).collect() };
    }
    match said.into_iter().rev().find(|(_, passed, _)| *passed) {
        Some((_, _, since)) => State::Changed { since },
        None => State::NeverRun,
    }
}

fn markdown(entries: &[Entry]) -> String {
    let mut text = String::from("| kernel | source | confirmed on a GPU |\n|---|---|---|\n");
    for e in entries {
        text += &format!("| `{}` | `{}` | {} |\n", e.kernel, version(e.source), e.state);
    }
    text
}
