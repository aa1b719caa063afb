//! `aoji bench --kernels`: each op's cases on the GPU, against what the GPU could do.

use super::{Args, Header, table};
use crate::common;
use aoji::{
    Error, Result,
    bench::{self, Check, KernelOptions, KernelResult, Peak},
    cuda::{
        Cuda,
        kernels::{IMAGES, MODULES, Usage, image_for},
    },
    ops::Cost,
};
use serde::Serialize;

/// What `--json` prints, and what the ledger reads.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    header: Header,
    peak: Option<Peak>,
    kernels: Vec<Source>,
    cases: Vec<Row>,
}

/// A kernel's file.
#[derive(Serialize)]
struct Source {
    op: &'static str,
    /// Version of its source.
    source: &'static str,
    /// Cases compared with the reference.
    checked: usize,
    /// All that ran were right.
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
    /// In which nothing could be faster, by the measured rates.
    floor_us: Option<f64>,
    /// The floor over the median.
    share: Option<f64>,
}

impl Row {
    fn new(result: KernelResult, peak: Option<&Peak>) -> Row {
        let ms = result.times.as_ref().map(|t| t.p50_ms);
        let (read, write, flops) = (result.read_bytes, result.write_bytes, result.flops);
        let floor = peak.map(|p| p.floor_ms(Cost { read, write, flops }));
        Row {
            gb_per_s: ms.map(|ms| (read + write) as f64 / (ms * 1e6)),
            tflops: ms.map(|ms| flops as f64 / (ms * 1e9)),
            floor_us: floor.map(|ms| ms * 1e3),
            share: floor.zip(ms).map(|(floor, ms)| floor / ms),
            result,
        }
    }
}

/// Measures, and prints; fails when a case is wrong.
pub fn run(args: &Args) -> Result<()> {
    let cuda = Cuda::open(super::ordinal(args.model.device)?)?;
    let header = Header::of_gpu(cuda.info());
    let peak = if header.emulated || args.once { None } else { Some(Peak::measure(&cuda)?) };
    let options = KernelOptions {
        stem: args.kernels.clone().filter(|s| !s.is_empty()),
        small: args.small,
        check: args.check,
        repeat: if args.once || header.emulated { 1 } else { 20 * args.repeat },
        once: args.once || header.emulated,
    };
    let mut cases = Vec::new();
    bench::kernels(&cuda, &options, &mut |result| {
        common::note(format_args!("{}", result.case));
        cases.push(Row::new(result, peak.as_ref()));
    })?;
    let image = image_for(IMAGES, cuda.info().capability).map(|i| format!("sm_{i}"));
    let report = Report { header, peak, kernels: sources(&cases, image.as_deref()), cases };
    if args.json {
        common::print_json(&report)?;
    } else {
        common::print(&text(&report))?;
    }
    let wrong: Vec<&Row> = report.cases.iter().filter(|r| matches!(r.result.check, Check::Failed(_))).collect();
    match wrong.first() {
        None => Ok(()),
        Some(Row { result: KernelResult { check: Check::Failed(why), case, .. }, .. }) => {
            Err(Error::Disagree(format!("{} of {} cases failed, first {case}: {why}", wrong.len(), report.cases.len())))
        }
        Some(_) => unreachable!("filtered above"),
    }
}

/// The files of the ops that ran. A kernel that lives in another op's file is that file's.
fn sources(cases: &[Row], image: Option<&str>) -> Vec<Source> {
    let of = |stem: &str| cases.iter().map(|r| &r.result).filter(|r| r.op == stem).collect::<Vec<_>>();
    let ran = MODULES.iter().map(|m| (m, of(m.stem))).filter(|(_, results)| !results.is_empty());
    ran.map(|(m, results)| Source {
        op: m.stem,
        source: m.hash,
        checked: results.iter().filter(|r| r.check == Check::Passed).count(),
        passed: results.iter().all(|r| !matches!(r.check, Check::Failed(_))),
        usage: m.usage().into_iter().filter(|u| Some(u.arch.as_str()) == image).collect(),
    })
    .collect()
}

fn text(r: &Report) -> String {
    let mut text = r.header.text();
    if let Some(p) = r.peak {
        text += &super::model::peak_text(&p);
    }
    let rows: Vec<Vec<String>> = r
        .cases
        .iter()
        .map(|row| {
            let us = row.result.times.as_ref().map(|t| t.p50_ms * 1e3);
            let check = match &row.result.check {
                Check::Passed => "ok",
                Check::Skipped => "-",
                Check::Failed(_) => "WRONG",
            };
            vec![
                row.result.case.clone(),
                table::number(us, 2),
                table::number(row.gb_per_s, 1),
                table::number(row.tflops, 2),
                table::number(row.floor_us, 2),
                table::percent(row.share),
                if row.result.cold { "cold" } else { "warm" }.into(),
                check.into(),
            ]
        })
        .collect();
    text += "\n";
    text += &table::table(&["", "us p50", "GB/s", "TFLOP/s", "floor us", "of floor", "L2", "result"], &rows);
    let usage = r.kernels.iter().flat_map(|k| &k.usage);
    let rows: Vec<Vec<String>> = usage
        .map(|u| vec![u.kernel.clone(), u.registers.to_string(), u.shared.to_string(), u.spills.to_string()])
        .collect();
    if !rows.is_empty() {
        text += "\n";
        text += &table::table(&["kernel", "registers", "static shared bytes", "spilled bytes"], &rows);
    }
    for row in &r.cases {
        if let Check::Failed(why) = &row.result.check {
            text += &format!("\n{}: {why}\n", row.result.case);
        }
    }
    text
}
