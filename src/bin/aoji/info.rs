//! `aoji info`: describes a model and the memory that it needs; opens no device.

use crate::common::{self, OneModel};
#[cfg(not(feature = "cuda"))]
use aoji::cpu::Cpu;
#[cfg(feature = "cuda")]
use aoji::cuda::Cuda;
use aoji::{
    BatchOptions, Config, Error, Format, KvDtype, ModelFiles, Plan, Result, Tensor, Tokenizer,
    kv::Kv,
    model::{Changes, Kept, plan::whole_sequences},
    ops::PAGE,
    quantize,
};
use indicatif::HumanBytes;
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fmt::Write,
    path::{Path, PathBuf},
};

/// The backend whose scratch memory the plans count.
#[cfg(feature = "cuda")]
type Backend = Cuda;
#[cfg(not(feature = "cuda"))]
type Backend = Cpu<half::bf16>;

/// Arguments of `aoji info`.
#[derive(clap::Args)]
#[command(
    after_help = "Examples: aoji info demo\n          aoji info -m OWNER/NAME --quantize int4 --sequences 64 --memory 24"
)]
pub struct Args {
    #[command(flatten)]
    model: OneModel,
    /// The memory with weights that are quantized while they are loaded, as other commands do with --quantize
    #[arg(long, value_name = "FORMAT[:GROUP]")]
    quantize: Option<quantize::Options>,
    /// The memory with keys and values stored as other commands do with --kv: auto or fp8
    #[arg(long, value_name = "TYPE", default_value_t)]
    kv: KvDtype,
    /// The memory for this many sequences, 1 to 64, as aoji serve reserves it
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = common::within(BatchOptions::SEQUENCES))]
    sequences: usize,
    /// Also how many tokens of all sequences together fit this much memory
    #[arg(long, value_name = "GIB", allow_negative_numbers = true)]
    memory: Option<f64>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Prints what the files say.
pub fn run(args: Args) -> Result<()> {
    let info = Info::new(ModelFiles::open(args.model.name())?, &args)?;
    if args.json { common::print_json(&info.json()) } else { common::print(&info.text()) }
}

struct Info {
    dir: Option<PathBuf>,
    config: Config,
    tokenizer: Option<Tokenizer>,
    template: String,
    dtypes: BTreeSet<String>,
    tensors: usize,
    bytes: u64,
    shards: usize,
    /// Bytes of the keys and values of a token.
    kv_bytes: u64,
    plans: Vec<Plan>,
    /// For each plan, how many tokens of cache fit the memory that was asked about.
    fitting: Option<Vec<usize>>,
}

impl Info {
    fn new(files: ModelFiles, args: &Args) -> Result<Info> {
        let ModelFiles { dir, config, mut weights, tokenizer, template, .. } = files;
        if let Some(gib) = args.memory.filter(|gib| !(0.0..1e6).contains(gib)) {
            return Err(Error::Input(format!("--memory {gib}: expected a number of GiB")));
        }
        if let Some(quantize) = &args.quantize {
            weights = quantize.planned(&weights)?;
        }
        let shards: BTreeSet<&Path> = weights.tensors().map(|t| t.file()).collect();
        let dtype = |t: &Tensor| match t.format() {
            Format::Plain(dtype) => dtype.hf_name().to_string(),
            quantized => quantized.to_string(),
        };
        let dtypes: BTreeSet<String> = weights.tensors().map(dtype).collect();
        let shorter = [512, 2048, 8192, 32768, 131_072].into_iter().filter(|n| *n < config.max_seq);
        let held = Kept::of::<Backend>(&config, &weights, Changes::default()).bytes(&config);
        let plan = |context| Plan::new::<Backend>(&config, held, args.kv, context, args.sequences, None, None);
        let plans: Vec<Plan> = shorter.chain([config.max_seq]).map(plan).collect();
        let kv_bytes = Kv::<Backend>::bytes(&config, args.kv, 1);
        let fitting = args.memory.map(|gib| {
            let bytes = (gib * f64::from(1 << 30)) as u64;
            let pages = |p: &Plan| bytes.saturating_sub(p.total() - p.kv) / (kv_bytes * PAGE as u64);
            plans.iter().map(|p| pages(p) as usize * PAGE).collect()
        });
        let (tensors, bytes, shards) = (weights.tensors().count(), weights.bytes(), shards.len());
        let template = template.to_string();
        Ok(Info { dir, config, tokenizer, template, dtypes, tensors, bytes, shards, kv_bytes, plans, fitting })
    }

    fn bos(&self) -> Option<u32> {
        self.tokenizer.as_ref().and_then(Tokenizer::bos)
    }

