//! `aoji bench --compare A.json B.json`: what changed between two runs, and whether the change is more than noise.
//!
//! Each run has several medians. The change is the median of all ratios of a median of B to a median of A (the estimate
//! of Hodges and Lehmann, 1963). Its 95% interval comes from the same ratios, sorted: the Mann-Whitney distribution
//! tells how many to cut off at each end; beyond [`EXACT`] ratios its normal approximation does. Nothing is assumed about the
//! distribution of the times.

use super::table;
use crate::common;
use aoji::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// The probability outside the interval, on each side.
const TAIL: f64 = 0.025;
/// Standard deviations from the mean of a normal distribution to that tail.
const DEVIATIONS: f64 = 1.959964;
/// Most ratios for which the distribution is counted, which takes time with the square of their number.
const EXACT: usize = 2500;
/// Most medians of a row in a file: the ratios of two such rows take 128 MB.
const MOST: usize = 4000;

/// The part of a report that matters here: of `aoji bench --json`, with or without `--kernels`.
#[derive(Deserialize)]
struct Run {
    aoji: String,
    commit: Option<String>,
    date: String,
    device: String,
    driver: Option<String>,
    board: Option<Value>,
    emulated: bool,
    model: Option<Value>,
    peak: Option<Value>,
    #[serde(default)]
    prefill: Vec<Row>,
    #[serde(default)]
    decode: Vec<Row>,
    #[serde(default)]
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Row {
    tokens: usize,
    #[serde(flatten)]
    times: Times,
}

#[derive(Deserialize)]
struct Case {
    case: String,
    /// A variant of the kernel lab.
    variant: Option<String>,
    times: Option<Times>,
}

#[derive(Deserialize, Clone)]
struct Times {
    p50_ms: f64,
    #[serde(default)]
    medians_ms: Vec<f64>,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    /// Conditions in which the runs differ.
    differences: Vec<Difference>,
    rows: Vec<Change>,
    only_a: Vec<String>,
    only_b: Vec<String>,
}

#[derive(Serialize)]
struct Difference {
    what: &'static str,
    a: String,
    b: String,
}

#[derive(Serialize)]
struct Change {
    name: String,
    a_ms: f64,
    b_ms: f64,
    /// Runs of A and of B.
    runs: [usize; 2],
    /// Change of the time, as a share of A's; negative is faster.
    change: f64,
    /// Lower end of its interval.
    low: f64,
    high: f64,
    verdict: Verdict,
}

#[derive(Serialize, Clone, Copy, Debug, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Faster,
    Slower,
    WithinNoise,
    TooFewRuns,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Verdict::Faster => "faster",
            Verdict::Slower => "slower",
            Verdict::WithinNoise => "within noise",
            Verdict::TooFewRuns => "too few runs",
        }
    }
}

/// Reads both, and prints.
pub fn run(a: &Path, b: &Path, json: bool) -> Result<()> {
    let report = compare(&read(a)?, &read(b)?)?;
    if json { common::print_json(&report) } else { common::print(&text(&report)) }
}

fn read(path: &Path) -> Result<Run> {
    let what = |e| format!("is not an output of `aoji bench --json`: {e}");
    let wrong = |what| Error::File { path: path.into(), what };
    let run: Run = serde_json::from_str(&common::read_file(path)?).map_err(|e| wrong(what(e)))?;
    match run.rows().iter().find(|(_, times)| times.medians_ms.len() > MOST) {
        Some((name, t)) => {
            Err(wrong(format!("{name} has {} medians, and at most {MOST} are compared", t.medians_ms.len())))
        }
        None => Ok(run),
    }
}

fn compare(a: &Run, b: &Run) -> Result<Report> {
    let (rows_a, rows_b) = (a.rows(), b.rows());
    let of = |rows: &[(String, Times)], name: &str| rows.iter().find(|(n, _)| n == name).map(|(_, t)| t.clone());
    let lacks = |rows: &[(String, Times)], other: &[(String, Times)]| -> Vec<String> {
        rows.iter().filter(|(n, _)| of(other, n).is_none()).map(|(n, _)| n.clone()).collect()
    };
    let both = rows_a.iter().filter_map(|(name, t)| Some(Change::new(name.clone(), t, &of(&rows_b, name)?)));
    let rows: Vec<Change> = both.collect();
    if rows.is_empty() {
        return Err(Error::Input("nothing to compare: no length, depth or case is in both files".into()));
    }
    Ok(Report {
        differences: differences(a, b),
        rows,
        only_a: lacks(&rows_a, &rows_b),
        only_b: lacks(&rows_b, &rows_a),
    })
}

