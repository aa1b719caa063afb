//! `aoji bench --timeline`: one decode step on the clock of the device, as a trace for Perfetto and as a picture.

mod chrome;
mod picture;

use super::{Args, Header, table};
use crate::common;
use aoji::{
    Error, Result,
    bench::{self, Timed, Timeline},
};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    header: Header,
    model: String,
    /// The files that were written.
    files: [PathBuf; 2],
    /// Gaps between kernels divided by the layers, in microseconds, including those at both ends of the step.
    gap_us_per_layer: f64,
    #[serde(flatten)]
    timeline: Timeline,
}

/// The launches of one kernel with the same sizes.
struct Group<'a> {
    first: &'a Timed,
    n: usize,
    gap_us: f64,
    run_us: f64,
}

impl Group<'_> {
    /// Microseconds of the step that it takes: its gaps and its runs.
    fn us(&self) -> f64 {
        (self.gap_us + self.run_us).max(1e-3)
    }

    /// Rate over this time.
    fn gb_per_s(&self) -> f64 {
        (self.n as u64 * self.first.bytes) as f64 / (self.us() * 1e3)
    }
}

/// Traces, writes both files, and prints.
pub fn run(args: &Args, out: &Path) -> Result<()> {
    let engine = args.model.open()?;
    let depth =
        super::model::depths(&args.depth, engine.max_context(), bench::TIMELINE_STEPS).first().copied().unwrap_or(0);
    let timeline = bench::timeline(&engine, depth)?;
    let header = match engine.cuda() {
        Some(cuda) => Header::of_gpu(cuda.info()),
        None => Header::new(engine.device()),
    };
    let files = ["json", "svg"].map(|extension| {
        let mut name = out.as_os_str().to_owned();
        name.push(format!(".{extension}"));
        PathBuf::from(name)
    });
    let gap_us_per_layer = timeline.gaps_us() / timeline.n_layers as f64;
    let report = Report { header, model: args.model.model.clone(), files, gap_us_per_layer, timeline };
    write(&report.files[0], &chrome::trace(&report))?;
    write(&report.files[1], &picture::draw(&report))?;
    if args.json { common::print_json(&report) } else { common::print(&text(&report)) }
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|source| Error::Io { path: path.into(), source })
}

/// In the order of their first launches.
fn groups(t: &Timeline) -> Vec<Group<'_>> {
    let mut groups: Vec<Group> = Vec::new();
    for l in &t.launches {
        let known = groups.iter().position(|g| (&g.first.kernel, &g.first.case) == (&l.kernel, &l.case));
        let at = known.unwrap_or_else(|| {
            groups.push(Group { first: l, n: 0, gap_us: 0.0, run_us: 0.0 });
            groups.len() - 1
        });
        groups[at].n += 1;
        groups[at].gap_us += l.gap_us;
        groups[at].run_us += l.run_us;
    }
    groups
}

/// `gemv_bf16_add_r1_deep 1, 4096, 4096`: the kernel with the values of its case, `Gemv { rows: 1, n: 4096, k: 4096 }`.
fn label(l: &Timed) -> String {
    let fields = l.case.split_once('{').map_or("", |(_, fields)| fields.trim_end_matches('}'));
    let values: Vec<&str> = fields.split(',').filter_map(|f| Some(f.split_once(':')?.1.trim())).collect();
    format!("{} {}", l.kernel, values.join(", "))
}

/// What the pictures and the text say of the whole step.
fn summary(r: &Report) -> Vec<String> {
    let t = &r.timeline;
    let (sum, n) = t.sms.iter().fold((0.0, 0.0), |(sum, n), sm| (sum + sm.busy, n + 1.0));
    let least = t.sms.iter().map(|sm| sm.busy).fold(f64::INFINITY, f64::min);
    let most = t.sms.iter().map(|sm| sm.busy).fold(0.0, f64::max);
    let bytes = t.launches.iter().map(|l| l.bytes).sum::<u64>() as f64;
    let mut lines = vec![
        format!(
            "step {:.1} us on the device, {} launches; wall time of a step {:.1} us, {:.1} us without the trace",
            t.step_us,
            t.launches.len(),
            t.traced_us,
            t.untraced_us
        ),
        format!(
            "gaps between kernels {:.1} us in all, {:.2} us a layer; multiprocessors busy {:.1}% ({:.1}% to {:.1}%)",
            t.gaps_us(),
            r.gap_us_per_layer,
            100.0 * sum / n,
            100.0 * least,
            100.0 * most
        ),
        format!(
            "{:.1} MB that the ops must move: {:.1} GB/s over the step; the clock advances in steps of {} ns; a block's end is \
             its first thread's",
            bytes / 1e6,
            bytes / (t.step_us.max(1e-3) * 1e3),
            t.clock_ns
        ),
    ];
    if !t.silent.is_empty() {
        let silent: Vec<String> = t.silent.iter().map(|(kernel, n)| format!("{n} of {kernel}")).collect();
        lines.push(format!("launches that note no times and show as gaps: {}", silent.join(", ")));
    }
    lines
}

fn text(r: &Report) -> String {
    let mut text = r.header.text();
    text += &format!("{}: one decode step at depth {}\n", r.model, r.timeline.depth);
    summary(r).iter().for_each(|line| text += &format!("{line}\n"));
    let row = |g: &Group| {
        let n = g.n as f64;
        vec![
            label(g.first),
            g.n.to_string(),
            g.first.blocks.to_string(),
            format!("{:.2}", g.gap_us / n),
            format!("{:.2}", g.run_us / n),
            format!("{:.1}", g.us()),
            format!("{:.1}%", 100.0 * g.us() / r.timeline.step_us.max(1e-3)),
            format!("{:.3}", g.first.bytes as f64 / 1e6),
            format!("{:.1}", g.gb_per_s()),
        ]
    };
    let columns = ["kernel", "launches", "blocks", "gap us", "run us", "us in all", "of step", "MB each", "GB/s"];
    text += &format!("\n{}", table::table(&columns, &groups(&r.timeline).iter().map(row).collect::<Vec<_>>()));
    let [json, svg] = &r.files;
    text + &format!("\n{} opens in https://ui.perfetto.dev, {} in a browser.\n", json.display(), svg.display())
}