    fn json(&self) -> Value {
        let c = &self.config;
        let plan = |p: &Plan| {
            json!({
                "context": p.context, "sequences": p.sequences, "cache_tokens": p.cache_tokens, "weights": p.weights, "kv": p.kv,
                "kv_dtype": p.kv_dtype,
                "scratch": p.scratch, "total": p.total(),
            })
        };
        json!({
            "dir": self.dir, "architecture": c.arch.name, "qkv_bias": c.arch.qkv_bias,
            "o_bias": c.arch.o_bias, "ffn_bias": c.arch.ffn_bias, "qk_norm": c.arch.qk_norm, "windows": c.arch.windows,
            "dim": c.dim, "ffn_dim": c.ffn_dim, "n_layers": c.n_layers, "n_heads": c.n_heads,
            "n_kv_heads": c.n_kv_heads, "head_dim": c.head_dim, "vocab": c.vocab, "max_seq": c.max_seq,
            "norm_eps": c.norm_eps, "tied": c.tied, "rope_theta": c.rope_theta, "rope_scaling": c.rope_scaling,
            "parameters": c.params(), "dtypes": self.dtypes, "tensors": self.tensors, "bytes": self.bytes,
            "shards": self.shards, "bos": self.bos(), "eos": c.eos, "sampling": c.sampling, "template": self.template,
            "tokenizer_vocab": self.tokenizer.as_ref().map(Tokenizer::vocab),
            "kv_bytes_per_token": self.kv_bytes, "page_tokens": PAGE,
            "memory": self.plans.iter().map(plan).collect::<Vec<_>>(), "fitting_tokens": self.fitting,
        })
    }

    fn text(&self) -> String {
        let c = &self.config;
        let token = |id: u32| common::describe_token(self.tokenizer.as_ref(), id);
        let none = || "none".to_string();
        let dir = self.dir.as_ref().map_or("embedded in this program".into(), |d| d.display().to_string());
        let dtypes: Vec<&str> = self.dtypes.iter().map(String::as_str).collect();
        let tied = if c.tied { "is the embedding" } else { "has its own weights" };
        let scaling = c.rope_scaling.map_or(String::new(), |s| format!(", {s}"));
        let eos: Vec<String> = c.eos.iter().copied().map(token).collect();
        let eos = if eos.is_empty() { none() } else { eos.join(" ") };
        let tokenizer = self.tokenizer.as_ref().map_or_else(none, |t| format!("{} tokens", t.vocab()));
        let lines = [
            ("model", dir),
            ("architecture", c.arch.to_string()),
            ("parameters", format!("{:.1} million", c.params() as f64 / 1e6)),
            ("layers", format!("{}, dim {}, ffn_dim {}", c.n_layers, c.dim, c.ffn_dim)),
            ("heads", format!("{} over {} of keys and values, head_dim {}", c.n_heads, c.n_kv_heads, c.head_dim)),
            ("vocabulary", format!("{}, the output head {tied}", c.vocab)),
            ("context", format!("{} tokens", c.max_seq)),
            ("rope_theta", format!("{}{scaling}", c.rope_theta)),
            ("norm_eps", format!("{:e}", c.norm_eps)),
            (
                "weights",
                format!(
                    "{} in {} tensors in {} files, {}",
                    HumanBytes(self.bytes),
                    self.tensors,
                    self.shards,
                    dtypes.join(" and ")
                ),
            ),
            ("KV cache", format!("{} a token, in pages of {PAGE}", HumanBytes(self.kv_bytes))),
            ("tokenizer", tokenizer),
            ("BOS", self.bos().map_or_else(none, token)),
            ("eos", eos),
            ("sampling", format!("{}", c.sampling)),
            ("template", self.template.clone()),
        ];
        let mut text = String::new();
        for (name, value) in lines {
            let _ = writeln!(text, "{name:<14}{value}");
        }
        let sequences = self.plans.first().map_or(1, |p| p.sequences);
        if sequences > 1 {
            let _ =
                writeln!(text, "\n{sequences} sequences, with a cache for {} whole ones:", whole_sequences(sequences));
        }
        let fits = if self.fitting.is_some() { format!("{:>16}", "tokens that fit") } else { String::new() };
        let _ = writeln!(
            text,
            "\n{:>8}{:>14}{:>14}{:>14}{:>14}{fits}",
            "context", "weights", "KV cache", "scratch", "GPU memory"
        );
        for (i, p) in self.plans.iter().enumerate() {
            let bytes = |n: u64| HumanBytes(n).to_string();
            let [w, kv, scratch, total] = [p.weights, p.kv, p.scratch, p.total()].map(bytes);
            let fits = self.fitting.as_ref().map_or(String::new(), |fitting| match fitting[i] {
                n if n < p.context => format!("{:>16}", "none"),
                n => format!("{n:>16}"),
            });
            let _ = writeln!(text, "{:>8}{w:>14}{kv:>14}{scratch:>14}{total:>14}{fits}", p.context);
        }
        text
    }
}