impl Run {
    fn rows(&self) -> Vec<(String, Times)> {
        let named = |kind: &'static str, rows: &[Row]| -> Vec<(String, Times)> {
            rows.iter().map(|r| (format!("{kind} {}", r.tokens), r.times.clone())).collect()
        };
        let name = |c: &Case| c.variant.as_ref().map_or(c.case.clone(), |v| format!("{} {v}", c.case));
        let cases = self.cases.iter().filter_map(|c| Some((name(c), c.times.clone()?)));
        [named("prefill", &self.prefill), named("decode at", &self.decode), cases.collect()].concat()
    }
}

/// Name of a condition, and its value in a run.
type Condition<'a> = (&'static str, &'a dyn Fn(&Run) -> String);

fn differences(a: &Run, b: &Run) -> Vec<Difference> {
    let optional = |s: &Option<String>| s.clone().unwrap_or_else(|| "unknown".into());
    let field = |v: &Option<Value>, name: &str| v.as_ref().and_then(|v| v.get(name)).map_or(Value::Null, Value::clone);
    let driver = |r: &Run| match field(&r.board, "driver_version") {
        Value::String(version) => version,
        _ => optional(&r.driver),
    };
    let emulated = |r: &Run| if r.emulated { "yes: its times mean nothing" } else { "no" }.to_string();
    // names of checkpoints may differ if the sizes are the same
    let sizes = |r: &Run| match r.model.clone() {
        Some(Value::Object(mut m)) => {
            m.remove("name");
            m.iter().map(|(k, v)| format!("{k} {v}")).collect::<Vec<_>>().join(", ")
        }
        _ => "none".into(),
    };
    let board = |name| move |r: &Run| field(&r.board, name).to_string();
    let read_rate = |r: &Run| field(&r.peak, "read_gb_per_s").as_f64();
    let conditions: [Condition; 8] = [
        ("emulated", &emulated),
        ("device", &|r| r.device.clone()),
        ("driver", &driver),
        ("power limit in W", &board("power_limit_w")),
        ("ECC", &board("ecc")),
        ("aoji", &|r| r.aoji.clone()),
        ("commit", &|r| optional(&r.commit)),
        ("model", &sizes),
    ];
    let differ = conditions.into_iter().map(|(what, of)| Difference { what, a: of(a), b: of(b) });
    // this is reported even if both runs are emulated, since their times mean nothing
    let mut found: Vec<Difference> = differ.filter(|d| d.a != d.b || (d.what == "emulated" && a.emulated)).collect();
    if let (Some(x), Some(y)) = (read_rate(a), read_rate(b))
        && (x / y - 1.0).abs() > 0.01
    {
        found.push(Difference { what: "read bandwidth in GB/s", a: format!("{x:.1}"), b: format!("{y:.1}") });
    }
    if found.iter().any(|d| d.what == "commit") {
        found.push(Difference { what: "date", a: a.date.clone(), b: b.date.clone() });
    }
    found
}

impl Change {
    fn new(name: String, a: &Times, b: &Times) -> Change {
        let runs = |t: &Times| if t.medians_ms.is_empty() { vec![t.p50_ms] } else { t.medians_ms.clone() };
        let (runs_a, runs_b) = (runs(a), runs(b));
        let mut ratios: Vec<f64> = runs_a.iter().flat_map(|a| runs_b.iter().map(move |b| b / a)).collect();
        ratios.sort_by(f64::total_cmp);
        let n = ratios.len();
        let change = (ratios[(n - 1) / 2] + ratios[n / 2]) / 2.0 - 1.0;
        let cut = cut(runs_a.len(), runs_b.len());
        let at = cut.unwrap_or(0);
        let (low, high) = (ratios[at] - 1.0, ratios[n - 1 - at] - 1.0);
        let verdict = match cut {
            None => Verdict::TooFewRuns,
            Some(_) if high < 0.0 => Verdict::Faster,
            Some(_) if low > 0.0 => Verdict::Slower,
            Some(_) => Verdict::WithinNoise,
        };
        Change { name, a_ms: a.p50_ms, b_ms: b.p50_ms, runs: [runs_a.len(), runs_b.len()], change, low, high, verdict }
    }
}

/// How many of the sorted ratios of `m` by `n` runs may be cut off at each end, so that the probability beyond is at
/// most `TAIL`; `None` when even the outermost ratio has more.
fn cut(m: usize, n: usize) -> Option<usize> {
    if m * n > EXACT {
        // Mann and Whitney 1947: the number of pairs with B first has mean mn / 2 and variance mn (m + n + 1) / 12 and is nearly
        // normal; it is a whole number, hence the half. Where one side has few runs this cuts off too little rather than too much.
        let (m, n) = (m as f64, n as f64);
        let last = m * n / 2.0 - DEVIATIONS * (m * n * (m + n + 1.0) / 12.0).sqrt() - 0.5;
        return (last >= 0.0).then_some(last as usize);
    }
    // ways[j][u]: orders of i runs of A and j of B in which u pairs have B first; built up over i
    let mut ways = vec![vec![0f64; m * n + 1]; n + 1];
    ways.iter_mut().for_each(|w| w[0] = 1.0);
    for _ in 0..m {
        for j in 1..=n {
            for u in (0..=m * n).rev() {
                // the last run in the order is either of A, after j of B, or of B
                ways[j][u] = if u >= j { ways[j][u - j] } else { 0.0 } + ways[j - 1][u];
            }
        }
    }
    let all: f64 = ways[n].iter().sum();
    let mut tail = 0.0;
    let beyond = ways[n].iter().take_while(|w| {
        tail += *w / all;
        tail <= TAIL
    });
    beyond.count().checked_sub(1)
}

