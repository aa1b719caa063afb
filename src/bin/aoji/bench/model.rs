//! Measures prefill and decode of a whole model.

use super::{Args, Header, table};
use crate::common;
use aoji::{
    Config, Engine, KvDtype, Result,
    bench::{self, Peak, Times},
    cpu::Cpu,
    ops::Cost,
};
use half::bf16;
use serde::{Deserialize, Serialize};
use std::num::NonZeroUsize;

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    header: Header,
    model: Model,
    peak: Option<Peak>,
    prefill: Vec<Row>,
    decode: Vec<Row>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    together: Vec<Row>,
}

#[derive(Serialize)]
struct Model {
    name: String,
    params: u64,
    weight_bytes: u64,
    #[serde(flatten)]
    config: Sizes,
    context: usize,
    /// How keys and values are stored.
    kv: KvDtype,
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

/// Times of one length of prompt, or of a step at one depth.
#[derive(Serialize, Deserialize)]
pub struct Row {
    /// Tokens of the prompt, or before the step.
    pub tokens: usize,
    /// Sequences that decode together.
    #[serde(skip_serializing_if = "Option::is_none")]
    sequences: Option<usize>,
    #[serde(flatten)]
    pub times: Times,
    /// At the median time.
    pub tokens_per_s: f64,
    /// Bytes that its ops must move at least: each weight once, the cache, and activations.
    bytes: u64,
    flops: u64,
    /// At the median time.
    gb_per_s: f64,
    pub tflops: f64,
    /// The least time that the measured rates allow.
    pub floor_ms: Option<f64>,
    /// The floor over the median. For decoding it is also the share of the read bandwidth.
    pub share: Option<f64>,
    /// The median minus the floor, divided by the number of layers.
    pub over_floor_us_per_layer: Option<f64>,
    /// For decoding on a GPU: the time that the host works for a step, apart from waiting.
    #[serde(skip_serializing_if = "Option::is_none")]
    host_us: Option<f64>,
}

/// Turns a cost that was counted with weights of 16 bits into one with the engine's weights.
fn less(engine: &Engine, cost: Cost) -> Cost {
    Cost { read: cost.read - engine.kept().unread, ..cost }
}

impl Row {
    fn new(engine: &Engine, depth: usize, rows: usize, times: Times, peak: Option<&Peak>) -> Result<Row> {
        let config = engine.config();
        Ok(Row::of(
            config,
            less(engine, bench::floor(config, engine.plan().kv_dtype, depth, rows)?),
            depth,
            rows,
            times,
            peak,
        ))
    }

    /// A row for `rows` tokens at `cost`.
    fn of(config: &Config, cost: Cost, depth: usize, rows: usize, times: Times, peak: Option<&Peak>) -> Row {
        let (bytes, flops, ms) = (cost.read + cost.write, cost.flops, times.p50_ms);
        let floor_ms = peak.map(|p| p.floor_ms(cost));
        Row {
            tokens: if depth > 0 { depth } else { rows },
            sequences: None,
            tokens_per_s: rows as f64 * 1e3 / ms,
            bytes,
            flops,
            gb_per_s: bytes as f64 / (ms * 1e6),
            tflops: flops as f64 / (ms * 1e9),
            floor_ms,
            share: floor_ms.map(|f| f / ms),
            over_floor_us_per_layer: floor_ms.map(|f| (ms - f) * 1e3 / config.n_layers as f64),
            host_us: None,
            times,
        }
    }

    fn cells(&self) -> [String; 4] {
        let (name, t) = (self.tokens.to_string(), &self.times);
        [name, format!("{:.3}", t.p50_ms), format!("{:.3}", t.p99_ms), format!("{:.1}", self.tokens_per_s)]
    }

    fn decode_cells(&self) -> Vec<String> {
        let cells = [
            format!("{:.1}", self.bytes as f64 / 1e6),
            format!("{:.1}", self.gb_per_s),
            table::number(self.floor_ms, 3),
            table::percent(self.share),
            table::number(self.over_floor_us_per_layer, 2),
            table::number(self.host_us, 1),
        ];
        [&self.cells()[..], &cells].concat()
    }

    fn together_cells(&self) -> Vec<String> {
        let sequences = self.sequences.unwrap_or(1);
        let name = format!("{sequences} at {}", self.tokens);
        let each = self.tokens_per_s / sequences as f64;
        let cells = [
            format!("{each:.1}"),
            format!("{:.1}", self.gb_per_s),
            table::number(self.floor_ms, 3),
            table::percent(self.share),
        ];
        [&[name], &self.cells()[1..], &cells].concat()
    }

