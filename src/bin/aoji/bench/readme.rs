//! `aoji bench --readme`: makes the README's tables and plot from stored results, so that no number is typed by hand.
//!
//! The text between `<!-- speed -->` and `<!-- /speed -->` comes from each GPU's `bench.json` and `peers.json`, and
//! that between `<!-- cpu -->` and `<!-- /cpu -->` from `cpu/`. The last cells in the row of a kernel are the version
//! of its source whose PTX was executed, and what the ledger says. Results of the emulated device do not count.

use super::{cpu, ledger, model::Row};
use crate::{
    common,
    svg::{Anchor, FAINT, INK, PALETTE, Svg},
};
use aoji::{Error, Result};
use serde::Deserialize;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Beside the results.
const PLOT: &str = "decode.svg";

/// The part of `bench.json` that matters here.
#[derive(Deserialize)]
struct Bench {
    device: String,
    date: String,
    commit: Option<String>,
    emulated: bool,
    /// Compute capability of a GPU.
    capability: Option<String>,
    board: Option<Value>,
    model: Model,
    peak: Option<Peak>,
    prefill: Vec<Row>,
    decode: Vec<Row>,
    #[serde(skip)]
    path: PathBuf,
    /// Other programs on the same machine: name, decode and prefill, by tokens.
    #[serde(skip)]
    peers: Vec<(String, Times, Times)>,
}

#[derive(Deserialize)]
struct Model {
    params: u64,
    dim: usize,
    n_layers: usize,
}

#[derive(Deserialize)]
struct Peak {
    read_gb_per_s: f64,
    matmul_tflops: Option<f64>,
}

/// Milliseconds by tokens.
type Times = BTreeMap<usize, f64>;

/// Reads the results, and writes the README and the plot.
pub fn run(readme: &Path, results: &Path) -> Result<()> {
    let old = common::read_file(readme)?;
    let benches = benches(results)?;
    let speed = match benches.is_empty() {
        true => "**No results yet: no model has run on a GPU.**\n".into(),
        false => benches.iter().map(tables).collect::<String>() + &plot_link(readme, results),
    };
    let mut text = old.clone();
    for (name, made) in [("speed", speed), ("cpu", cpu::tables(results)?)] {
        text = between(&text, name, &made).ok_or_else(|| Error::File {
            path: readme.into(),
            what: format!("has no <!-- {name} --> ... <!-- /{name} -->"),
        })?;
    }
    for ((stem, confirmed), (_, executed)) in ledger::confirmed(results)?.into_iter().zip(ledger::executed(results)?) {
        text = with_last_cells(&text, &format!("| `{stem}` |"), &[&executed, &confirmed]);
    }
    let write = |path: &Path, text: &str| fs::write(path, text).map_err(|e| Error::Io { path: path.into(), source: e });
    if !benches.is_empty() {
        write(&results.join(PLOT), &plot(&benches))?;
    }
    if text == old { Ok(()) } else { write(readme, &text) }
}

/// `text` with `made` between the marks of a name.
fn between(text: &str, name: &str, made: &str) -> Option<String> {
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->"));
    let (before, rest) = text.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}{made}{end}{after}"))
}

/// The results of GPUs, in the order of their directories.
fn benches(results: &Path) -> Result<Vec<Bench>> {
    let mut found = Vec::new();
    for path in ledger::results(results, "bench.json") {
        let bad = |e| Error::File { path: path.clone(), what: format!("is not an output of `aoji bench --json`: {e}") };
        let mut bench: Bench = serde_json::from_str(&common::read_file(&path)?).map_err(bad)?;
        if bench.emulated || bench.capability.is_none() || bench.decode.is_empty() {
            continue;
        }
        let peers = path.with_file_name("peers.json");
        if peers.is_file() {
            let bad = |e| Error::File { path: peers.clone(), what: format!("is not JSON: {e}") };
            let value: Value = serde_json::from_str(&common::read_file(&peers)?).map_err(bad)?;
            bench.peers = peers_of(&value);
        }
        bench.path = path;
        found.push(bench);
    }
    Ok(found)
}

