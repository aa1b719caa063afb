//! `aoji bench --kernels`: runs each op's cases on the GPU, and compares them with what the GPU could do at best, and
//! with variants of the kernel lab.

use super::{Args, Header, roofline, table};
use crate::common;
use aoji::{
    Error, Result,
    bench::{self, Check, KernelOptions, KernelResult, Peak},
    cuda::{
        Cuda, Info, Launched,
        kernels::{IMAGES, MODULES, Module, Usage, image_for, usage},
        lab,
        occupancy::{Occupancy, occupancy},
    },
    ops::Cost,
};
use serde::Serialize;
use std::fs;

/// What `--json` prints, and what the ledger reads.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    header: Header,
    peak: Option<Peak>,
    kernels: Vec<Source>,
    /// The variants.
    lab: Vec<Source>,
    cases: Vec<Row>,
}

/// A kernel's file.
#[derive(Serialize)]
struct Source {
    op: &'static str,
    variant: Option<&'static str>,
    /// Version of its source.
    source: &'static str,
    /// Cases compared with the reference.
    checked: usize,
    /// Whether all cases that ran were right.
    passed: bool,
    /// Registers, local and shared memory of its kernels on this GPU.
    usage: Vec<Usage>,
}

#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    result: KernelResult,
    /// At the median.
    gb_per_s: Option<f64>,
    tflops: Option<f64>,
    /// The least time that the measured rates allow.
    floor_us: Option<f64>,
    /// The floor over the median.
    share: Option<f64>,
    /// Flops for each byte.
    intensity: f64,
    /// What bounds it at this intensity, by the measured rates: `memory` or `compute`.
    roof: Option<&'static str>,
    launches: Vec<Geometry>,
}

/// A launch of a case, and what it needs on a multiprocessor.
#[derive(Serialize)]
struct Geometry {
    kernel: String,
    blocks: [u32; 3],
    threads: u32,
    /// Registers of a thread; absent if the driver compiles the kernel.
    registers: Option<u32>,
    /// Bytes of shared memory of a block, static and dynamic together.
    shared: Option<u32>,
    #[serde(flatten)]
    occupancy: Option<Occupancy>,
}

impl Geometry {
    fn new(launched: &Launched, gpu: &Info, image: Option<&str>) -> Geometry {
        let Launched { kernel, grid } = launched;
        let usage = image.and_then(|image| usage(kernel, image));
        let shared = usage.as_ref().map(|u| u.shared + grid.shared);
        let of = |(u, shared): (&Usage, u32)| occupancy(gpu.capability, grid.threads, u.registers, shared);
        Geometry {
            kernel: kernel.clone(),
            blocks: grid.blocks,
            threads: grid.threads,
            registers: usage.as_ref().map(|u| u.registers),
            shared,
            occupancy: usage.as_ref().zip(shared).and_then(of),
        }
    }
}

impl Row {
    fn new(result: KernelResult, peak: Option<&Peak>, gpu: &Info, image: Option<&str>) -> Row {
        let ms = result.times.as_ref().map(|t| t.p50_ms);
        let (read, write, flops) = (result.read_bytes, result.write_bytes, result.flops);
        let floor = peak.map(|p| p.floor_ms(Cost { read, write, flops }));
        let intensity = flops as f64 / (read + write).max(1) as f64;
        let roof = |p: &Peak| {
            let ridge = p.matmul_tflops? * 1e3 / p.read_gb_per_s;
            Some(if intensity < ridge { "memory" } else { "compute" })
        };
        Row {
            gb_per_s: ms.map(|ms| (read + write) as f64 / (ms * 1e6)),
            tflops: ms.map(|ms| flops as f64 / (ms * 1e9)),
            floor_us: floor.map(|ms| ms * 1e3),
            share: floor.zip(ms).map(|(floor, ms)| floor / ms),
            intensity,
            roof: peak.and_then(roof),
            launches: result.launches.iter().map(|l| Geometry::new(l, gpu, image)).collect(),
            result,
        }
    }

    /// A line of the table.
    fn cells(&self, emulated: bool) -> Vec<String> {
        let result = &self.result;
        // of several launches, the one that fills a multiprocessor least
        let launch = self.launches.iter().min_by_key(|l| l.occupancy.map(|o| o.blocks_per_sm));
        let whole = |n: Option<u32>| n.map_or("-".into(), |n| n.to_string());
        let occupancy = launch.and_then(|l| l.occupancy);
        vec![
            // a variant has its line below the shipped kernel's
            result.variant.map_or(result.case.clone(), |v| format!("  {v}")),
            table::number(result.times.as_ref().map(|t| t.p50_ms * 1e3), 2),
            table::number(self.gb_per_s, 1),
            table::number(self.tflops, 2),
            table::number(self.floor_us, 2),
            table::percent(self.share),
            table::number(Some(self.intensity), 2),
            self.roof.unwrap_or("-").into(),
            whole(launch.and_then(|l| l.registers)),
            whole(launch.and_then(|l| l.shared)),
            whole(occupancy.map(|o| o.blocks_per_sm)),
            table::percent(occupancy.map(|o| o.occupancy)),
            occupancy.map_or("-", |o| o.limit).into(),
            if result.cold { "cold" } else { "warm" }.into(),
            match result.check {
                Check::Passed => "ok",
                Check::Skipped => "-",
                Check::Failed(_) => "WRONG",
            }
            .into(),
            match &result.ratio {
                Some(_) if emulated => "-".into(), // emulated times mean nothing
                Some(x) => format!("{:.3} ({:.3} to {:.3}) {}", x.p50, x.low, x.high, x.verdict()),
                None => String::new(),
            },
        ]
    }
}

