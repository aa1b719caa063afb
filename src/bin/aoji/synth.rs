//! `aoji synth`: a random checkpoint with the sizes of a real one, for measurements and tests.

use crate::common;
use aoji::{Dtype, Error, Result, model_files, output::Output, synth};
use std::path::{Path, PathBuf};

/// Arguments of `aoji synth`.
#[derive(clap::Args)]
#[command(after_help = "Example: aoji synth --like llama3-8b --seed 1 random-8b   (16 GB)")]
pub struct Args {
    /// The model whose sizes to take: llama3-8b, llama3.2-1b, mistral-7b, qwen2.5-7b, qwen3-8b, a model directory, or a
    /// config.json
    #[arg(long, value_name = "NAME|DIR|FILE")]
    like: String,
    /// The same seed gives the same bytes
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Type of the tensors: bf16, f16 or f32 [default: that of the configuration]
    #[arg(long, value_name = "TYPE", value_parser = parse_dtype)]
    dtype: Option<Dtype>,
    /// Largest size of a file, with K, M or G for powers of 1000
    #[arg(long, value_name = "BYTES", default_value_t = Size(synth::SHARD_BYTES), value_parser = parse_size)]
    shard_size: Size,
    /// Number of layers, if not the original's
    #[arg(long, value_name = "N")]
    layers: Option<std::num::NonZeroUsize>,
    /// Replace the model that is in OUT, once the new one is complete
    #[arg(long)]
    force: bool,
    /// The directory to write; it must be absent or empty
    #[arg(value_name = "OUT")]
    out: PathBuf,
}

/// Bytes.
#[derive(Clone, Copy)]
struct Size(u64);

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            n if n % 1_000_000_000 == 0 => write!(f, "{}G", n / 1_000_000_000),
            n => write!(f, "{n}"),
        }
    }
}

fn parse_size(text: &str) -> Result<Size, String> {
    let upper = text.trim_end_matches(['b', 'B']).to_ascii_uppercase();
    let digits = upper.trim_end_matches(['K', 'M', 'G']);
    let unit: u64 = match &upper[digits.len()..] {
        "" => 1,
        "K" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        _ => 0,
    };
    let size = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
    size.filter(|n| *n > 0).map(Size).ok_or_else(|| "expected a number of bytes, as in 5G or 500M".into())
}

fn parse_dtype(text: &str) -> Result<Dtype, String> {
    match text {
        "bf16" => Ok(Dtype::Bf16),
        "f16" => Ok(Dtype::F16),
        "f32" => Ok(Dtype::F32),
        _ => Err("expected bf16, f16 or f32".into()),
    }
}

/// Writes the checkpoint and prints its directory.
pub fn run(args: Args) -> Result<()> {
    let (json, dir) = original(&args.like)?;
    let json = match args.layers {
        Some(n) => with_layers(&args.like, &json, n.get())?,
        None => json,
    };
    let config = aoji::Config::from_json(Path::new(&args.like), &json, None)?;
    let mut output = if args.force { Output::replace(&args.out)? } else { Output::begin(&args.out)? };
    common::abandon_on_interrupt(&output)?;
    if let Some(dir) = dir {
        let copied = synth::copy_small(&dir, &mut output)?;
        common::note(format_args!("copied {}", copied.join(", ")));
    }
    let bar = common::bar(0, "writing", "{bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let dtype = args.dtype.unwrap_or(config.dtype);
    synth::write_to(&json, args.seed, dtype, args.shard_size.0, output, |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    common::print(&format!("{}\n", args.out.display()))
}

/// The configuration that `--like` names, and the directory that it is in.
fn original(like: &str) -> Result<(String, Option<PathBuf>)> {
    if let Some(json) = synth::preset(like) {
        return Ok((json, None));
    }
    let path = Path::new(like);
    let file = if path.is_dir() { path.join(model_files::CONFIG) } else { path.to_path_buf() };
    if !file.exists() {
        let presets = synth::PRESETS.join(", ");
        let what = format!("--like {like}: neither one of {presets}, nor a model directory, nor a config.json");
        return Err(Error::Input(what));
    }
    Ok((common::read_file(&file)?, file.parent().map(Path::to_path_buf)))
}

fn with_layers(like: &str, json: &str, n: usize) -> Result<String> {
    let mut config: serde_json::Value =
        serde_json::from_str(json).map_err(|e| Error::File { path: like.into(), what: format!("is not JSON: {e}") })?;
    match config.as_object_mut() {
        Some(map) => map.insert("num_hidden_layers".into(), n.into()),
        None => return Err(Error::File { path: like.into(), what: "is not a JSON object".into() }),
    };
    Ok(format!("{config:#}\n"))
}