fn text(r: &Report) -> String {
    let mut text = String::new();
    for d in &r.differences {
        text += &format!("differs: {}: {} | {}\n", d.what, d.a, d.b);
    }
    if !text.is_empty() {
        text.push('\n');
    }
    let percent = |x: f64| format!("{:+.2}%", 100.0 * x);
    let row = |c: &Change| {
        vec![
            c.name.clone(),
            format!("{:.4}", c.a_ms),
            format!("{:.4}", c.b_ms),
            percent(c.change),
            format!("{} to {}", percent(c.low), percent(c.high)),
            format!("{}, {}", c.runs[0], c.runs[1]),
            c.verdict.name().into(),
        ]
    };
    let columns = ["", "A ms", "B ms", "change", "95% interval", "runs", ""];
    text += &table::table(&columns, &r.rows.iter().map(row).collect::<Vec<_>>());
    for (which, only) in [("A", &r.only_a), ("B", &r.only_b)] {
        if !only.is_empty() {
            text += &format!("only in {which}: {}\n", only.join(", "));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Critical values of the two-sided test at 5% (Mann and Whitney 1947), plus one.
    #[test]
    fn cuts_are_those_of_the_tables() {
        assert_eq!([cut(1, 1), cut(3, 3), cut(2, 7)], [None; 3]);
        assert_eq!([cut(4, 4), cut(5, 5), cut(5, 8), cut(8, 5), cut(10, 10)], [0, 2, 6, 6, 23].map(Some));
    }

    /// The expected values are of the exact distribution, counted with whole numbers apart from this code.
    #[test]
    fn many_runs_are_cut_as_the_exact_distribution_says_or_a_little_less() {
        assert_eq!([cut(50, 50), cut(51, 51), cut(100, 100)], [965, 1007, 4197].map(Some));
        assert_eq!([cut(30, 100), cut(4, 700), cut(1, 2600)], [Some(1145 - 1), Some(612 - 8), None]);
        assert_eq!(cut(MOST, MOST).map(|n| n / 1000), Some(7797));
    }

    #[test]
    fn a_file_of_too_many_medians_is_refused() {
        let run = |n: usize| {
            let row = serde_json::json!({"tokens": 512, "p50_ms": 1.0, "medians_ms": vec![1.0; n]});
            let (aoji, device) = ("0", "x");
            let run =
                serde_json::json!({"aoji": aoji, "date": "d", "device": device, "emulated": false, "decode": [row]});
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), run.to_string()).unwrap();
            (read(file.path()), file.path().display().to_string())
        };
        assert_eq!(run(MOST).0.ok().map(|r| r.rows().len()), Some(1));
        let (run, path) = run(MOST + 1);
        let expected = format!("{path}: decode at 512 has 4001 medians, and at most 4000 are compared");
        assert_eq!(run.err().map(|e| e.to_string()), Some(expected));
    }

    #[test]
    fn changes_and_noise() {
        let change = |a: &[f64], b: &[f64]| {
            let times = |v: &[f64]| Times { p50_ms: v[0], medians_ms: v.to_vec() };
            Change::new("x".into(), &times(a), &times(b))
        };
        let a = [10.0, 10.1, 9.9, 10.2, 9.8];
        let c = change(&a, &[9.0, 9.1, 8.9, 9.2, 8.8]);
        assert!(
            c.verdict == Verdict::Faster && (c.change + 0.1).abs() < 0.002 && c.low < c.change && c.change < c.high
        );
        assert_eq!(change(&a, &[11.0, 11.1, 10.9, 11.2, 10.8]).verdict, Verdict::Slower);
        assert_eq!(change(&a, &[10.0, 10.05, 10.1, 9.95, 9.85]).verdict, Verdict::WithinNoise);
        // a single disturbed run must not decide
        assert_eq!(change(&a, &[9.0, 9.1, 8.9, 9.2, 30.0]).verdict, Verdict::WithinNoise);
        let c = change(&[10.0], &[9.0]);
        assert!(c.verdict == Verdict::TooFewRuns && (c.change + 0.1).abs() < 1e-12, "{}", c.change);
    }
}