/// Measures and prints. Fails when a case is wrong.
pub fn run(args: &Args) -> Result<()> {
    // AOJI_LAB is ignored: what is called shipped here must be shipped
    let cuda = Cuda::open_with(super::ordinal(args.model.device)?, &[])?;
    let header = Header::of_gpu(cuda.info());
    let peak = if header.emulated || args.once { None } else { Some(Peak::measure(&cuda)?) };
    let image = image_for(IMAGES, cuda.info().capability).map(|i| format!("sm_{i}"));
    let stem = args.kernels.clone().filter(|s| !s.is_empty());
    let variants = match &args.lab {
        Some(name) => lab::select(stem.as_deref(), Some(name.as_str()).filter(|n| !n.is_empty()))?,
        None => Vec::new(),
    };
    let options = KernelOptions {
        stem,
        small: args.small,
        check: args.check,
        repeat: if args.once || header.emulated { 1 } else { 20 * args.repeat },
        once: args.once || header.emulated,
        variants,
    };
    let mut cases = Vec::new();
    bench::kernels(&cuda, &options, &mut |result| {
        common::note(format_args!("{} {}", result.case, result.variant.unwrap_or_default()));
        cases.push(Row::new(result, peak.as_ref(), cuda.info(), image.as_deref()));
    })?;
    let source = |m: &Module, op, variant| source(&cases, m, op, variant, image.as_deref());
    let kernels = MODULES.iter().filter_map(|m| source(m, m.stem, None)).collect();
    let lab = options.variants.iter().filter_map(|v| source(&v.module, v.op, Some(v.name))).collect();
    let report = Report { header, peak, kernels, lab, cases };
    if let Some(path) = &args.svg {
        let io = |source| Error::Io { path: path.clone(), source };
        fs::write(path, picture(&report)).map_err(io)?;
    }
    if args.json {
        common::print_json(&report)?;
    } else {
        common::print(&text(&report))?;
    }
    let wrong: Vec<&Row> = report.cases.iter().filter(|r| matches!(r.result.check, Check::Failed(_))).collect();
    match wrong.first() {
        None => Ok(()),
        Some(Row { result: KernelResult { check: Check::Failed(why), case, variant, .. }, .. }) => {
            let first = variant.map_or(case.clone(), |v| format!("{case} by {v}"));
            let (n, of) = (wrong.len(), report.cases.len());
            Err(Error::Disagree(format!("{n} of {of} cases failed, first {first}: {why}")))
        }
        Some(_) => unreachable!("filtered above"),
    }
}

/// A file of which some kernel ran. A kernel that lives in the file of another op is counted there.
fn source(
    cases: &[Row],
    m: &Module,
    op: &'static str,
    variant: Option<&'static str>,
    image: Option<&str>,
) -> Option<Source> {
    let results = cases.iter().map(|r| &r.result).filter(|r| r.op == op && r.variant == variant).collect::<Vec<_>>();
    (!results.is_empty()).then(|| Source {
        op,
        variant,
        source: m.hash,
        checked: results.iter().filter(|r| r.check == Check::Passed).count(),
        passed: results.iter().all(|r| !matches!(r.check, Check::Failed(_))),
        usage: m.usage().into_iter().filter(|u| Some(u.arch.as_str()) == image).collect(),
    })
}

/// The plot: each case that has arithmetic and a time, under the measured roofs.
fn picture(r: &Report) -> String {
    let point = |row: &Row| {
        let (ms, tflops) = row.result.times.as_ref().map(|t| t.p50_ms).zip(row.tflops)?;
        let KernelResult { op, case, variant, .. } = &row.result;
        let share = row.share.map_or(String::new(), |s| format!(", {} of the floor", table::percent(Some(s))));
        Some(roofline::Point {
            label: format!("{case}{}: {:.2} us{share}", variant.map_or(String::new(), |v| format!(" {v}")), ms * 1e3),
            group: op,
            variant: variant.is_some(),
            intensity: row.intensity,
            tflops,
        })
    };
    let points: Vec<_> = r.cases.iter().filter_map(point).collect();
    roofline::svg(&r.header.text(), r.peak.as_ref(), &points)
}

fn text(r: &Report) -> String {
    let mut text = r.header.text();
    if let Some(p) = r.peak {
        text += &super::model::peak_text(&p);
    }
    let rows: Vec<Vec<String>> = r.cases.iter().map(|row| row.cells(r.header.emulated)).collect();
    let ratio = if r.lab.is_empty() { "" } else { "of shipped (95%)" };
    let time = ["", "us p50", "GB/s", "TFLOP/s", "floor us", "of floor", "flop/B", "roof"];
    let sm = ["registers", "shared B", "blocks/SM", "occupancy", "limit", "L2", "result", ratio];
    text += "\n";
    text += &table::table(&[time, sm].concat(), &rows);
    for u in r.kernels.iter().chain(&r.lab).flat_map(|s| &s.usage).filter(|u| u.spills > 0) {
        text += &format!("\n{} spills {} bytes\n", u.kernel, u.spills);
    }
    for row in &r.cases {
        if let Check::Failed(why) = &row.result.check {
            text += &format!("\n{} {}: {why}\n", row.result.case, row.result.variant.unwrap_or_default());
        }
    }
    text
}