    fn prefill_cells(&self) -> Vec<String> {
        let cells = [format!("{:.2}", self.tflops), table::number(self.floor_ms, 3), table::percent(self.share)];
        [&self.cells()[..], &cells].concat()
    }
}

/// Measures the model that the arguments name.
pub fn run(args: &Args) -> Result<()> {
    let engine = args.model.open()?;
    let (header, peak) = machine(&engine, args.model.threads)?;
    let (config, max) = (engine.config(), engine.max_context());
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for &n in args.prefill.iter().filter(|n| (1..=max).contains(*n)) {
        common::note(format_args!("prefill {n}"));
        let times = bench::prefill(&engine, n, args.repeat)?;
        prefill.push(Row::new(&engine, 0, n, times, peak.as_ref())?);
    }
    for depth in depths(&args.depth, max, args.tokens) {
        common::note(format_args!("decode at depth {depth}"));
        let bench::Decode { times, host_us } = bench::decode(&engine, depth, args.tokens, args.repeat)?;
        let middle = depth.max(1) + bench::WARM_UP + args.tokens / 2; // the depth grows as it runs
        decode.push(Row { tokens: depth, host_us, ..Row::new(&engine, middle, 1, times, peak.as_ref())? });
    }
    let mut together = Vec::new();
    for &n in &args.sequences {
        for &depth in args.depth.iter().filter(|d| bench::together_context(n, **d, args.tokens) <= max) {
            common::note(format_args!("{n} sequences at depth {depth}"));
            let times = bench::decode_together(&engine, n, depth, args.tokens, args.repeat)?;
            let middle = depth.max(1) + bench::WARM_UP + args.tokens / 2;
            let cost = less(&engine, bench::floor_together(config, engine.plan().kv_dtype, middle, n)?);
            let row = Row::of(config, cost, middle, n, times, peak.as_ref());
            together.push(Row { tokens: depth, sequences: Some(n), ..row });
        }
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
        weight_bytes: config.weight_bytes() - engine.kept().saved,
        config: sizes,
        context: max,
        kv: engine.plan().kv_dtype,
    };
    let report = Report { header, model, peak, prefill, decode, together };
    if args.json { common::print_json(&report) } else { common::print(&text(&report)) }
}

/// Each depth that fits; a depth that does not is replaced by the deepest that does.
pub fn depths(asked: &[usize], max: usize, tokens: usize) -> Vec<usize> {
    let deepest = max.saturating_sub(bench::decode_context(0, tokens) - 1);
    let mut depths: Vec<usize> = asked.iter().map(|d| *d.min(&deepest)).collect();
    depths.dedup();
    depths
}

/// What is measured of the machine itself; nothing if it is emulated.
fn machine(engine: &Engine, threads: Option<NonZeroUsize>) -> Result<(Header, Option<Peak>)> {
    #[cfg(feature = "cuda")]
    if let Some(cuda) = engine.cuda() {
        let header = Header::of_gpu(cuda.info());
        let peak = if header.emulated { None } else { Some(Peak::measure(cuda)?) };
        return Ok((header, peak));
    }
    let peak = Peak::of_host(&Cpu::<bf16>::open(threads)?, 256 << 20);
    Ok((Header::new(engine.device()), Some(peak)))
}

/// The line of what was measured of the machine.
pub fn peak_text(p: &Peak) -> String {
    let mut text = format!("measured now: read {:.1} GB/s, copy {:.1} GB/s", p.read_gb_per_s, p.copy_gb_per_s);
    if let Some(t) = p.matmul_tflops {
        text += &format!(", matrix product {t:.1} TFLOP/s");
    }
    if let Some(r) = p.running {
        let value = |x: Option<f64>, unit| x.map_or(String::new(), |x| format!(", {x:.0} {unit}"));
        text += &format!("; while reading{}", value(r.sm_mhz, "MHz").trim_start_matches(','));
        text += &(value(r.memory_mhz, "MHz memory") + &value(r.power_w, "W") + &value(r.temperature_c, "degrees C"));
    }
    text + "\n"
}

fn text(r: &Report) -> String {
    let m = &r.model;
    let (params, bytes) = (m.params as f64 / 1e9, m.weight_bytes as f64 / 1e9);
    let mut text = r.header.text();
    let kv = if m.kv == KvDtype::Auto { "" } else { ", keys and values in fp8" };
    text += &format!("{}: {params:.3} G parameters, {bytes:.3} GB of weights, context {}{kv}\n", m.name, m.context);
    text += &r.peak.as_ref().map_or(String::new(), peak_text);
    let of = ["ms p50", "ms p99", "tokens/s"];
    let mut part = |name, columns: &[&str], rows: Vec<Vec<String>>| {
        if !rows.is_empty() {
            text += &format!("\n{}", table::table(&[&[name], &of[..], columns].concat(), &rows));
        }
    };
    let columns = ["TFLOP/s", "floor ms", "of floor"];
    part("prefill of", &columns, r.prefill.iter().map(Row::prefill_cells).collect());
    let columns = ["MB/token", "GB/s", "floor ms", "of floor", "over it, us/layer", "host us"];
    part("decode at", &columns, r.decode.iter().map(Row::decode_cells).collect());
    let columns = ["of each", "GB/s", "floor ms", "of floor"];
    part("sequences", &columns, r.together.iter().map(Row::together_cells).collect());
    text
}