/// Reads an output of scripts/gpu/torch_peers.py.
fn peers_of(v: &Value) -> Vec<(String, Times, Times)> {
    let arms = [
        ("fast", "torch.compile"),
        ("hf_static", "transformers, static cache, compiled"),
        ("hf_eager", "transformers, eager"),
    ];
    let times = |arm: &str, kind: &str, key: &str| -> Times {
        let rows = v[arm][kind].as_array().into_iter().flatten();
        rows.filter_map(|r| Some((r[key].as_u64()? as usize, r["ms_p50"].as_f64()?))).collect()
    };
    let all =
        arms.map(|(arm, name)| (name.to_string(), times(arm, "decode", "depth"), times(arm, "prefill", "tokens")));
    all.into_iter().filter(|(_, decode, prefill)| !decode.is_empty() || !prefill.is_empty()).collect()
}

/// Decode and prefill of one GPU.
fn tables(b: &Bench) -> String {
    let driver = b.board.as_ref().and_then(|b| b["driver_version"].as_str());
    let date = b.date.split('T').next().unwrap_or(&b.date);
    let mut text = format!("**{}**, {:.1} G parameters, bf16, {date}", b.device, b.model.params as f64 / 1e9);
    text += &b.commit.as_ref().map_or(String::new(), |c| format!(", commit {c}"));
    text += &driver.map_or(String::new(), |d| format!(", driver {d}"));
    if let Some(p) = &b.peak {
        text += &format!("; measured in the same run: memory read at {:.0} GB/s", p.read_gb_per_s);
        text += &p.matmul_tflops.map_or(String::new(), |t| format!(", matrix product {t:.0} TFLOP/s"));
    }
    text += "\n\n";
    let ms = |x: f64| format!("{x:.3}");
    let share = |r: &Row| r.share.map_or("-".into(), |s| format!("{:.1}%", 100.0 * s));
    let layer = |r: &Row| r.over_floor_us_per_layer.map_or("-".into(), |us| format!("{us:.1}"));
    let d = &b.decode;
    let mut rows = vec![
        row("**aoji**, ms a token", d, |r| ms(r.times.p50_ms)),
        row("tokens a second", d, |r| format!("{:.1}", r.tokens_per_s)),
        row("p99, ms", d, |r| ms(r.times.p99_ms)),
        row("of the read bandwidth", d, share),
        row("over the floor, us a layer", d, layer),
    ];
    rows.extend(b.peers.iter().map(|(name, decode, _)| {
        row(&format!("{name}, ms a token"), d, |r| decode.get(&r.tokens).map_or("-".into(), |x| ms(*x)))
    }));
    text += &markdown("decode at depth", d, rows);
    let p = &b.prefill;
    if !p.is_empty() {
        let mut rows = vec![
            row("**aoji**, ms", p, |r| ms(r.times.p50_ms)),
            row("TFLOP/s", p, |r| format!("{:.1}", r.tflops)),
            row("of the floor", p, share),
        ];
        rows.extend(b.peers.iter().filter(|(.., prefill)| !prefill.is_empty()).map(|(name, _, prefill)| {
            row(&format!("{name}, ms"), p, |r| prefill.get(&r.tokens).map_or("-".into(), |x| ms(*x)))
        }));
        text += &markdown("prefill of tokens", p, rows);
    }
    text
}

fn row(name: &str, rows: &[Row], cell: impl Fn(&Row) -> String) -> String {
    let cells: Vec<String> = rows.iter().map(cell).collect();
    format!("| {name} | {} |\n", cells.join(" | "))
}

fn markdown(name: &str, columns: &[Row], rows: Vec<String>) -> String {
    let head = row(name, columns, |r| r.tokens.to_string());
    format!("{head}|---|{}\n{}\n", "---:|".repeat(columns.len()), rows.concat())
}

fn plot_link(readme: &Path, results: &Path) -> String {
    let base = readme.parent().unwrap_or(Path::new(""));
    let path = results.strip_prefix(base).unwrap_or(results).join(PLOT);
    format!("![Time of a token: reading memory, and the rest]({})\n", path.display())
}

/// The text, with other last cells in the table's row that begins with `start`.
fn with_last_cells(text: &str, start: &str, last: &[&str]) -> String {
    let line = |line: &str| {
        let row = line.strip_prefix("| ").and_then(|l| l.strip_suffix(" |")).filter(|_| line.starts_with(start));
        let mut cells: Vec<&str> = row.into_iter().flat_map(|row| row.split(" | ")).collect();
        match cells.len().checked_sub(last.len()) {
            Some(at) if at > 0 => {
                cells[at..].copy_from_slice(last);
                format!("| {} |\n", cells.join(" | "))
            }
            _ => format!("{line}\n"),
        }
    };
    text.lines().map(line).collect()
}

