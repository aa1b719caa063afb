//! Prefill and decode of a whole model.

use super::{Args, Header, table};
use crate::common;
use aoji::{
    Config, Engine, Result,
    bench::{self, Times},
};
use serde::Serialize;

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    header: Header,
    model: Model,
    peak: Option<Peak>,
    prefill: Vec<Row>,
    decode: Vec<Row>,
}

#[derive(Serialize)]
struct Model {
    name: String,
    params: u64,
    weight_bytes: u64,
    #[serde(flatten)]
    config: Sizes,
    context: usize,
}

#[derive(Serialize)]
struct Sizes {
    dim: usize,
    ffn_dim: usize,
    n_layers: usize,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    vocab: usize,
}

/// The machine's best rates, measured in this run.
#[derive(Serialize, Clone, Copy)]
struct Peak {
    copy_gb_per_s: f64,
    matmul_tflops: Option<f64>,
}

/// Times of one length of prompt, or of a step at one depth.
#[derive(Serialize)]
struct Row {
    /// Of the prompt, or before the step.
    tokens: usize,
    #[serde(flatten)]
    times: Times,
    /// At the median.
    tokens_per_s: f64,
    /// That its ops must move at least: each weight once, the cache, and activations.
    bytes: u64,
    flops: u64,
    /// At the median.
    gb_per_s: f64,
    tflops: f64,
    /// In which nothing could be faster, by the measured rates.
    floor_ms: Option<f64>,
    /// The floor over the median.
    share: Option<f64>,
}

impl Row {
    fn new(config: &Config, depth: usize, rows: usize, times: Times, peak: Option<Peak>) -> Result<Row> {
        let cost = bench::floor(config, depth, rows)?;
        let (bytes, flops, ms) = (cost.read + cost.write, cost.flops, times.p50_ms);
        let floor_ms = peak.map(|p| {
            let memory = bytes as f64 / (p.copy_gb_per_s * 1e6);
            p.matmul_tflops.map_or(memory, |t| memory.max(flops as f64 / (t * 1e9)))
        });
        Ok(Row {
            tokens: if depth > 0 { depth } else { rows },
            tokens_per_s: rows as f64 * 1e3 / ms,
            bytes,
            flops,
            gb_per_s: bytes as f64 / (ms * 1e6),
            tflops: flops as f64 / (ms * 1e9),
            floor_ms,
            share: floor_ms.map(|f| f / ms),
            times,
        })
    }

    fn cells(&self, name: String) -> Vec<String> {
        let t = &self.times;
        vec![
            name,
            format!("{:.3}", t.p50_ms),
            format!("{:.3}", t.p99_ms),
            format!("{:.1}", self.tokens_per_s),
            format!("{:.1}", self.gb_per_s),
            format!("{:.2}", self.tflops),
            table::number(self.floor_ms, 3),
            table::percent(self.share),
        ]
    }
}

/// Measures the model that the arguments name.
pub fn run(args: &Args) -> Result<()> {
    let engine = args.model.open()?;
    let (header, peak) = machine(args, &engine)?;
    let (config, max) = (engine.config(), engine.max_context());
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for &n in args.prefill.iter().filter(|n| (1..=max).contains(*n)) {
        common::note(format_args!("prefill {n}"));
        let times = bench::prefill(&engine, n, args.repeat)?;
        prefill.push(Row::new(config, 0, n, times, peak)?);
    }
    for depth in depths(&args.depth, max, args.tokens) {
        common::note(format_args!("decode at depth {depth}"));
        let times = bench::decode(&engine, depth, args.tokens)?;
        let middle = depth.max(1) + bench::WARM_UP + args.tokens / 2; // the depth grows as it runs
        decode.push(Row { tokens: depth, ..Row::new(config, middle, 1, times, peak)? });
    }
    let sizes = Sizes {
        dim: config.dim,
        ffn_dim: config.ffn_dim,
        n_layers: config.n_layers,
        n_heads: config.n_heads,
        n_kv_heads: config.n_kv_heads,
        head_dim: config.head_dim,
        vocab: config.vocab,
    };
    let model = Model {
        name: args.model.model.clone(),
        params: config.params(),
        weight_bytes: config.weight_bytes(),
        config: sizes,
        context: max,
    };
    let report = Report { header, model, peak, prefill, decode };
    if args.json { common::print_json(&report) } else { common::print(&text(&report)) }
}

/// Each depth that fits; one that does not is moved to the deepest that does.
fn depths(asked: &[usize], max: usize, tokens: usize) -> Vec<usize> {
    let deepest = max.saturating_sub(bench::decode_context(0, tokens) - 1);
    let mut depths: Vec<usize> = asked.iter().map(|d| *d.min(&deepest)).collect();
    depths.dedup();
    depths
}

/// What is measured of the machine itself: nothing where it is emulated.
fn machine(args: &Args, engine: &Engine) -> Result<(Header, Option<Peak>)> {
    #[cfg(feature = "cuda")]
    if engine.is_gpu() {
        let cuda = aoji::cuda::Cuda::open(super::ordinal(args.model.device)?)?;
        let header = Header::of_gpu(cuda.info());
        if header.emulated {
            return Ok((header, None));
        }
        let p = bench::Peak::measure(&cuda)?;
        let peak = Peak { copy_gb_per_s: p.copy_gb_per_s, matmul_tflops: p.matmul_tflops };
        return Ok((header, Some(peak)));
    }
    let _ = args;
    let peak = Peak { copy_gb_per_s: bench::host_copy_bandwidth(256 << 20), matmul_tflops: None };
    Ok((Header::new(engine.device()), Some(peak)))
}

fn text(r: &Report) -> String {
    let m = &r.model;
    let (params, bytes) = (m.params as f64 / 1e9, m.weight_bytes as f64 / 1e9);
    let mut text = r.header.text();
    text += &format!("{}: {params:.3} G parameters, {bytes:.3} GB of weights, context {}\n", m.name, m.context);
    if let Some(p) = r.peak {
        text += &format!("measured now: copy {:.1} GB/s", p.copy_gb_per_s);
        if let Some(t) = p.matmul_tflops {
            text += &format!(", matrix product {t:.1} TFLOP/s");
        }
        text.push('\n');
    }
    let header = ["", "ms p50", "ms p99", "tokens/s", "GB/s", "TFLOP/s", "floor ms", "of floor"];
    let prefill = r.prefill.iter().map(|row| row.cells(format!("prefill {}", row.tokens)));
    let decode = r.decode.iter().map(|row| row.cells(format!("decode at {}", row.tokens)));
    text + "\n" + &table::table(&header, &prefill.chain(decode).collect::<Vec<_>>())
}
