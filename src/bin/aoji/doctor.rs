//! `aoji doctor`: what this machine has, what is missing, and how to mend it.

use crate::common;
use aoji::{Result, hub};
use serde::Serialize;
use std::fmt::Write;

/// Arguments of `aoji doctor`.
#[derive(clap::Args)]
#[command(after_help = "The exit code is 0 whenever something can run, and the CPU always can.")]
pub struct Args {
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// All that is printed.
#[derive(Serialize)]
struct Report {
    aoji: &'static str,
    commit: Option<String>,
    /// Where `--device auto` runs: `cuda` or `cpu`.
    runs_on: &'static str,
    /// CUDA version that the driver supports.
    driver: Option<String>,
    /// The driver's own version, where the system tells it.
    driver_release: Option<String>,
    gpus: Vec<Gpu>,
    kernels: Kernels,
    /// Version and place of cuBLAS, which prompts can use; without it they run on our own kernel.
    cublas: Option<String>,
    cpu_threads: usize,
    cache: Option<Cache>,
    problems: Vec<Problem>,
}

#[derive(Serialize)]
struct Gpu {
    name: String,
    capability: String,
    memory_bytes: u64,
    sm_count: u32,
    l2_bytes: u64,
    /// Which of the kernels' images it runs: `90`, or `ptx90`, which the driver compiles at each start.
    image: Option<String>,
}

#[derive(Serialize, Default)]
struct Kernels {
    files: usize,
    functions: usize,
    images: Vec<String>,
    nvcc: String,
    bytes: usize,
}

#[derive(Serialize)]
struct Cache {
    dir: String,
    exists: bool,
}

#[derive(Serialize)]
struct Problem {
    what: String,
    mend: String,
}

/// Looks, and prints.
pub fn run(args: Args) -> Result<()> {
    let report = examine();
    if args.json { common::print_json(&report) } else { common::print(&text(&report)) }
}

fn examine() -> Report {
    let cache = hub::Cache::from_env().map(|c| Cache { dir: c.dir().display().to_string(), exists: c.dir().is_dir() });
    let mut report = Report {
        aoji: env!("CARGO_PKG_VERSION"),
        commit: aoji::bench::commit(),
        runs_on: "cpu",
        driver: None,
        driver_release: driver_release(),
        gpus: Vec::new(),
        kernels: Kernels::default(),
        cublas: None,
        cpu_threads: std::thread::available_parallelism().map_or(1, usize::from),
        cache,
        problems: Vec::new(),
    };
    if report.cache.is_none() {
        report.problem("no place for downloaded models", "set HF_HOME to a directory");
    }
    examine_gpu(&mut report);
    report
}

#[cfg(not(feature = "cuda"))]
fn examine_gpu(report: &mut Report) {
    report.problem("this binary was built without the feature `cuda`", "build it with the default features");
}

#[cfg(feature = "cuda")]
fn examine_gpu(report: &mut Report) {
    use aoji::cuda::{self, kernels};
    report.kernels = Kernels {
        files: kernels::MODULES.len(),
        functions: kernels::MODULES
            .iter()
            .map(|m| m.usage().iter().map(|u| &u.kernel).collect::<std::collections::BTreeSet<_>>().len())
            .sum(),
        images: kernels::IMAGES.split(',').filter(|i| !i.is_empty()).map(String::from).collect(),
        nvcc: kernels::NVCC.into(),
        bytes: kernels::MODULES.iter().map(|m| m.image.len()).sum(),
    };
    if kernels::MODULES.is_empty() {
        let mend = "build it without AOJI_SKIP_KERNELS";
        report.problem("this binary was built without GPU kernels", mend);
    }
    match cuda::driver_version() {
        Ok(v) => report.driver = Some(format!("{}.{}", v / 1000, v % 1000 / 10)),
        Err(e) => {
            let mend = "with an NVIDIA GPU: install the driver, version 580 or newer; in a container: start it with --gpus all";
            return report.problem(e, mend);
        }
    }
    let gpus = match cuda::devices() {
        Ok(gpus) => gpus,
        Err(e) => return report.problem(e, "see whether nvidia-smi works; after an update of the driver, restart"),
    };
    if gpus.is_empty() {
        report.problem("the driver shows no GPU", "see nvidia-smi, and what CUDA_VISIBLE_DEVICES says");
    }
    for gpu in &gpus {
        let (major, minor) = gpu.capability;
        let image = kernels::image_for(kernels::IMAGES, gpu.capability).map(String::from);
        match image.as_deref() {
            None if (major, minor) < (8, 0) => {
                let what = format!("{} has compute capability {major}.{minor}, aoji needs 8.0 (Ampere)", gpu.name);
                report.problem(what, "use a newer GPU, or --device cpu");
            }
            None if !kernels::MODULES.is_empty() => {
                let what = format!("no kernels for {} (sm_{major}{minor}) in this binary", gpu.name);
                report
                    .problem(what, &format!("build it with AOJI_CUDA_ARCHS={major}{minor}, or without that variable"));
            }
            _ => {}
        }
        report.gpus.push(Gpu {
            name: gpu.name.clone(),
            capability: format!("{major}.{minor}"),
            memory_bytes: gpu.memory,
            sm_count: gpu.sm_count,
            l2_bytes: gpu.l2_bytes,
            image,
        });
    }
    if gpus.is_empty() || kernels::MODULES.is_empty() {
        return;
    }
    match cuda::Cuda::open(0) {
        Ok(_) => {
            report.runs_on = "cuda";
            report.cublas = cuda::cublas_version().ok();
        }
        Err(e) => report.problem(e, "update the driver to version 580 or newer, or use --device cpu"),
    }
}

impl Report {
    fn problem(&mut self, what: impl ToString, mend: &str) {
        self.problems.push(Problem { what: what.to_string(), mend: mend.into() });
    }
}

/// `580.159.04`, as Linux's module of the driver says.
fn driver_release() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let is_version = |w: &&str| w.split('.').count() >= 2 && w.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    text.lines().next()?.split_whitespace().find(is_version).map(String::from)
}