/// A bar for each depth on each GPU: the time that reading alone takes, with the rest on top of it.
fn plot(benches: &[Bench]) -> String {
    const BAR: f64 = 46.0;
    const GAP: f64 = 40.0;
    const HEIGHT: f64 = 300.0;
    let bars: usize = benches.iter().map(|b| b.decode.len()).sum();
    let width = 90.0 + bars as f64 * (BAR + 8.0) + benches.len() as f64 * GAP;
    let bottom = 70.0 + HEIGHT;
    let mut svg = Svg::new(width.max(560.0), bottom + 60.0);
    svg.text(
        12.0,
        22.0,
        Anchor::Start,
        14.0,
        "Time of a token in ms, by depth: the part that reading memory takes, and the rest",
    );
    let legend =
        [(12.0, "floor: all bytes at the read bandwidth"), (260.0, "the rest"), (350.0, "dots: other programs")];
    for ((x, name), color) in legend.into_iter().zip([PALETTE[0], PALETTE[1], PALETTE[3]]) {
        svg.rect(x, 34.0, 12.0, 12.0, color, "");
        svg.text(x + 18.0, 44.0, Anchor::Start, 11.0, name);
    }
    let slowest = benches.iter().flat_map(|b| &b.decode).map(|r| r.times.p50_ms).fold(0.0, f64::max);
    // other programs are dots, unless they are so slow that the bars would become too small
    let dots = |b: &Bench, tokens: usize| -> Vec<(String, f64)> {
        let times = b.peers.iter().filter_map(|(name, decode, _)| Some((name.clone(), *decode.get(&tokens)?)));
        times.filter(|(_, ms)| *ms <= 2.0 * slowest).collect()
    };
    let shown = benches.iter().flat_map(|b| b.decode.iter().flat_map(|r| dots(b, r.tokens)));
    let most = shown.map(|(_, ms)| ms).fold(slowest, f64::max);
    let y = |ms: f64| bottom - HEIGHT * ms / (1.05 * most);
    let step = if most > 20.0 { 5.0 } else { 1.0 };
    let mut tick = 0.0;
    while tick <= most {
        svg.line(&[(60.0, y(tick)), (width, y(tick))], FAINT, 1.0);
        svg.text(54.0, y(tick) + 4.0, Anchor::End, 10.0, &tick.to_string());
        tick += step;
    }
    let mut x = 80.0;
    for b in benches {
        let from = x;
        for r in &b.decode {
            let (floor, ms) = (r.floor_ms.unwrap_or(0.0), r.times.p50_ms);
            let about = format!("{}, depth {}: {ms:.3} ms, floor {floor:.3} ms", b.device, r.tokens);
            svg.rect(x, y(ms), BAR, y(floor) - y(ms), PALETTE[1], &about);
            svg.rect(x, y(floor), BAR, bottom - y(floor), PALETTE[0], &about);
            svg.text(x + BAR / 2.0, y(ms) - 4.0, Anchor::Middle, 10.0, &format!("{ms:.2}"));
            svg.text(x + BAR / 2.0, bottom + 14.0, Anchor::Middle, 10.0, &r.tokens.to_string());
            for (name, ms) in dots(b, r.tokens) {
                svg.circle(x + BAR / 2.0, y(ms), 4.0, PALETTE[3], &format!("{name}: {ms:.3} ms"));
            }
            x += BAR + 8.0;
        }
        let name = format!("{}, {} layers of {}", b.device, b.model.n_layers, b.model.dim);
        svg.text((from + x) / 2.0, bottom + 34.0, Anchor::Middle, 11.0, &name);
        x += GAP;
    }
    svg.line(&[(60.0, bottom), (width, bottom)], INK, 1.0);
    svg.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_cells_of_the_row_change() {
        let text = "| a | b |\n|---|---|\n| `x` | of | not yet |\n| `xy` | of | not yet |\n";
        let new = with_last_cells(text, "| `x` |", &["`1a2b`", "H200 on 2026-01-01"]);
        assert_eq!(new, "| a | b |\n|---|---|\n| `x` | `1a2b` | H200 on 2026-01-01 |\n| `xy` | of | not yet |\n");
        assert_eq!(with_last_cells(text, "| `x` |", &["1", "2", "3"]), text, "a row without a cell for each");
    }
}