fn text(r: &Report) -> String {
    let mut s = String::new();
    let mut line = |name: &str, value: String| writeln!(s, "{name:<10}{value}").expect("a String takes all");
    line("aoji", format!("{}{}", r.aoji, r.commit.as_ref().map_or(String::new(), |c| format!(" ({c})"))));
    let release = r.driver_release.as_ref().map_or(String::new(), |v| format!(", release {v}"));
    line("driver", r.driver.as_ref().map_or("none".into(), |v| format!("CUDA {v}{release}")));
    for (i, g) in r.gpus.iter().enumerate() {
        let image = g.image.as_ref().map_or("no kernels for it".into(), |i| format!("kernels {i}"));
        let gib = g.memory_bytes as f64 / (1u64 << 30) as f64;
        line(
            &format!("GPU {i}"),
            format!("{}, sm_{}, {gib:.1} GiB, {} SMs, {image}", g.name, g.capability.replace('.', ""), g.sm_count),
        );
    }
    let k = &r.kernels;
    line(
        "kernels",
        match k.files {
            0 => "none in this binary".into(),
            _ => format!(
                "{} in {} files for {}, {:.1} MB, by nvcc {}",
                k.functions,
                k.files,
                k.images.join(" "),
                k.bytes as f64 / 1e6,
                k.nvcc
            ),
        },
    );
    if r.runs_on == "cuda" {
        let none = "none: long prompts run on our own kernel (AOJI_CUBLAS_DIR names a folder with libcublas)";
        line("cuBLAS", r.cublas.clone().unwrap_or_else(|| none.into()));
    }
    line("CPU", format!("{} threads", r.cpu_threads));
    if let Some(c) = &r.cache {
        line("models", format!("{}{}", c.dir, if c.exists { "" } else { " (not there yet; aoji pull makes it)" }));
    }
    line("runs on", r.runs_on.into());
    for p in &r.problems {
        s.push_str(&format!("\nmissing: {}\n    fix: {}\n", p.what, p.mend));
    }
    s
}
